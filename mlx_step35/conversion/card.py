"""The model card of a converted checkpoint, made from facts only."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_step35.config import ModelConfig
from mlx_step35.conversion.plan import Plan
from mlx_step35.conversion.report import CONTEXTS, memory, rows, total
from mlx_step35.costs import readable_bytes

CARD = "README.md"
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"


@dataclass(frozen=True, slots=True)
class Facts:
    """Where a conversion came from and how it was made; `name` is a path or a repo id."""

    name: str
    revision: str | None
    command: str
    versions: Mapping[str, str]
    license: str | None

    @property
    def is_repo(self) -> bool:
        return re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) is not None and not Path(self.name).exists()


def model_card(plan: Plan, config: ModelConfig, facts: Facts, name: str) -> str:
    """README.md with the hub's metadata block; `name` is the repo's or the directory's."""
    metadata = ["---", "library_name: mlx", "pipeline_tag: text-generation"]
    if facts.license:
        metadata.append(f"license: {facts.license}")
    if facts.is_repo:
        metadata += [f"base_model: {facts.name}", "base_model_relation: quantized"]
    metadata += [
        "tags:",
        "- mlx",
        "- step3p5",
        *(["- multi-token-prediction"] if plan.sidecar else []),
        "---",
    ]
    title = name.rpartition("/")[2]
    return "\n".join([*metadata, "", f"# {title}", "", *_body(plan, config, facts, name)]) + "\n"


def has_quality(card: str) -> bool:
    """Whether `put_quality` finds the section it fills."""
    return END in card.partition(BEGIN)[2]


def put_quality(card: str, figures: Mapping[str, Any]) -> str:
    """A card with its quality section filled. Raises ValueError when the section's marks are gone."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError("the card has no quality section")
    return f"{before}{BEGIN}\n{_quality(figures)}\n{END}{after}"


def source_license(source: Path) -> str | None:
    """The licence named in the metadata of the source's own card."""
    path = source / CARD
    if not path.exists():
        return None
    match = re.match(r"---\n(.*?)\n---", path.read_text(errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*([\w.-]+)\s*$", match[1], re.MULTILINE) if match else None
    return found[1] if found else None


def _body(plan: Plan, config: ModelConfig, facts: Facts, name: str) -> list[str]:
    revision = f" at revision `{facts.revision}`" if facts.revision else ""
    source = f"[{facts.name}](https://huggingface.co/{facts.name})" if facts.is_repo else f"`{facts.name}`"
    heads = (
        "The multi-token-prediction layers are in `mtp.safetensors`; mlx-lm ignores that file."
        if plan.sidecar
        else "The multi-token-prediction layers were left out."
    )
    size = total(plan)
    table = ["| part | size | bits per weight | stored as |", "|---|---|---|---|"]
    table += [
        f"| {title} | {readable_bytes(part.nbytes)} | {part.bits_per_weight:.2f} | {chosen} |"
        for title, part, chosen in rows(plan)
    ]
    table.append(f"| **total** | {readable_bytes(size.nbytes)} | {size.bits_per_weight:.2f} | |")
    contexts = ["| context | memory |", "|---|---|"]
    contexts += [
        f"| {context // 1024}K | {readable_bytes(memory(plan, config, context))} |"
        for context in CONTEXTS
        if context <= config.context_length
    ]
    return [
        f"Converted from {source}{revision}. {heads}",
        "",
        f"## Recipe `{plan.recipe.name}`",
        "",
        *table,
        "",
        "## Memory",
        "",
        "Weights and caches, without the workspace of a prefill (computed from the shapes):",
        "",
        *contexts,
        "",
        "## Quality",
        "",
        BEGIN,
        "Not measured.",
        END,
        "",
        "## Use",
        "",
        "With mlx-step35, which drafts with the MTP layers:" if plan.sidecar else "With mlx-step35:",
        "",
        "```",
        f'mlx_step35.generate --model {name} --prompt "Write a haiku about weights."',
        "```",
        "",
        "With mlx-lm, without drafting:" if plan.sidecar else "With mlx-lm:",
        "",
        "```",
        f'mlx_lm.generate --model {name} --prompt "Write a haiku about weights."',
        "```",
        "",
        "## How it was made",
        "",
        "```",
        facts.command,
        "```",
        "",
        ", ".join(f"{name} {version}" for name, version in facts.versions.items()) + ".",
        "`conversion.json` lists a SHA-256 for every tensor.",
    ]


def _quality(figures: Mapping[str, Any]) -> str:
    """The measured figures as a table; keys are those of `quality`'s JSON."""
    lines = ["| | source | this |", "|---|---|---|"]
    lines.append(f"| perplexity | {figures['source_perplexity']:.4f} | {figures['model_perplexity']:.4f} |")
    for depth, pair in enumerate(
        zip(figures["source_acceptance"], figures["model_acceptance"], strict=False), 1
    ):
        lines.append(f"| MTP acceptance, depth {depth} | {pair[0]:.3f} | {pair[1]:.3f} |")
    lines += [
        "",
        f"KL divergence from the source: {figures['kl_divergence']:.5f} nats a token; "
        f"same first choice on {100 * figures['top1_agreement']:.1f}% of {figures['num_tokens']} tokens "
        f"of {json.dumps(figures['text'], ensure_ascii=False)}.",
    ]
    return "\n".join(lines)
