"""Prompts that step35-nano has not seen: held-out dialogues and held-out files of the standard library."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_step35.chat.template import ChatTemplate
from mlx_step35.chat.tokenizer import Tokenizer

LONG_ANSWER = 30  # tokens

ROOT = Path(__file__).parent.parent
DIALOGUES = ROOT / "tests" / "data" / "heldout_dialogues.jsonl"

# A script sees its own directory only; the split belongs to the training data, which needs no PyTorch.
sys.path.append(str(ROOT))
from tools.nano.data import source_files  # noqa: E402


def dialogues(path: Path, tokenizer: Tokenizer, count: int, rng: random.Random) -> Iterator[list[int]]:
    """Held-out conversations up to an answer that is long enough to time."""
    template = ChatTemplate.from_directory(path)

    def ids(row: dict[str, Any], end: int) -> list[int]:
        return tokenizer.encode_rendered(template.render(row["messages"][:end], row["tools"]))

    rows = [json.loads(line) for line in DIALOGUES.read_text().splitlines()]
    cuts = [
        (row, end)
        for row in rows
        for end, message in enumerate(row["messages"])
        if message["role"] == "assistant" and len(ids(row, end + 1)) - len(ids(row, end)) >= LONG_ANSWER
    ]
    for row, end in rng.sample(cuts, min(count, len(cuts))):
        yield ids(row, end)


def sources(tokenizer: Tokenizer, count: int, rng: random.Random, max_tokens: int) -> Iterator[list[int]]:
    """Files that step35-nano was not trained on, up to a random line."""
    files = [file for file in source_files("heldout") if file.stat().st_size > 4000]
    for file in rng.sample(files, min(count, len(files))):
        lines = file.read_text(encoding="utf-8", errors="ignore").splitlines(keepends=True)
        ids = tokenizer.encode("".join(lines[: rng.randint(len(lines) // 4, len(lines))]))
        yield ids[-max_tokens:]
