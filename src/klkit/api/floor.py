"""Every numerical floor of a model side by side: what its own rounding looks like as a divergence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from klkit.api.batches import floor_of
from klkit.api.prepare import Pair, make_plan, resolved, with_defaults
from klkit.api.prompts import prompts_of
from klkit.api.settings import Settings
from klkit.estimators.rao_blackwell import rao_blackwell
from klkit.estimators.statistics import collect
from klkit.models.base import LanguageModel
from klkit.models.noise import with_rounding_noise
from klkit.models.spec import load
from klkit.results import jsonable
from klkit.sampling.ancestral import sample
from klkit.sequences import Sequences
from klkit.stats.intervals import clustered_ratio

STRINGS = 16  # unless told otherwise
READING = (
    "A divergence from this model means something where it is several times the floors that its measurement meets "
    "(decoding and batch shape always, dtype where the two models run in different precisions, noise as a general "
    "guide): rounding adds to every divergence, and more samples do not average it out."
)


@dataclass(frozen=True, slots=True)
class Floor:
    """The divergence of a model from itself under one change of its arithmetic.

    Attributes:
        kind: ``decoding``, ``batch shape``, ``noise`` or ``dtype``.
        meaning: the two sides, the first against the second.
        value: nats per response, with ``stderr`` between prompts (between strings where there is one prompt).
        per_token: nats per token, with ``per_token_stderr``.
        n: strings.
    """

    kind: str
    meaning: str
    value: float
    stderr: float
    per_token: float
    per_token_stderr: float
    n: int

    @classmethod
    def of(cls, kind: str, meaning: str, x: Sequences, kl: Float[Tensor, " n"]) -> Floor:
        """Sum up the divergences of the strings ``x``, in nats."""
        values, cluster = kl.double().numpy(), x.cluster.numpy()
        responses = clustered_ratio(values, np.ones(len(values)), cluster)
        tokens = clustered_ratio(values, x.lengths.double().numpy(), cluster)
        return cls(kind, meaning, *responses, *tokens, len(values))

    def to_dict(self) -> dict[str, Any]:
        """The floor as plain JSON values."""
        numbers = {name: jsonable(getattr(self, name)) for name in ("value", "stderr", "per_token", "per_token_stderr")}
        return {"kind": self.kind, "meaning": self.meaning, **numbers, "n": self.n, "unit": "nats"}


def floors(
    p: str,
    prompts: str | None = None,
    *,
    max_tokens: int = 64,
    samples: int = STRINGS,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> Iterator[Floor]:
    """Draw a few strings of a model and measure each of its numerical floors on them, one after the other.

    The floors are ``KL(p'‖p)`` summed over the decisions of the strings, for models ``p'`` that are ``p`` but for their
    rounding. The second precision is loaded last, so that the others are known before.

    Args:
        p: specification of the model.
        prompts: file of prompts, ``klkit:NAME``, or None for one empty prompt.
        max_tokens: longest response.
        samples: strings in all, spread over the prompts.
        seed: names the draws of strings and of noise.
        dtype: precision of the model unless its specification says otherwise.
        device: where it runs.

    Raises:
        ValueError, OSError, ImportError: options, prompts or a model that cannot be used.

    Example:
        >>> for floor in floors("klkit:docs", max_tokens=8, samples=4):
        ...     print(floor.kind, floor.n, floor.per_token < 1e-3)
        decoding 4 True
        batch shape 4 True
        noise 4 True
        dtype 4 True
    """
    options = {"max_tokens": max_tokens, "samples": samples, "seed": seed, "dtype": dtype, "device": device}
    settings = resolved(Settings.from_mapping({"p": p, "q": p, "prompts": prompts, **options}))
    spec = with_defaults(settings, settings.p)
    model = load(spec)
    noisy = with_rounding_noise(model, seed=seed)
    plan, _ = make_plan(Pair(model, model, ()), settings, prompts_of(settings))
    draw = plan.draw(sample, model, 0, samples)
    x = draw.sequences
    together = model.encode(x)

    def between(hidden: Tensor) -> Float[Tensor, " n"]:
        return torch.from_numpy(rao_blackwell(collect(model, hidden, model, together, x)))

    yield Floor.of("decoding", "strings as they were drawn against the same strings read", x, between(draw.hidden))
    alone = torch.cat([model.encode(x.select(torch.tensor([i]))) for i in range(len(x))])
    yield Floor.of("batch shape", f"strings read one by one against {len(x)} at a time", x, between(alone))
    meaning = f"relative noise of {noisy.scale:.2g} after every layer against the model as run"
    yield Floor.of("noise", meaning, x, floor_of(noisy, model, x))
    yield precision(model, spec, x)


def precision(model: LanguageModel, spec: str, x: Sequences) -> Floor:
    """The floor ``dtype``: the model against its fp32 form; one that runs in fp32, against its bf16 form."""
    second = load(spec, dtype="bfloat16" if model.dtype == torch.float32 else "float32")
    finer, coarser = sorted((model, second), key=lambda m: torch.finfo(m.dtype).eps)
    sides = [str(side.dtype).removeprefix("torch.") for side in (finer, coarser)]
    return Floor.of("dtype", f"{sides[0]} against {sides[1]}", x, floor_of(finer, coarser, x))
