"""Several processes that train one model: what each does of a step, and what they add up.

Gradients are sums over processes of losses that are already divided by the count of the whole step. So nothing is
averaged, nothing has to be undone, and any number of processes makes the same step. Processes find each other by the
environment that ``torchrun`` and ``accelerate launch`` set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, distributed

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Processes:
    """One of several processes; by default the only one.

    Attributes:
        rank: its number, from 0; 0 writes files and prints.
        count: how many there are.
        device: where its sums are formed.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, number: int) -> range:
        """The part of ``number`` things that is this process's: all parts together are all of them, each once.

        Example:
            >>> [list(Processes(rank, 3).share(5)) for rank in range(3)]
            [[0, 1], [2, 3], [4]]
        """
        most, rest = divmod(number, self.count)
        start = self.rank * most + min(self.rank, rest)
        return range(start, start + most + (self.rank < rest))

    def sum(self, numbers: Sequence[float | int]) -> list[float]:
        """The sums over all processes, in double precision."""
        if self.count == 1:
            return [float(x) for x in numbers]
        table: Float[Tensor, " s"] = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        distributed.all_reduce(table)
        return [float(x) for x in table.tolist()]

    def sum_gradients(self, weights: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over processes; where there is none, by 0."""
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            if self.count > 1:
                distributed.all_reduce(weight.grad)

    def gather(self, own: Found) -> list[Found]:
        """What each process has, in the order of their numbers."""
        if self.count == 1:
            return [own]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, own)
        return found

    def by_first(self, work: Callable[[], Found]) -> Found:
        """What the first process makes of ``work``, in all of them; an error there is an error everywhere.

        Raises:
            Exception: whatever ``work`` raised.
        """
        if self.count == 1:
            return work()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = work()
            except Exception as error:
                found[1] = error
        distributed.broadcast_object_list(found, src=0)
        if found[1] is not None:
            raise found[1]
        return found[0]  # type: ignore[no-any-return]


@contextmanager
def open_processes(device: str = "cpu") -> Iterator[Processes]:
    """The processes that a launcher started, this one among them; without a launcher, this one alone.

    Args:
        device: ``cuda`` stands for the process's own accelerator.

    Example:
        >>> with open_processes() as processes:
        ...     processes.count
        1
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        yield Processes(device=device)
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    own = f"cuda:{local}" if device == "cuda" else device
    started = not distributed.is_initialized()
    if started:
        if own.startswith("cuda"):
            torch.cuda.set_device(own)
        distributed.init_process_group("nccl" if own.startswith("cuda") else "gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), own)
    finally:
        if started:
            distributed.destroy_process_group()
