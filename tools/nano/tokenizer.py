"""Train step35-nano's byte-level BPE tokenizer: 2,048 entries, special tokens spelt as in the real model."""

import itertools
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.nano import data

VOCAB_SIZE = 2048
BOS, EOS, PAD = data.BOS, "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
CONTROL = ["<|im_start|>", "<|im_end|>", "<im_patch>"]
# Marks in the output that a parser reads: ordinary text to a decoder, single entries to the model.
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
# One digit at a time and CJK apart, as in the family of the real tokenizer: numbers then copy digit by digit.
PATTERN = r"[^\r\n\p{L}\p{P}\p{S}]?\p{L}+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.Split(Regex(r"[一-龥぀-ヿ]+"), "isolated"),
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD, *CONTROL, *MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = itertools.chain(
        itertools.islice(data.dialogues("train", 7), 12_000), itertools.islice(data.source("train", 7), 250)
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (BOS, EOS, PAD, *CONTROL)]
    )
    text = json.loads(tokenizer.to_str())
    for token in text["added_tokens"]:
        token["special"] = token["content"] not in MARKS
    (data.NANO / "tokenizer.json").write_text(json.dumps(text, ensure_ascii=False, indent=1))
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "added_tokens_decoder": {
            str(t["id"]): {
                k: t[k] for k in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
            }
            for t in text["added_tokens"]
        },
    }
    (data.NANO / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n")
    print(f"{tokenizer.get_vocab_size()} entries in {data.NANO / 'tokenizer.json'}")


if __name__ == "__main__":
    main()
