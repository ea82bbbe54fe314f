"""The options of a run, by the names that the command line, the config file and Python share."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

METHODS = ("rb_cv", "rb", "mc", "k3_string", "cv_string", "k3_token", "ht")
DIVERGENCES = ("kl", "reverse_kl", "js", "jeffreys")
FLOORS = ("batch", "dtype", "noise", "none")
UNITS = ("nats", "bits")
KLKIT, VLLM = "klkit", "vllm"
SAMPLERS = (KLKIT, VLLM)
WHOLE_NUMBERS = ("samples", "max_tokens", "context", "seed", "beam")
NUMBERS = ("temperature", "rtol", "halfwidth")
ABSENT = ("prompts", "group_column", "text", "samples", "rtol", "halfwidth", "beam")  # options that may be None
NOT_APPROXIMATE = (
    "text", "context", "divergence", "method", "rtol", "halfwidth", "sampler", "floor", "token_js", "shared_only",
    "bytes", "beam", "group_column",
)  # fmt: skip
DEFAULT_STRINGS = 256  # when --samples is not given: enough strings for this many, at least one a prompt
MINIMUM_STRINGS = 64  # --rtol never stops before
DEFAULT_BEAM = 8  # hypotheses at each byte, when --beam is not given
CAP_STRINGS = 16384  # --rtol without --samples stops here at the latest


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run does, resolved: enough to repeat it to the last digit.

    Attributes:
        p: specification of the model that generates, e.g. ``"org/name@revision,dtype=float32"``.
        q: specification of the model compared with it.
        prompts: a file of prompts (txt, jsonl, csv, parquet), ``klkit:NAME``, or None for one empty prompt.
        column: which field of the prompt file holds the prompts.
        group_column: which field of the prompt file names the group of a prompt; None for ``group``, if there is one.
        text: a file of fixed text to score instead of sampling (estimand F), or None.
        context: window in tokens into which long documents of ``text`` are cut.
        divergence: ``kl``, ``reverse_kl`` (from q's samples), ``js`` or ``jeffreys`` (from both).
        method: estimator of the headline.
        samples: strings a prompt; None for as many as make 256 in all.
        max_tokens: longest response, in tokens; with ``bytes`` in bytes.
        temperature: softmax temperature of *both* models.
        dtype: precision of both models unless their specification says otherwise.
        device: where both models run.
        batch_size: strings a batch, or "auto".
        seed: names every random draw of the run.
        rtol: stop when the half-width of the 95 % interval is below this share of the estimate.
        halfwidth: the same for a half-width in nats, whatever ``unit`` is; not both.
        sampler: what draws the strings: ``klkit``, or ``vllm`` with any options of its engine, joined by commas.
        floor: how the numerical floor is measured: ``batch``, ``dtype``, ``noise`` or ``none``.
        token_js: also measure the Jensen-Shannon divergence of the next-token laws, per token.
        shared_only: compare conditionally on the tokens that both vocabularies have.
        bytes: compare the laws of texts, byte by byte, which needs no common tokenizer.
        beam: hypotheses about the tokens that are kept at each byte; None for 8.
        approximate: compare by one tokenisation of each text, which needs no common tokenizer and is no divergence.
        unit: ``nats`` or ``bits``, for printing.
    """

    p: str
    q: str
    prompts: str | None = None
    column: str = "prompt"
    group_column: str | None = None
    text: str | None = None
    context: int = 512
    divergence: str = "kl"
    method: str = "rb_cv"
    samples: int | None = None
    max_tokens: int = 128
    temperature: float = 1.0
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int | str = "auto"
    seed: int = 0
    rtol: float | None = None
    halfwidth: float | None = None
    sampler: str = KLKIT
    floor: str = "batch"
    token_js: bool = False
    shared_only: bool = False
    bytes: bool = False
    beam: int | None = None
    approximate: bool = False
    unit: str = "nats"

    def __post_init__(self) -> None:
        _choice("method", self.method, METHODS)
        _choice("divergence", self.divergence, DIVERGENCES)
        _choice("floor", self.floor, FLOORS)
        _choice("unit", self.unit, UNITS)
        _choice("sampler", self.sampler if self.sampler == KLKIT else self.sampler.partition(",")[0], SAMPLERS)
        for name in ("samples", "max_tokens", "context", "batch_size", "beam"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(
                    f"expected a whole number of at least 1 for {name}, got {value}; give a positive number"
                )
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ValueError(f"expected 'auto' or a whole number for batch_size, got {self.batch_size!r}; leave it out")
        if self.seed < 0:
            raise ValueError(f"expected a seed of at least 0, got {self.seed}; give a non-negative whole number")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"expected a finite temperature above 0, got {self.temperature}; at 0 a model is a point mass and "
                f"almost every divergence is infinite"
            )
        if self.rtol is not None and not 0 < self.rtol < 1:
            raise ValueError(f"expected rtol between 0 and 1, got {self.rtol}; 0.05 asks for ± 5 %")
        if self.halfwidth is not None and not 0 < self.halfwidth < math.inf:
            raise ValueError(f"expected a positive finite halfwidth, got {self.halfwidth}; 0.01 asks for ± 0.01 nats")
        if self.rtol is not None and self.halfwidth is not None:
            raise ValueError("expected rtol or halfwidth, got both; leave one out")
        self._check_combinations()

    @property
    def watched(self) -> bool:
        """Whether the interval is looked at on the way, and ends the run."""
        return self.rtol is not None or self.halfwidth is not None

    def _check_combinations(self) -> None:
        """Refuse options that the chosen quantity would have to ignore."""
        default = {f.name: f.default for f in fields(self)}

        def given(*names: str) -> list[str]:
            return [name for name in names if getattr(self, name) != default[name]]

        if self.text is None:
            idle, why = given("context"), "windows are cut from --text only"
            if self.prompts is None and not idle:
                idle, why = given("column"), "fields are read from the files of --prompts and --text"
        else:
            idle = given("prompts", "divergence", "rtol", "halfwidth", "samples", "max_tokens", "method", "sampler")
            idle += ["floor"] if self.floor in ("dtype", "noise") else []
            why = "with --text nothing is sampled: every token of the text is scored once, exactly"
        if self.divergence in ("js", "jeffreys"):
            idle += given("rtol", "halfwidth") + (["floor"] if self.floor in ("dtype", "noise") else [])
            idle += ["method"] if self.method not in ("rb", "rb_cv") else []
            why = f"{self.divergence} is put together from two runs of fixed size, by rb (jeffreys: also by rb_cv)"
        if self.sampler != KLKIT and not idle:
            idle = given("temperature", "shared_only", "bytes")
            idle += ["divergence"] if self.divergence in ("js", "jeffreys") else []
            why = "an engine draws from one model, as it is"
        if self.bytes and given("text", "shared_only"):
            idle, why = given("text", "shared_only"), "bytes compares sampled responses, over all 256 bytes"
        if self.beam is not None and not self.bytes:
            idle, why = ["beam"], "only the sums of bytes=True have a beam"
        if self.approximate:
            idle = given(*NOT_APPROXIMATE)
            why = "approximate=True reads sampled responses in one tokenisation each, which has no such choice"
        if self.group_column is not None and not idle:
            if self.prompts is None:
                idle, why = ["group_column"], "groups are read from the file of --prompts"
            elif self.divergence in ("js", "jeffreys"):
                idle, why = ["group_column"], f"{self.divergence} is not broken down"
        if idle:
            named = ", ".join(f"{name}={getattr(self, name)!r}" for name in idle)
            raise ValueError(
                f"expected only options that have an effect, got {named}, but {why}; "
                f"leave {'it' if len(idle) == 1 else 'them'} out"
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Settings:
        """Settings from a config file, refusing names it does not know.

        Raises:
            ValueError: an unknown or missing option, or a value of the wrong kind.
        """
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(sorted(known))}"
                raise ValueError(f"expected only known options in the config, got {name!r}; {hint}")
        missing = [name for name in ("p", "q") if not isinstance(options.get(name), str)]
        if missing:
            raise ValueError(
                f"expected the models 'p' and 'q' in the config, got no {' and no '.join(missing)}; add them"
            )
        return cls(**{name: _of_kind(name, value) for name, value in options.items()})

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, for config.yaml."""
        return asdict(self)


def _of_kind(name: str, value: Any) -> Any:
    """``value`` of option ``name`` if it is of the right kind; whole numbers stand for numbers too."""
    if value is None and name in ABSENT:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name in WHOLE_NUMBERS or (name == "batch_size" and not isinstance(value, str)):
        kind, fits = "a whole number", whole
    elif name in NUMBERS:
        kind, fits = "a number", whole or isinstance(value, float)
        value = float(value) if whole else value
    elif name in ("shared_only", "bytes", "approximate", "token_js"):
        kind, fits = "true or false", isinstance(value, bool)
    else:
        kind, fits = "text", isinstance(value, str)
    if not fits:
        hint = "put quotes around it" if kind == "text" else f"write {kind}"
        raise ValueError(f"expected {kind} for {name}, got {value!r}; {hint}")
    return value


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}; choose one of them")
