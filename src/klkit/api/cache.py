"""``klkit cache`` for Python: what a teacher says about a file of examples, asked once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from klkit.caches.build import Built, Observer, build, size_of
from klkit.caches.cache import StaleCache, TeacherCache
from klkit.caches.recording import Recording
from klkit.caches.sizes import CacheSize
from klkit.caches.verify import Agreement, compare
from klkit.models.spec import load_network
from klkit.train.examples import Example, encode_examples, read_examples, without_empty


@dataclass(frozen=True, slots=True)
class CacheOrder:
    """What a cache is to be built of.

    Attributes:
        teacher: specification of the model.
        data: file of examples.
        recording: what is kept of its laws.
        max_tokens: longest response, as in the run that will read the cache.
        prompt_column: field that holds the prompts.
        response_column: field that holds the responses.
        skip_empty: leave out examples without a response; else they are an error.
        batch: strings the teacher reads at a time; does not change what is kept.
        device: where the teacher runs.
        most_bytes: refuse to write more.
    """

    teacher: str
    data: str
    recording: Recording = field(default_factory=Recording)
    max_tokens: int = 256
    prompt_column: str = "prompt"
    response_column: str = "response"
    skip_empty: bool = False
    batch: int = 16
    device: str = "cpu"
    most_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}; raise it")


def build_cache(
    order: CacheOrder,
    out: str | Path,
    *,
    announce: Callable[[CacheSize], None] | None = None,
    observe: Observer | None = None,
) -> Built:
    """Ask the teacher once about every example and keep what it says; go on where an earlier call stopped.

    Args:
        out: folder of the cache.
        announce: called with the bytes that it will take, before anything is written.
        observe: called with decisions done and in all.

    Raises:
        ValueError: the model, the file or an option cannot be used, or there is no room.

    Example:
        >>> import json, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data = Path(folder) / "data.jsonl"
        ...     _ = data.write_text(json.dumps({"prompt": "a film", "response": " that works"}))
        ...     built = build_cache(CacheOrder("klkit:reviews", str(data)), Path(folder) / "cache")
        ...     built.cache.kind, len(built.cache), built.fresh
        ('hidden', 1, 1)
    """
    examples = _examples(order.data, order.prompt_column, order.response_column, order.skip_empty)
    teacher = load_network(order.teacher, **({} if order.device == "cpu" else {"device": order.device}))
    strings = encode_examples(teacher, examples, order.max_tokens)
    if announce is not None:
        announce(size_of(teacher, strings, order.recording))
    return build(
        out,
        teacher,
        strings,
        order.recording,
        max_tokens=order.max_tokens,
        batch=order.batch,
        most_bytes=order.most_bytes,
        observe=observe,
    )


@dataclass(frozen=True, slots=True)
class Inspection:
    """A cache looked at.

    Attributes:
        cache: the cache.
        agreement: with its teacher asked again; None without one.
        problem: why it is not what the teacher says about the data; None if it is, or nothing was given to compare.
    """

    cache: TeacherCache
    agreement: Agreement | None
    problem: str | None

    @property
    def sound(self) -> bool:
        """Whether nothing speaks against using it."""
        return self.problem is None and (self.agreement is None or self.agreement.holds)


def inspect_cache(
    path: str | Path,
    *,
    teacher: str | None = None,
    data: str | None = None,
    examples: int = 8,
    prompt_column: str = "prompt",
    response_column: str = "response",
    skip_empty: bool = False,
    device: str = "cpu",
) -> Inspection:
    """Read what a cache is; with its teacher, ask about some examples again; with the data, compare all of them.

    Args:
        path: its folder.
        teacher: specification of the model that it should be of.
        data: file of examples that it should be of.
        examples: how many are asked again.

    Raises:
        CacheError: there is no cache, or a file of it is missing or damaged.
        ValueError: data was named without a teacher, whose tokenizer reads it.
    """
    cache = TeacherCache.open(path)
    if teacher is None:
        if data is not None:
            raise ValueError("expected the teacher whose tokenizer reads the data, got none; add --teacher")
        return Inspection(cache, None, None)
    model = load_network(teacher, **({} if device == "cpu" else {"device": device}))
    limit = cache.manifest.data.max_tokens
    strings = None
    if data is not None:
        given = _examples(data, prompt_column, response_column, skip_empty)
        strings = encode_examples(model, given, limit or 1 << 40)
    try:
        cache.require(strings=strings, teacher=model, max_tokens=limit)
    except StaleCache as error:
        return Inspection(cache, None, str(error))
    return Inspection(cache, compare(cache, model, count=examples), None)


def _examples(data: str, prompt: str, response: str, skip_empty: bool) -> Sequence[Example]:
    examples: Sequence[Example] = read_examples(data, prompt=prompt, response=response)
    if skip_empty:
        examples = without_empty(examples)[0]
    if not examples:
        raise ValueError(f"expected an example with a response in {data}, got none; check the file")
    return examples
