"""Which strings a run draws, and when it looks whether they are enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jaxtyping import Int
from torch import Tensor

from klkit.api.settings import MINIMUM_STRINGS
from klkit.models.base import LanguageModel
from klkit.rng import numpy_stream

Drawing = TypeVar("Drawing")


@dataclass(frozen=True, slots=True)
class Plan:
    """Which strings a run draws: round by round, every prompt once in each, in an order shuffled by the seed.

    The order matters only to a run that stops early, or shows its first strings: these must not be
    the first lines of a file that somebody sorted.

    Attributes:
        contexts_p: what ``p`` reads before responding to each prompt.
        contexts_q: the same for ``q``, which may use a chat template of its own.
        samples: strings a prompt.
        max_tokens: longest response.
        seed: names the draws.
        groups: the group of each prompt, if prompts have one; no string depends on it.
    """

    contexts_p: Sequence[Int[Tensor, " _c"]]
    contexts_q: Sequence[Int[Tensor, " _c"]]
    samples: int
    max_tokens: int
    seed: int
    groups: Sequence[str] | None = None

    def swapped(self) -> Plan:
        """The same plan for the pair seen from ``q``."""
        return replace(self, contexts_p=self.contexts_q, contexts_q=self.contexts_p)

    @property
    def clusters(self) -> int:
        """Independent units that strings may come from, numbered from 0: prompts, or the strings of the only one."""
        return len(self.contexts_p) if len(self.contexts_p) > 1 else self.samples

    @property
    def total(self) -> int:
        """Strings in all."""
        return len(self.contexts_p) * self.samples

    def names(self, start: int, stop: int) -> dict[str, Any]:
        """Prompt, replicate and cluster of the strings ``start`` to ``stop``, as samplers take them."""
        pairs = self.slice(start, stop)
        prompts = [prompt for prompt, _ in pairs]
        return {
            "prompt": prompts,
            "replicate": [replicate for _, replicate in pairs],
            "cluster": prompts if len(self.contexts_p) > 1 else list(range(start, start + len(pairs))),
        }

    def draw(self, sampler: Callable[..., Drawing], p: LanguageModel, start: int, stop: int) -> Drawing:
        """What ``sampler`` gives for the strings ``start`` to ``stop`` of ``p``."""
        names = self.names(start, stop)
        contexts = [self.contexts_p[i] for i in names["prompt"]]
        return sampler(p, contexts, max_tokens=self.max_tokens, seed=self.seed, **names)

    def slice(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(prompt, replicate) of the strings ``start`` to ``stop``."""
        prompts = len(self.contexts_p)
        order = numpy_stream(self.seed, "order").permutation(prompts).tolist()
        return [(order[i % prompts], i // prompts) for i in range(start, min(stop, self.total))]

    def next_look(self, strings: int) -> int:
        """When to ask again whether ``strings`` are enough: a quarter later, and with every prompt equally often."""
        wanted, prompts = max(MINIMUM_STRINGS, math.ceil(1.25 * strings)), len(self.contexts_p)
        return wanted if wanted <= prompts else math.ceil(wanted / prompts) * prompts
