"""The options of a comparison of many models, and those of each of its pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from klkit.api.settings import Settings
from klkit.models.spec import candidate_spec

OWN = ("candidates", "both", "cache", "cache_limit")
OF_PAIRS = ("divergence", "rtol", "halfwidth")
"""Options of one pair that mean nothing to many: all candidates are scored on the same strings, in one direction."""


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """What a comparison does, resolved: enough to repeat it to the last digit.

    Attributes:
        common: options that all candidates share; its ``q`` is the first candidate.
        candidates: specifications of the models compared with ``p``: checkpoints, or what is done to ``p``
            (``"temperature=0.9"``, ``"peft=./adapter"``).
        both: also draw strings of every candidate, and measure ``KL(q‖p)`` on them.
        cache: folder in which what ``p`` says is kept for later comparisons, or None.
        cache_limit: what that folder may hold, such as ``"20GB"``; the least recently used goes first.

    Raises:
        ValueError: no candidate, one given twice, or an option that would be ignored.

    Example:
        >>> settings = CompareSettings.from_mapping({"p": "org/name", "candidates": ["org/other", "round=int8"]})
        >>> settings.pair(1).q
        'org/name,round=int8'
    """

    common: Settings
    candidates: tuple[str, ...]
    both: bool = False
    cache: str | None = None
    cache_limit: str | None = None

    def __post_init__(self) -> None:
        default = {f.name: f.default for f in fields(Settings)}
        idle = [name for name in OF_PAIRS if getattr(self.common, name, None) != default.get(name)]
        if idle:
            raise ValueError(
                f"expected options of a comparison of many models, got {', '.join(idle)}: every candidate is scored on "
                f"the same strings of p; use klkit estimate for one pair, or --both for the other direction"
            )
        if self.both and self.common.text is not None:
            raise ValueError(
                "expected --both where strings are sampled, got it with a fixed text, which neither model wrote; "
                "leave it out: KL(q‖p) at the same tokens is among the companions"
            )
        if self.cache_limit is not None and self.cache is None:
            raise ValueError("expected a folder for --cache-limit, got no --cache; add --cache FOLDER")
        twice = [name for name in self.candidates if self.candidates.count(name) > 1]
        if not self.candidates or twice:
            raise ValueError(
                f"expected at least one candidate, each once, got {twice[0] + ' twice' if twice else 'none'}; "
                f"as in: klkit compare klkit:docs klkit:docs-int8 klkit:docs-int4"
            )

    def pair(self, i: int) -> Settings:
        """The options of ``p`` against candidate ``i``: ``klkit run`` repeats that pair with them."""
        return replace(self.common, q=candidate_spec(self.common.p, self.candidates[i]))

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> CompareSettings:
        """Settings from a config file or from keywords, refusing names it does not know.

        Raises:
            ValueError: an unknown or missing option, or a value of the wrong kind.
        """
        rest = {name: value for name, value in options.items() if name not in OWN}
        candidates = options.get("candidates") or ()
        named = isinstance(candidates, list | tuple) and all(isinstance(name, str) for name in candidates)
        if not named or not candidates:
            raise ValueError(
                f"expected the candidates as a list of models, got {candidates!r}; as in: candidates: [org/a, org/b]"
            )
        if "q" in rest:
            raise ValueError(
                f"expected 'candidates' in a comparison of many models, got 'q': {rest['q']!r}; name it there"
            )
        both, cache, limit = options.get("both", False), options.get("cache"), options.get("cache_limit")
        if not isinstance(both, bool) or not all(value is None or isinstance(value, str) for value in (cache, limit)):
            raise ValueError(
                f"expected true or false for both and text for cache and cache_limit, got {both!r}, {cache!r} and "
                f"{limit!r}; mend the config"
            )
        return cls(Settings.from_mapping({**rest, "q": str(candidates[0])}), tuple(candidates), both, cache, limit)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, for config.yaml."""
        common = {name: value for name, value in self.common.to_dict().items() if name not in ("q", *OF_PAIRS)}
        return {"p": common.pop("p"), "candidates": list(self.candidates), **common} | {
            name: getattr(self, name) for name in OWN[1:]
        }
