"""What a wanted precision takes, from a pilot: prompts, responses to each, and minutes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klkit.api.material import Stage
from klkit.api.prompts import read_prompts
from klkit.api.strings import Progress
from klkit.api.verbs import compare, estimate
from klkit.report.text import clock
from klkit.results import Estimate, jsonable
from klkit.rng import numpy_stream
from klkit.sequences import Prompts
from klkit.stats.contrasts import plan_contrast
from klkit.stats.planning import Plan, plan

PILOT_STRINGS = 64
SCHEMA = "klkit.plan/1"


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and the pilot that it was made from.

    Attributes:
        plan: prompts and strings a prompt; its half-width in nats.
        pilot: the estimate of the pilot; of the first candidate where two are compared.
        goal: what the plan reaches, in words.
        prompts: different prompts there are; 1 where all strings answer one.
        seconds: a string takes here.
        tokens: of a string, on average.
    """

    plan: Plan
    pilot: Estimate
    goal: str
    prompts: int
    seconds: float
    tokens: float

    def __str__(self) -> str:
        n, m = self.plan.prompts, self.plan.strings_per_prompt
        if self.prompts == 1:
            amount = f"{n:,} responses"
        else:
            amount = f"{n:,} prompts with {m:,} response{'s' if m > 1 else ''} each"
        room = f"some {self.plan.strings * self.tokens:,.0f} tokens"
        return (
            f"{self.goal} takes about {amount}: {clock(self.plan.seconds)} here, {room}. Planned from a pilot of "
            f"{self.pilot.n} responses."
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "schema": SCHEMA,
            "sentence": str(self),
            "prompts": self.plan.prompts,
            "strings_per_prompt": self.plan.strings_per_prompt,
            "half_width_nats": self.plan.half_width,
            "seconds": jsonable(self.plan.seconds),
            "seconds_per_string": jsonable(self.seconds),
            "tokens_per_string": self.tokens,
            "variance_between": self.plan.between,
            "variance_within": jsonable(self.plan.within),
            "design_effect": self.plan.design_effect,
            "pilot": self.pilot.to_dict(),
        }


def plan_run(
    p: str,
    candidates: Sequence[str],
    *,
    rtol: float | None = None,
    halfwidth: float | None = None,
    difference: float | None = None,
    options: Mapping[str, Any],
) -> Planned:
    """Draw a pilot of about 64 responses, and plan the run that reaches a precision.

    With one candidate the target is the half-width of the 95 % interval of ``KL(p‖q)``; with two it is to resolve
    their difference, with power 0.8, on the same strings.

    Args:
        rtol: half-width as a share of the estimate; or
        halfwidth: half-width in nats.
        difference: between two candidates that shall be resolved, nats; by default what the pilot sees.
        options: of :class:`klkit.api.settings.Settings`: ``prompts``, ``max_tokens``, ….

    Raises:
        ValueError: not exactly one target, one that is not positive, or models and options that cannot be used.
    """
    one = len(candidates) == 1
    given = [x for x in (rtol, halfwidth) if x is not None]
    if (one and (len(given) != 1 or difference is not None)) or (not one and given) or not 1 <= len(candidates) <= 2:
        raise ValueError(
            f"expected one candidate with rtol or halfwidth, or two with a difference to resolve, got "
            f"{len(candidates)} with rtol={rtol}, halfwidth={halfwidth} and difference={difference}; as in: klkit plan "
            f"P Q --rtol 0.05, or klkit plan P Q1 Q2 --difference 0.01"
        )
    targets = {"rtol": rtol, "halfwidth": halfwidth, "difference": difference}
    wrong = [f"{name}={x}" for name, x in targets.items() if x is not None and not 0 < x < math.inf]
    if wrong:
        raise ValueError(
            f"expected a positive finite target, got {wrong[0]}; 0.05 asks rtol for ± 5 %, the others are in nats"
        )
    rest = {name: value for name, value in options.items() if name not in ("prompts", "column", "samples")}
    source = options.get("prompts")
    contents = (None,) if source is None else read_prompts(source, options.get("column", "prompt")).contents
    available = len(contents)
    few: Prompts | None = None
    if source is not None:
        order = numpy_stream(int(options.get("seed", 0)), "pilot").permutation(available)[: PILOT_STRINGS // 2]
        few = Prompts(tuple(content for i, content in enumerate(contents) if i in order and content is not None))
    samples = -(-PILOT_STRINGS // (1 if few is None else len(few)))
    prompts = None if available == 1 else available
    if one:
        last: list[Progress] = []
        result = estimate(p, candidates[0], few, samples=samples, observe=last.append, **rest)
        head, seconds = result.headline, last[-1].seconds / last[-1].fresh
        tokens = last[-1].tokens / last[-1].strings
        require_finite(candidates[0], head)
        found = plan(
            head.contributions, head.weights, head.cluster, rtol=rtol, atol=halfwidth, seconds_per_string=seconds,
            available_prompts=prompts,
        )  # fmt: skip
        wide = f"± {rtol:.3g} of it" if rtol is not None else f"± {head.in_unit(found.half_width):.3g} {head.unit}"
        goal = f"{head.direction} per response to {wide} at 95 %"
    else:
        stages: dict[str, Stage] = {}
        ranking = compare(
            p, list(candidates), few, samples=samples, observe=lambda s: stages.update({s.name: s}), **rest
        )
        first, second = (entry.result.headline for entry in ranking.entries)
        require_finite(candidates[0], first)
        require_finite(candidates[1], second)
        head, seconds = first, sum(stage.seconds for stage in stages.values()) / first.n
        tokens = float(ranking.entries[0].per_token.weights.mean())
        found = plan_contrast(
            first.contributions, second.contributions, first.weights, first.cluster,
            difference=difference, seconds_per_string=seconds, available_prompts=prompts,
        )  # fmt: skip
        goal = (
            f"telling {candidates[0]} from {candidates[1]} if they differ by {head.in_unit(found.half_width):.3g} "
            f"{head.unit} per response (power 0.8 at 5 %)"
        )
    return Planned(found, head, goal, prompts or 1, seconds, tokens)


def require_finite(name: str, head: Estimate) -> None:
    """Refuse to plan for what no number of strings makes finite.

    Raises:
        ValueError: the pilot's divergence is infinite.
    """
    if not math.isfinite(head.value):
        raise ValueError(
            f"expected a finite divergence to plan for, got an infinite one: {name} excludes tokens that p allows "
            f"at {head.infinite} decisions of the pilot; compare unprocessed models, or see klkit estimate for which "
            "tokens"
        )
