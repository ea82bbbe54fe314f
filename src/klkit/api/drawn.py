"""Strings that another sampler draws, an engine say: asked for in advance, and scored batch by batch."""

from __future__ import annotations

from collections.abc import Callable

from klkit.sequences import Sequences
from klkit.train.processes import Processes

AT_ONCE = 1024  # strings asked for at a time: enough to keep an engine busy, few to lose to a crash

Sampler = Callable[..., Sequences]
"""Draws strings in klkit's stead: ``sampler(model, contexts, max_tokens=…, seed=…, prompt=…, replicate=…, cluster=…)``,
with the law that it drew them from as their ``sampler_logp``, so that estimates weigh them."""


class Drawn:
    """Strings of a run by their numbers, drawn in the first process for all of them.

    Args:
        draw: draws the strings from one number to another.
        total: how many there are at most; more than are wanted next are drawn in advance.
        processes: that share the work.

    Example:
        >>> import torch
        >>> from klkit.models.automaton import coin
        >>> from klkit.sampling.importance import from_policy
        >>> p = coin(end=0.5)
        >>> def draw(start, stop):
        ...     return from_policy(p, [p.context(None)] * (stop - start), max_tokens=9, seed=start)
        >>> drawn = Drawn(draw, 20, Processes())
        >>> drawn.reach(0, 5), len(drawn.strings(2, 3))
        (5, 3)
    """

    def __init__(self, draw: Callable[[int, int], Sequences], total: int, processes: Processes) -> None:
        self._draw, self._total, self._processes = draw, total, processes
        self._start, self._stop = 0, 0
        self._x: Sequences | None = None

    def reach(self, start: int, stop: int) -> int:
        """How far the strings ``start`` to ``stop`` can be scored now: up to the last that has been drawn.

        Raises:
            ValueError: strings do not say which law they were drawn from, or are not as many as were asked for.
        """
        # Smaller batches, after one that did not fit in memory, start within what is there.
        if not self._start <= start < self._stop:
            end = min(self._total, start + AT_ONCE)
            self._x = self._processes.by_first(lambda: _checked(self._draw(start, end), end - start))
            self._start, self._stop = start, end
        return min(stop, self._stop)

    def strings(self, start: int, width: int) -> Sequences:
        """``width`` strings from number ``start`` on, all of them within reach."""
        assert self._x is not None
        return self._x.select(range(start - self._start, start - self._start + width))


def _checked(x: Sequences, wanted: int) -> Sequences:
    if x.sampler_logp is None or len(x) != wanted:
        raise ValueError(
            f"expected {wanted} strings with the log-probabilities of the law that drew them (sampler_logp), got "
            f"{len(x)} strings {'without' if x.sampler_logp is None else 'with'} them; estimates would take the "
            f"sampler's law for the model's: return what was asked for"
        )
    return x
