"""A run between two steps, on disk: the model in Hugging Face format, and what it takes to go on exactly.

    step-000100/
        config.json, model.safetensors, …    the model, or adapter_config.json and its adapter; its tokenizer
        optimizer.safetensors                what AdamW remembers
        training.json                        the step's number, and what else moves on with it

A checkpoint appears whole or not at all: it is written beside, and renamed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from klkit.train.learner import Learner

OPTIMIZER, TRAINING, PART = "optimizer.safetensors", "training.json", ".part"


@runtime_checkable
class Resumable(Protocol):
    """A run between two steps, a frozen data class, that can be put down and taken up again.

    Attributes:
        PROGRESS: names of the numbers that move on with the steps, ``step`` first.
    """

    PROGRESS: ClassVar[tuple[str, ...]]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def learner(self) -> Learner:
        """The model under training."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What trains it."""
        ...

    @property
    def step(self) -> int:
        """Steps done."""
        ...


AnyState = TypeVar("AnyState", bound=Resumable)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder`` that are whole, oldest first."""
    found = [path for path in folder.glob("step-*") if path.suffix != PART and (path / TRAINING).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(state: Resumable, folder: Path, *, keep: int = 0) -> Path:
    """Write ``state`` as ``folder/step-NNNNNN``; return that path.

    Args:
        keep: how many of the newest to keep; 0 keeps all.

    Raises:
        OSError: the disk refuses; earlier checkpoints are as they were.
    """
    path = folder / f"step-{state.step:06d}"
    beside = path.with_name(path.name + PART)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        write_model(state.learner, beside)
        moments = state.optimizer.state_dict()["state"]
        tensors = {f"{i}.{name}": value for i, own in moments.items() for name, value in own.items()}
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, beside / OPTIMIZER)
        (beside / TRAINING).write_text(json.dumps({name: getattr(state, name) for name in state.PROGRESS}))
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if keep:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return path


def write_model(learner: Learner, folder: Path) -> None:
    """Write a learner's network, or its adapter, and its tokenizer, in Hugging Face format."""
    from klkit.models.checkpoints import quiet

    with quiet():
        learner.saved.save_pretrained(folder)
        learner.model.tokenizer.save_pretrained(folder)


def restore(state: AnyState, path: Path) -> AnyState:
    """The state that was saved at ``path``, in the networks of a fresh ``state`` of the same run.

    Raises:
        ValueError: the checkpoint is damaged, or belongs to a run with other weights.
    """
    try:
        saved = json.loads((path / TRAINING).read_text())
        _restore_weights(state.learner, path)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(path / OPTIMIZER).items():
            i, _, key = name.partition(".")
            moments.setdefault(int(i), {})[key] = value
        state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
        return replace(state, **{name: type(getattr(state, name))(saved[name]) for name in state.PROGRESS})
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"expected a checkpoint of this run in {path}, got: {error}; delete that folder to go on from the one "
            f"before it, or start again in another --out"
        ) from error


def _restore_weights(learner: Learner, path: Path) -> None:
    if learner.adapter is not None:
        import peft

        adapter = load_file(path / "adapter_model.safetensors")
        outcome: Any = peft.set_peft_model_state_dict(learner.adapter, adapter)
        if outcome.unexpected_keys:
            raise ValueError(
                f"{len(outcome.unexpected_keys)} weights of it fit no layer, such as {next(iter(adapter))}"
            )
        return
    from klkit.models.checkpoints import quiet

    network: Any = learner.model.model
    with quiet():
        read = type(network).from_pretrained(path, dtype=network.dtype, local_files_only=True, use_safetensors=True)
    with torch.no_grad():
        network.load_state_dict(read.state_dict())
