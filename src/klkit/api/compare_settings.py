"""The options of a comparison of many models, and those of each of its pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from klkit.api.settings import Settings
from klkit.caches.recording import HIDDEN, HYBRID, Recording
from klkit.caches.sizes import parse_size
from klkit.models.spec import candidate_spec

OWN = ("candidates", "both", "keep", "cache", "cache_limit")
KEEPS = (HIDDEN, HYBRID)
HYBRID_TOKENS, HYBRID_DRAWS = 256, 16
OF_PAIRS = ("divergence", "rtol", "halfwidth", "sampler", "shared_only", "bytes", "beam", "approximate")
"""Options of one pair that mean nothing to many: all candidates are scored on the same strings, in one direction."""


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """What a comparison does, resolved: enough to repeat it to the last digit.

    Attributes:
        common: options that all candidates share; its ``q`` is the first candidate.
        candidates: specifications of the models compared with ``p``: checkpoints, or what is done to ``p``
            (``"temperature=0.9"``, ``"peft=./adapter"``).
        both: also draw strings of every candidate, and measure ``KL(q‖p)`` on them.
        keep: what is kept of ``p``'s laws: ``hidden`` (the laws themselves), or ``hybrid`` (256 tokens, and 16 draws
            from the others: smaller for wide models, without bias, with more noise and fewer companions).
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
    keep: str = HIDDEN
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
        if self.keep not in KEEPS:
            raise ValueError(f"expected keep to be one of {', '.join(KEEPS)}, got {self.keep!r}; choose one of them")
        if self.cache_limit is not None:
            if self.cache is None:
                raise ValueError("expected a folder for --cache-limit, got no --cache; add --cache FOLDER")
            parse_size(self.cache_limit)
        twice = [name for name in self.candidates if self.candidates.count(name) > 1]
        if not self.candidates or twice:
            raise ValueError(
                f"expected at least one candidate, each once, got {twice[0] + ' twice' if twice else 'none'}; "
                f"as in: klkit compare klkit:docs klkit:docs-int8 klkit:docs-int4"
            )

    def recording(self, vocabulary: int) -> Recording:
        """How laws over so many tokens are recorded."""
        if self.keep == HIDDEN:
            return Recording()
        return Recording(HYBRID, k=min(HYBRID_TOKENS, vocabulary), draws=HYBRID_DRAWS, seed=self.common.seed)

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
        both = options.get("both", False)
        texts = {name: options[name] for name in ("keep", "cache", "cache_limit") if options.get(name) is not None}
        if not isinstance(both, bool) or not all(isinstance(value, str) for value in texts.values()):
            raise ValueError(
                f"expected true or false for both and text for {', '.join(texts)}, got {both!r} and {texts}"
            )
        return cls(Settings.from_mapping({**rest, "q": str(candidates[0])}), tuple(candidates), both, **texts)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, for config.yaml."""
        common = {name: value for name, value in self.common.to_dict().items() if name not in ("q", *OF_PAIRS)}
        return {"p": common.pop("p"), "candidates": list(self.candidates), **common} | {
            name: getattr(self, name) for name in OWN[1:]
        }
