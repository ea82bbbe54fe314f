"""klkit: the Kullback-Leibler divergence between language models, measured right.

The names below are the public surface; everything else is reached through its module. They are
imported on first use, so ``import klkit`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from klkit.api.prompts import read_prompts as read_prompts
    from klkit.api.runs import read_run as read_run
    from klkit.api.verbs import compare as compare
    from klkit.api.verbs import estimate as estimate
    from klkit.divergences.adaptive import adaptive_kl as adaptive_kl
    from klkit.divergences.f import total_variation as total_variation
    from klkit.divergences.kl import cross_entropy as cross_entropy
    from klkit.divergences.kl import entropy as entropy
    from klkit.divergences.kl import jeffreys as jeffreys
    from klkit.divergences.kl import kl as kl
    from klkit.divergences.kl import reverse_kl as reverse_kl
    from klkit.divergences.mixtures import jensen_shannon as jensen_shannon
    from klkit.estimators import ESTIMATORS as ESTIMATORS
    from klkit.estimators.audit import audit as audit
    from klkit.estimators.exact import exact as exact
    from klkit.estimators.statistics import TokenStatistics as TokenStatistics
    from klkit.estimators.statistics import score as score
    from klkit.models.align import align as align
    from klkit.models.base import LanguageModel as LanguageModel
    from klkit.models.base import NotTractable as NotTractable
    from klkit.models.base import Vocabulary as Vocabulary
    from klkit.models.base import VocabularyMismatch as VocabularyMismatch
    from klkit.models.laws import check_laws as check_laws
    from klkit.models.spec import load as load
    from klkit.objectives.distill import distillation_loss as distillation_loss
    from klkit.objectives.forward import forward_kl_surrogate as forward_kl_surrogate
    from klkit.objectives.gradient_check import check_gradient as check_gradient
    from klkit.objectives.policy import kl_surrogate as kl_surrogate
    from klkit.objectives.policy_linear import linear_kl_surrogate as linear_kl_surrogate
    from klkit.ranking import Ranking as Ranking
    from klkit.results import Comparison as Comparison
    from klkit.results import Estimate as Estimate
    from klkit.sampling.ancestral import sample as sample
    from klkit.sequences import Prompts as Prompts
    from klkit.sequences import Sequences as Sequences

_HOME = {
    "estimate": "api.verbs",
    "compare": "api.verbs",
    "read_prompts": "api.prompts",
    "read_run": "api.runs",
    "load": "models.spec",
    "align": "models.align",
    "check_laws": "models.laws",
    "sample": "sampling.ancestral",
    "score": "estimators.statistics",
    "exact": "estimators.exact",
    "audit": "estimators.audit",
    "ESTIMATORS": "estimators",
    "kl": "divergences.kl",
    "reverse_kl": "divergences.kl",
    "jeffreys": "divergences.kl",
    "entropy": "divergences.kl",
    "cross_entropy": "divergences.kl",
    "adaptive_kl": "divergences.adaptive",
    "jensen_shannon": "divergences.mixtures",
    "total_variation": "divergences.f",
    "kl_surrogate": "objectives.policy",
    "forward_kl_surrogate": "objectives.forward",
    "linear_kl_surrogate": "objectives.policy_linear",
    "distillation_loss": "objectives.distill",
    "check_gradient": "objectives.gradient_check",
    "Prompts": "sequences",
    "Sequences": "sequences",
    "TokenStatistics": "estimators.statistics",
    "Estimate": "results",
    "Comparison": "results",
    "Ranking": "ranking",
    "LanguageModel": "models.base",
    "Vocabulary": "models.base",
    "VocabularyMismatch": "models.base",
    "NotTractable": "models.base",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"klkit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'klkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
