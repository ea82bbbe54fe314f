"""What is packaged: the checkpoints that ``klkit:NAME`` stands for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a packaged checkpoint is.

    Attributes:
        description: one line.
        parameters: number of weights, a tied embedding counted once.
        base: the checkpoint it was derived from, or None.
        prompts: packaged prompts in its domain.
        adapter: whether it holds LoRA weights only, to be put on its base.
    """

    description: str
    parameters: int
    base: str | None
    prompts: str
    adapter: bool = False


CATALOGUE = {
    "reviews": Checkpoint(
        "film reviews from a grammar whose string law is known exactly; has a chat template",
        parameters=141_056,
        base=None,
        prompts="reviews",
    ),
    "reviews-positive": Checkpoint(
        "the same grammar, re-weighted towards praise: the optimum of a reward with a KL penalty",
        parameters=141_056,
        base="reviews",
        prompts="reviews",
    ),
    "docs": Checkpoint(
        "English prose of Python's documentation",
        parameters=564_288,
        base=None,
        prompts="docs",
    ),
    "docs-tuned": Checkpoint(
        "docs, fine-tuned on the language reference",
        parameters=564_288,
        base="docs",
        prompts="docs",
    ),
    "docs-lora": Checkpoint(
        "docs with a LoRA adapter of rank 4, tuned on the language reference (PEFT format)",
        parameters=24_576,
        base="docs",
        prompts="docs",
        adapter=True,
    ),
    "docs-int8": Checkpoint(
        "docs with its linear layers rounded to 8 bits a weight (stored dequantised)",
        parameters=564_288,
        base="docs",
        prompts="docs",
    ),
    "docs-int4": Checkpoint(
        "docs with its linear layers rounded to 4 bits a weight (stored dequantised)",
        parameters=564_288,
        base="docs",
        prompts="docs",
    ),
}
"""Packaged checkpoints by name, each after its base."""


def names() -> tuple[str, ...]:
    """Names of the packaged checkpoints.

    Example:
        >>> "docs-tuned" in names()
        True
    """
    return tuple(CATALOGUE)


def path(name: str) -> Path:
    """The folder of a packaged checkpoint, as ``from_pretrained`` takes it.

    Raises:
        ValueError: no packaged checkpoint has this name.

    Example:
        >>> sorted(p.name for p in path("docs").iterdir())[:2]
        ['README.md', 'config.json']
    """
    if name not in CATALOGUE:
        raise ValueError(f"expected one of the packaged checkpoints {', '.join(CATALOGUE)}; got {name!r}")
    return Path(str(resources.files("klkit") / "zoo" / "weights" / name))


def size(name: str) -> int:
    """Bytes of all files of a packaged checkpoint.

    Example:
        >>> size("docs") <= 2_500_000
        True
    """
    return sum(file.stat().st_size for file in path(name).iterdir())
