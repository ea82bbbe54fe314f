"""TRL's trainers with klkit's divergences in them, and a monitor for any trainer.

    from klkit.integrations.trl import GRPOTrainer, RLOOTrainer  # in place of: from trl import ...
    from klkit.integrations.trl import DistillationTrainer, GKDTrainer

The first two are TRL's classes with :class:`klkit.integrations.trl.mixin.RaoBlackwellKL` in front: same arguments, same
configuration, and ``kl=KLTerm(...)`` for those who want another gradient. The others take ``loss="adaptive_kl"`` or any
other of :mod:`klkit.objectives.distill_losses`, see :mod:`klkit.integrations.trl.distillation`. They need TRL 1.15 or
newer, which is imported when they are first asked for. :class:`KLMonitorCallback` needs transformers only.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from klkit.integrations.trl.term import KLTerm

if TYPE_CHECKING:
    from klkit.integrations.trl.monitor import KLMonitorCallback as KLMonitorCallback

    DistillationTrainer: Any
    GKDTrainer: Any
    GRPOTrainer: Any
    RLOOTrainer: Any

OLDEST = (1, 15)
"""First version of TRL whose trainers score through the forward of the model."""

TRAINERS = {
    "GRPOTrainer": ("trl", "mixin", "RaoBlackwellKL"),
    "RLOOTrainer": ("trl", "mixin", "RaoBlackwellKL"),
    "DistillationTrainer": ("trl", "distillation", "OnPolicyDistillation"),
    "GKDTrainer": ("trl.experimental.gkd", "distillation", "GivenTextDistillation"),
}
"""Where each of TRL's trainers is, and what goes in front of it."""

__all__ = ["DistillationTrainer", "GKDTrainer", "GRPOTrainer", "KLMonitorCallback", "KLTerm", "RLOOTrainer"]


def __getattr__(name: str) -> Any:
    if name in TRAINERS:
        return trainer(name)
    if name == "KLMonitorCallback":
        return import_module("klkit.integrations.trl.monitor").KLMonitorCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def trainer(name: str) -> Any:
    """TRL's trainer class ``name`` with klkit's divergence in place of its own.

    Raises:
        ImportError: TRL is not installed, or too old.
    """
    require_trl()
    package, module, mixin = TRAINERS[name]
    front = getattr(import_module(f"klkit.integrations.trl.{module}"), mixin)
    stock = getattr(import_module(package), name)
    members = {"__module__": __name__, "__doc__": front.__doc__, "_tag_names": [*stock._tag_names, "klkit"]}
    return type(name, (front, stock), members)


def require_trl() -> None:
    """Check that TRL is there and new enough.

    Raises:
        ImportError: it is not.
    """
    needed = ".".join(map(str, OLDEST))
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError(
            f"expected TRL {needed} or newer, got none; install it with: pip install 'klkit[trl]'"
        ) from None
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST:
        raise ImportError(
            f"expected TRL {needed} or newer, whose trainers score through the model's forward, got {found}; upgrade "
            f"with: pip install -U 'klkit[trl]'"
        )
