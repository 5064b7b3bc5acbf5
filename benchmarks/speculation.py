"""Speculative decoding beside mlx-lm's plain loop on the same weights, and where the time of a round goes.

    python benchmarks/speculation.py --model nano --out speculation.json
    python benchmarks/speculation.py --acceptance

Both run in one process on one float32 copy of the weights and take turns prompt by prompt, so that whatever
else the machine does hits both. Prompts are held-out dialogues, cut before an answer of some length, and
held-out source files of the standard library, cut at a random line. An answer ends where the model ends it:
nobody reads what it would make up behind. Ratios are ours over mlx-lm's for the same prompt;
forward passes count from the second token, because the first comes with the prompt. One depth controller
serves all runs of a case on one kind of prompt, as in a server. `--acceptance` compares the acceptance rules
instead.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from acceptance import acceptance, record
from heldout import dialogues, sources
from mlx_lm.generate import generate_step
from mlx_lm.models import step3p5
from mlx_lm.sample_utils import make_sampler

from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import load_checkpoint, resolve_model
from mlx_step35.decoding import DecodeOptions, DecodeStats, decode, make_controller, prepare
from mlx_step35.depth import DepthController
from mlx_step35.model import Model
from mlx_step35.mtp_state import DraftState
from mlx_step35.sampling import Chooser, Proposal, SamplingParams

# On a busy machine the CPU time of all threads is steadier than the time that passes.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration of ours to compare."""

    name: str
    options: dict[str, Any]
    is_wrong: bool = False


CASES = [
    Case("off", {"mtp": "off", "lookup": False}),
    Case("depth 1", {"mtp": 1, "lookup": False}),
    Case("depth 2", {"mtp": 2, "lookup": False}),
    Case("depth 3", {"mtp": 3, "lookup": False}),
    Case("auto", {"mtp": "auto", "lookup": False}),
    Case("auto, lookup", {"mtp": "auto", "lookup": True}),
    Case("auto, always wrong", {"mtp": "auto", "lookup": False}, is_wrong=True),
]


@dataclass(slots=True)
class Result:
    """Runs of one case on one kind of prompt at one temperature."""

    ratios: list[float] = field(default_factory=list)
    passes: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    mismatches: int = 0

    def add(self, ratio: float, stats: DecodeStats, is_equal: bool) -> None:
        self.ratios.append(ratio)
        # The first token belongs to the prompt.
        self.passes += stats.forward_passes - 1
        self.tokens += stats.generated_tokens - 1
        self.mismatches += not is_equal
        for total, part in ((self.drafted, "drafted"), (self.accepted, "accepted")):
            row = getattr(stats, part).get("mtp", [])
            total.extend([0] * (len(row) - len(total)))
            for index, value in enumerate(row):
                total[index] += value

    def summary(self) -> dict[str, Any]:
        quartiles = statistics.quantiles(self.ratios, n=4) if len(self.ratios) > 1 else self.ratios * 3
        # Given that the drafts before were accepted; where the depth changes (but for the last rounds of an
        # answer), that is not known.
        is_fixed = min(self.drafted, default=0) > 0.8 * max(self.drafted, default=0)
        reached = [sum(self.drafted[:1]), *self.accepted[:-1]] if is_fixed else []
        return {
            "speed_ratio": round(statistics.median(self.ratios), 3),
            "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
            "passes_per_token": round(self.passes / max(self.tokens, 1), 3),
            "acceptance": [
                round(accepted / max(count, 1), 3)
                for accepted, count in zip(self.accepted, reached, strict=False)
            ],
            "different_outputs": self.mismatches,
        }


class WrongDrafter:
    """The real heads, run in full, with every draft moved to another token than the best."""

    def __init__(self, state: Any, vocab_size: int) -> None:
        self._state = state
        self._vocab_size = vocab_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def propose(self, depth: int, tokens: Sequence[int], choose: Callable[..., Any]) -> Proposal:
        # An unused id of the vocabulary is never the model's choice.
        proposal = self._state.propose(depth, tokens, choose)
        return Proposal(mx.full(proposal.tokens.shape, self._vocab_size - 1, mx.uint32), None)


def main() -> None:
    args = _arguments()
    path = resolve_model(args.model)
    model = load_checkpoint(path, "float32")
    prepare(model)
    tokenizer = Tokenizer.from_directory(path)
    rng = random.Random(args.seed)
    prompts = {
        "dialogues": list(dialogues(path, tokenizer, args.prompts, rng)),
        "source": list(sources(tokenizer, args.prompts, rng, args.prompt_tokens)),
    }
    if args.acceptance:
        for kind, ids in prompts.items():
            recordings = [record(model, prompt, args.tokens, number) for number, prompt in enumerate(ids)]
            print(f"{kind:10} {json.dumps(acceptance(recordings))}", flush=True)
        return
    reference = oracle(model)
    cases = [case for case in CASES if not args.cases or case.name in args.cases]
    report: dict[str, Any] = {
        "machine": f"{platform.machine()} {platform.system()}, {mx.default_device()}",
        "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__,
        "clock": args.clock,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
        "results": {},
    }
    for temperature in args.temperatures:
        for kind, ids in prompts.items():
            for case, result in compare(
                model, reference, ids, cases, temperature, args.tokens, args.clock
            ).items():
                report["results"][f"{kind}, temperature {temperature:g}, {case}"] = result.summary()
                print(f"{kind:10} T={temperature:<4g} {case:20} {json.dumps(result.summary())}", flush=True)
    report["round"] = Profile(model, prompts["source"][0]).run()
    print(json.dumps(report["round"], indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


def compare(
    model: Model,
    reference: Any,
    prompts: Sequence[list[int]],
    cases: Sequence[Case],
    temperature: float,
    num_tokens: int,
    clock: str,
) -> dict[str, Result]:
    """Every case on every prompt, each between two runs of mlx-lm."""
    results = {case.name: Result() for case in cases}
    controllers = {case.name: make_controller(model) for case in cases}
    eos_token_ids = model.config.eos_token_ids
    for number, prompt in enumerate(prompts):
        before, expected = theirs(reference, prompt, num_tokens, temperature, eos_token_ids, clock)
        for case in cases:
            stats, ours_tps, tokens = ours(
                model, case, prompt, num_tokens, temperature, number, clock, controllers[case.name]
            )
            after, _ = theirs(reference, prompt, num_tokens, temperature, eos_token_ids, clock)
            is_equal = temperature > 0 or tokens == expected
            # A sampled answer may end at once, and then there is no speed to compare.
            if ours_tps and before and after:
                results[case.name].add(2 * ours_tps / (before + after), stats, is_equal)
            before = after
    return results


class Profile:
    """CPU milliseconds of the parts of rounds at depth 3, each part evaluated by itself.

    CPU time of all threads, because wall-clock time on a shared machine says more about its other guests. In
    a real round the device drafts while the host builds the graph of the verify, and only the outcome is
    waited for.
    """

    def __init__(self, model: Model, prompt: list[int]) -> None:
        self.model = model
        self.known = list(prompt)
        self.parts: dict[str, list[float]] = {}
        self.chooser = Chooser(SamplingParams())
        self.cache = model.make_cache()
        self.state = DraftState(model.mtp, model.embed)
        self.state.extend(model.hidden(mx.array([prompt[:-1]]), self.cache), 0)
        mx.eval(self.cache.state)

    def run(self, rounds: int = 40) -> dict[str, float]:
        """Medians over the rounds after the first few, which compile."""
        for _ in range(rounds):
            self._round()
        for depth in (1, 2, 3):
            for _ in range(10):
                self._first_draft(depth)
        return {name: round(statistics.median(values[3:]), 3) for name, values in self.parts.items()}

    def _round(self) -> None:
        model, cache, state = self.model, self.cache, self.state
        at = cache.offset
        pending = mx.array([self.known[-1]], dtype=mx.uint32)
        with self._part("plain step"):
            mx.eval(model.logits(model.hidden(pending[None], cache)))
        cache.rollback(1)
        with self._part("draft: graph"):
            proposal = state.propose(3, self.known, lambda logits, _: self.chooser.draft(logits, 0))
        with self._part("draft: run"):
            mx.eval(proposal.tokens)
        with self._part("verify: graph"):
            hidden = model.hidden(mx.concatenate([pending, proposal.tokens])[None], cache)
        with self._part("verify: run"):
            mx.eval(hidden)
        with self._part("head, accept, read"):
            logits = model.logits(hidden)[0]
            accepted, *tokens = self.chooser.verify(logits, proposal, len(self.known)).tolist()
        with self._part("roll back"):
            cache.rollback(3 - accepted)
            state.settle(accepted)
            state.extend(hidden[:, : accepted + 1], at)
        self.known += tokens[: accepted + 1]

    def _first_draft(self, depth: int) -> None:
        """The first draft of an answer: hidden rows of the text are there, the layers have seen none."""
        state = DraftState.from_snapshot(self.model.mtp, self.model.embed, self.state.snapshot())
        with self._part(f"first draft, {depth} of 3 layers"):
            mx.eval(state.propose(depth, self.known, lambda logits, _: self.chooser.draft(logits, 0)).tokens)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.parts.setdefault(name, []).append(1e3 * (time.process_time() - start))


def ours(
    model: Model,
    case: Case,
    prompt: list[int],
    num_tokens: int,
    temperature: float,
    number: int,
    clock: str,
    controller: DepthController,
) -> tuple[DecodeStats, float, list[int]]:
    """Statistics, tokens per second after the first token, and the tokens."""
    mx.random.seed(number)
    stats, cache = DecodeStats(), model.make_cache()
    drafter = None
    if case.is_wrong:
        drafter = WrongDrafter(DraftState(model.mtp, model.embed), model.config.vocab_size)
    options = DecodeOptions(num_tokens, **case.options)
    stream = decode(
        model,
        prompt,
        cache,
        SamplingParams(temperature),
        options,
        stats=stats,
        drafter=drafter,
        controller=controller,
    )
    with closing(stream):
        speed, tokens = timed((decoded.token for decoded in stream), model.config.eos_token_ids, clock)
    return stats, speed, tokens


def theirs(
    reference: Any,
    prompt: list[int],
    num_tokens: int,
    temperature: float,
    eos_token_ids: Sequence[int],
    clock: str,
) -> tuple[float, list[int]]:
    """mlx-lm's tokens per second after the first token, and its tokens."""
    stream = generate_step(
        mx.array(prompt), reference, max_tokens=num_tokens, sampler=make_sampler(temperature)
    )
    return timed((int(token) for token, _ in stream), eos_token_ids, clock)


def timed(stream: Iterator[int], eos_token_ids: Sequence[int], clock: str) -> tuple[float, list[int]]:
    """Tokens per second after the first token, and the tokens up to the end of the text."""
    tokens = [next(stream)]
    start = CLOCKS[clock]()
    while tokens[-1] not in eos_token_ids and (token := next(stream, None)) is not None:
        tokens.append(token)
    return (len(tokens) - 1) / (CLOCKS[clock]() - start), tokens


def oracle(model: Model) -> Any:
    """mlx-lm's model holding the very same arrays; only for unquantised checkpoints."""
    reference = step3p5.Model(step3p5.ModelArgs.from_dict(dict(model.config.raw)))
    arrays = [(name, array) for name, array in _flat(model.parameters()) if not name.startswith("mtp.")]
    reference.load_weights(arrays, strict=True)
    return reference


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(tree))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare speculative decoding with mlx-lm's plain loop.")
    parser.add_argument("--model", default="nano", help="unquantised checkpoint directory (default: nano)")
    parser.add_argument("--prompts", type=int, default=12, help="prompts of each kind")
    parser.add_argument("--prompt-tokens", type=int, default=400, help="longest source prompt")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--cases", nargs="+", help=f"only these of: {', '.join(c.name for c in CASES)}")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu on a busy machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--acceptance", action="store_true", help="only print how often each rule accepts at temperature 1"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
