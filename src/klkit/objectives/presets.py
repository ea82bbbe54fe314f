"""The KL penalties of common libraries, as read in their sources, and how they compare."""

from __future__ import annotations

from dataclasses import dataclass, replace

from klkit.objectives.explain import Penalty, explain
from klkit.objectives.gradient_check import GradientReport

PRESETS: dict[str, tuple[str, Penalty]] = {
    "klkit": ("klkit's rb", Penalty("full", "rb")),
    "klkit-off-policy": ("klkit's rb with prefix weights", Penalty("full", "rb", "prefix")),
    "rb-token-ratio": ("rb with the token's ratio on its score", Penalty("full", "rb", "token")),
    "rb-detached": ("full divergence in the reward, detached: the naive exchange for k1", Penalty("full", "reward")),
    "kl-rb": ("rycolab/kl-rb, the paper's released code", Penalty("full", "reward", detach=False)),
    "trl-rloo": ("TRL 1.16 RLOOTrainer", Penalty("k1", "reward")),
    "trl-grpo": ("TRL GRPOTrainer since 1.10", Penalty("k3", "loss", "token")),
    "trl-grpo-before-1.10": ("TRL GRPOTrainer before 1.10", Penalty("k3", "loss")),
    "trl-distillation": ("TRL's distillation trainers on the student's text", Penalty("full", "loss")),
    "verl": ("verl 0.9, use_kl_loss with low_var_kl", Penalty("k3", "loss")),
    "verl-k2": ("verl 0.9, use_kl_loss with k2 (also OpenRLHF, SkyRL, slime)", Penalty("k2", "loss")),
    "verl-abs": ("verl 0.9, use_kl_loss with abs (also SkyRL)", Penalty("abs", "loss")),
    "verl-plus": ("verl 0.9, k3+", Penalty("k3", "loss", gradient="k2")),
    "verl-reward": ("verl 0.9, use_kl_in_reward", Penalty("k1", "reward_to_go")),
    "openrlhf": ("OpenRLHF 0.11, KL in the reward (its default)", Penalty("k1", "reward_to_go")),
    "openrlhf-loss": ("OpenRLHF 0.11, KL loss with its default estimator", Penalty("k1", "loss")),
    "openrlhf-unbiased": ("OpenRLHF 0.11, unbiased_gradient", Penalty("k2", "loss", "token_detached")),
    "skyrl": ("SkyRL 0.3, KL loss (its default)", Penalty("k3", "loss")),
    "skyrl-reward": ("SkyRL 0.3, KL in the reward with its default estimator", Penalty("k3", "reward")),
    "slime": ("slime, KL loss with its default estimator", Penalty("k1", "loss")),
    "slime-unbiased": ("slime, use-unbiased-kl", Penalty("k3", "loss", "token")),
    "nemo-rl": ("NeMo-RL (its default)", Penalty("k3", "loss", "token")),
    "open-instruct": ("open-instruct, kl_estimator 2 (its default)", Penalty("k3", "loss")),
    "open-instruct-3": ("open-instruct, kl_estimator 3", Penalty("k1", "loss", "token")),
    "prime-rl": ("prime-rl, ref_kl; tinker; slime's distillation", Penalty("k1", "advantage", "token")),
    "miles": ("full divergence detached as the token's own advantage (miles #2362)", Penalty("full", "advantage")),
}
"""What libraries do, by name: a description and the penalty, as read in their sources in 2026."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One penalty of :func:`table`.

    Attributes:
        preset: key of :data:`PRESETS`.
        on_policy: what it does on the policy's own strings.
        off_policy: what it does on strings of an older policy.
    """

    preset: str
    on_policy: GradientReport
    off_policy: GradientReport


def table() -> list[Row]:
    """Every preset, on the policy's own strings and on an older one's: those right on both first, then by their error.

    Takes some seconds: all strings of a small model are summed over for each.
    """
    seen: dict[Penalty, tuple[GradientReport, GradientReport]] = {}
    for _, penalty in PRESETS.values():
        if penalty not in seen:
            seen[penalty] = explain(penalty), explain(penalty, off_policy=True)
    rows = [Row(name, *seen[penalty]) for name, (_, penalty) in PRESETS.items()]

    def errors(row: Row) -> tuple[float, float]:
        on, off = (report.agreement["kl"].relative_error for report in (row.on_policy, row.off_policy))
        return round(on, 6), round(off, 6)

    return sorted(rows, key=errors)


def customised(preset: str, **changes: object) -> Penalty:
    """The penalty of ``preset`` with other parts.

    Raises:
        ValueError: no such preset, or parts that do not go together.
    """
    return replace(described(preset)[1], **changes)  # type: ignore[arg-type]


def described(preset: str) -> tuple[str, Penalty]:
    """What ``preset`` is, in words and as a penalty.

    Raises:
        ValueError: no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"expected a preset among {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS[preset]
