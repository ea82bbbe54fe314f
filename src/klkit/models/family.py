"""One reference and its candidates: p stays in memory, and of each candidate no more than differs from p.

What a candidate shares with p follows from its spec. A map of p's read-out is p's own network; an adapter on p's base
is put on p's network and taken off again; whatever else there is (another checkpoint, another precision, rounded or
quantised weights) is loaded by itself and let go of. So memory holds p and one candidate at any time, as long as
each is released before the next is loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from klkit.models import wrap
from klkit.models.adapters import SharedNetwork
from klkit.models.base import LanguageModel
from klkit.models.checkpoints import quiet, read_network
from klkit.models.hf import HuggingFaceModel
from klkit.models.spec import READOUT, ModelSpec, candidate_spec, spec_with

Loaded = HuggingFaceModel | wrap.Transformed

SAME, READ_OUT, SHARED, ALONE = (
    "p itself",
    "p's network with another read-out",
    "p's network with other adapters",
    "loaded by itself",
)


class Candidate:
    """A model that is in memory until it is released; as a context manager, until the block ends.

    Attributes:
        model: the model; it refuses to work once released, unless it is p's own network.
        how: what it shares with p.
    """

    def __init__(self, model: Loaded, how: str, free: Callable[[], None] | None = None) -> None:
        self.model = model
        self.how = how
        self._free = free

    def release(self) -> None:
        """Free what this candidate does not share with p; a second time does nothing."""
        if self._free is not None:
            free, self._free = self._free, None
            free()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def __enter__(self) -> Loaded:
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Family:
    """The reference p, and the way to its candidates.

    Args:
        spec: of p.
        name: what reports call it.

    Attributes:
        p: the model.

    Raises:
        ValueError, OSError, ImportError: as :func:`klkit.models.spec.load`.
    """

    def __init__(self, spec: ModelSpec, name: str) -> None:
        self.spec = spec
        shared = _read(spec)
        self._shared: SharedNetwork | None = shared
        adapter: str | None = None
        if spec.peft is not None:
            before = shared.fingerprint()
            adapter = shared.attach(spec)
            if not torch.equal(before, shared.fingerprint()):
                self._shared = None  # the base that other adapters belong on is not there any more
        self._core = shared.model(spec, name, adapter)
        self.p = transformed(self._core, spec)

    def candidate(self, spec: ModelSpec, name: str) -> Candidate:
        """Load a candidate, or what it does not share with p.

        Raises:
            ValueError, OSError, ImportError: as :func:`klkit.models.spec.load`.
        """
        if spec.canonical() == self.spec.canonical():
            return Candidate(self.p, SAME)
        if spec.untransformed().canonical() == self.spec.untransformed().canonical():
            return Candidate(wrap.renamed(transformed(self._core, spec), name), READ_OUT)
        if spec.network().canonical() == self.spec.network().canonical():
            found = self._on_the_network(spec, name)
            if found is not None:
                return found
        core = load_untransformed(spec, name)
        return Candidate(transformed(core, spec), ALONE, core.release)

    def _on_the_network(self, spec: ModelSpec, name: str) -> Candidate | None:
        """A candidate on p's network; None where its adapter cannot be there."""
        shared = self._shared
        if shared is None:
            return None
        if spec.peft is None:
            core = shared.model(spec, name)
            return Candidate(transformed(core, spec), SHARED, core.release)
        if not shared.takes(spec):
            return None
        before = shared.fingerprint()
        adapter = shared.attach(spec)
        if not torch.equal(before, shared.fingerprint()):  # trained biases, some initialisations
            shared.detach(adapter)
            shared.restore(_read(spec).network)
            if not torch.equal(before, shared.fingerprint()):
                raise RuntimeError(
                    f"expected the weights of {self.p.name} back as they were, got others after {name} had altered "
                    f"them; compare these two in a run of their own"
                )
            return None
        core = shared.model(spec, name, adapter)

        def free() -> None:
            core.release()
            shared.detach(adapter)

        return Candidate(transformed(core, spec), SHARED, free)


def open_family(p_spec: str, q_specs: Sequence[str], **defaults: Any) -> tuple[Loaded, Callable[[int], Candidate]]:
    """Load ``p``, and return it with a function that loads candidate ``i``.

    Every spec is read before anything is loaded. A candidate may be written as options alone, which are added to p's
    (:func:`klkit.models.spec.candidate_spec`), and is called what it was written as.

    Args:
        p_spec: the reference.
        q_specs: its candidates.
        defaults: options for specs that say nothing of them, such as ``dtype="bfloat16"``.

    Raises:
        ValueError, OSError, ImportError: as :func:`klkit.models.spec.load`.

    Example:
        >>> p, load_candidate = open_family("klkit:docs", ["temperature=0.9", "klkit:docs-lora", "round=int4"])
        >>> for i in range(3):
        ...     candidate = load_candidate(i)
        ...     with candidate as q:
        ...         print(q.name, "|", candidate.how)
        temperature=0.9 | p's network with another read-out
        klkit:docs-lora | p's network with other adapters
        round=int4 | loaded by itself
    """
    specs = [spec_with(candidate_spec(p_spec, text), defaults) for text in q_specs]
    family = Family(spec_with(p_spec, defaults), p_spec)

    def load_candidate(i: int) -> Candidate:
        return family.candidate(specs[i], q_specs[i])

    return family.p, load_candidate


def load_one(spec: ModelSpec, name: str) -> Loaded:
    """The model of one spec. Raises as :func:`klkit.models.spec.load`."""
    return transformed(load_untransformed(spec, name), spec)


def load_untransformed(spec: ModelSpec, name: str) -> HuggingFaceModel:
    """The model of one spec with its read-out as it is. Raises as :func:`klkit.models.spec.load`."""
    shared = _read(spec)
    return shared.model(spec, name, None if spec.peft is None else shared.attach(spec))


def transformed(model: HuggingFaceModel, spec: ModelSpec) -> Loaded:
    """``model`` with the read-out that ``spec`` asks for, under its own name."""
    found: LanguageModel = model
    for key in READOUT:
        value = getattr(spec, key)
        if value is not None:
            found = getattr(wrap, key)(found, value)
    return replace(found, name=model.name) if isinstance(found, wrap.Transformed) else model


def _read(spec: ModelSpec) -> SharedNetwork:
    with quiet():
        return SharedNetwork(*read_network(spec.network()))
