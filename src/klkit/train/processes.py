"""Several processes that do one piece of work: what each does of it, and what they tell each other.

Gradients are sums over processes of losses that are already divided by the count of the whole step. So nothing is
averaged, nothing has to be undone, and any number of processes makes the same step. Processes find each other by the
environment that ``torchrun`` and ``accelerate launch`` set.

An error in one process must not leave the others waiting for it. So work that may fail is done inside
:meth:`Processes.everywhere`, :meth:`Processes.outcomes` or :meth:`Processes.by_first`, which pass errors around.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, distributed

Found = TypeVar("Found")

PATIENCE = timedelta(days=1)
"""How long a process waits for the others: one that ended is noticed at once, and a batch of a large model is slow."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Found]):
    """What came of a piece of work: a value or an error.

    Attributes:
        value: what was made.
        error: what was raised instead, or None.
    """

    value: Found | None = None
    error: BaseException | None = None

    @classmethod
    def of(cls, work: Callable[[], Found]) -> Outcome[Found]:
        """Do ``work``, and keep what it raises; interruptions too, so that all processes end alike."""
        try:
            return cls(work())
        except (Exception, KeyboardInterrupt) as error:
            # Frames of the failed work may hold tensors that fill a device, and a retry needs the room.
            traceback.clear_frames(error.__traceback__)
            return cls(error=error)

    def get(self) -> Found:
        """The value.

        Raises:
            BaseException: the error, if there is one.
        """
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]

    def portable(self) -> Outcome[Found]:
        """The same for other processes: errors that cannot travel become plain ones with their message."""
        if self.error is None:
            return self
        try:
            pickle.loads(pickle.dumps(self.error))
        except Exception:
            kind = next((kind for kind in (ValueError, OSError) if isinstance(self.error, kind)), RuntimeError)
            return Outcome(error=kind(str(self.error) or type(self.error).__name__))
        return self


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

    def outcomes(self, work: Callable[[], Found]) -> list[Outcome[Found]]:
        """What came of each process's ``work``, in the order of their numbers; none may fail to call this.

        Example:
            >>> [outcome.get() for outcome in Processes().outcomes(lambda: 3)]
            [3]
        """
        own = Outcome.of(work)
        found = self.gather(own.portable())
        found[self.rank] = own
        return found

    def everywhere(self, work: Callable[[], Found]) -> Found:
        """What this process makes of ``work``, which all of them do; an error in any is an error in all.

        Raises:
            BaseException: whatever ``work`` raised, in the first process where it did.
        """
        if self.count == 1:
            return work()
        own = Outcome.of(work)
        mine: Outcome[None] = Outcome(error=own.error)  # without the value, which may be a model
        errors = self.gather(mine.portable())
        for rank, other in enumerate(errors):
            (own if rank == self.rank else other).get()
        return own.get()

    def by_first(self, work: Callable[[], Found]) -> Found:
        """What the first process makes of ``work``, in all of them; an error there is an error everywhere.

        Raises:
            BaseException: whatever ``work`` raised.
        """
        if self.count == 1:
            return work()
        own: Outcome[Found] = Outcome.of(work) if self.first else Outcome()
        found: list[Any] = [own.portable()]
        distributed.broadcast_object_list(found, src=0)
        return own.get() if self.first else found[0].get()


@contextmanager
def open_processes(device: str = "cpu") -> Iterator[Processes]:
    """The processes that a launcher started, this one among them; without a launcher, this one alone.

    Args:
        device: ``cuda`` stands for the process's own accelerator.

    Raises:
        ValueError: there are more processes on this machine than accelerators.

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
    if own.startswith("cuda"):
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"expected an accelerator for each process, got {torch.cuda.device_count()} of them and process "
                f"{local + 1} on this machine; start as many processes as there are, or say --device cpu"
            )
        torch.cuda.set_device(own)
    started = not distributed.is_initialized()
    if started:
        # What is no tensor of an accelerator travels from memory to memory.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if own.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), own)
    finally:
        if started:
            distributed.destroy_process_group()
