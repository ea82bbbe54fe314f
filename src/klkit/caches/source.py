"""What a cache was made of: one model, and fixed strings. Whatever of this changes makes it stale."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from klkit.models.base import LanguageModel, Vocabulary
from klkit.models.token_bytes import tokenizer_of
from klkit.models.wrap import model_digest
from klkit.sequences import Sequences


@dataclass(frozen=True, slots=True)
class Teacher:
    """A model, as far as its laws depend on it.

    Attributes:
        name: what reports call it; two names may mean one model.
        weights: digest of its weights, and what was done to its laws (a temperature, say).
        dtype: precision it computes in.
        tokens: digest of the strings of its tokens, padding rows left out.
        size: rows of its table.
        ends: ids that end a response.
        template: digest of its chat template; None without one.
    """

    name: str
    weights: str
    dtype: str
    tokens: str
    size: int
    ends: tuple[int, ...]
    template: str | None

    @classmethod
    def of(cls, model: LanguageModel) -> Teacher:
        """The facts of ``model``.

        Example:
            >>> from klkit.models.automaton import coin
            >>> from klkit.models.wrap import temperature
            >>> Teacher.of(coin(end=0.5)).weights, Teacher.of(temperature(coin(end=0.5), 2.0)).weights
            ('5551fd78150384d5', '5551fd78150384d5|temperature=2')
        """
        template = getattr(tokenizer_of(model), "chat_template", None)
        return cls(
            name=model.name,
            weights=model_digest(model),
            dtype=str(model.dtype).removeprefix("torch."),
            tokens=token_digest(model.vocabulary),
            size=model.vocabulary.size,
            ends=tuple(model.vocabulary.ends),
            template=None if template is None else _digest(json.dumps(template, sort_keys=True)),
        )

    @classmethod
    def read(cls, record: dict[str, Any]) -> Teacher:
        """From its JSON form."""
        return cls(**{**record, "ends": tuple(record["ends"])})


@dataclass(frozen=True, slots=True)
class Data:
    """Strings, in order, as the model read them.

    Attributes:
        examples: how many.
        decisions: tokens of all responses, end tokens included.
        responses: digest of the responses' ids.
        contexts: digest of the ids in front of them: prompts, by the model's own template.
        max_tokens: longest string that was let through, where there was such a limit.
    """

    examples: int
    decisions: int
    responses: str
    contexts: str
    max_tokens: int | None

    @classmethod
    def of(cls, strings: Sequences, max_tokens: int | None = None) -> Data:
        """The facts of ``strings``.

        Example:
            >>> import torch
            >>> x = Sequences.pack([torch.tensor([5])] * 2, [torch.tensor([1, 0]), torch.tensor([0])])
            >>> y = x.select([1, 0])
            >>> Data.of(x).examples, Data.of(x).responses == Data.of(y).responses
            (2, False)
        """
        count = range(len(strings))
        return cls(
            examples=len(strings),
            decisions=strings.decisions,
            responses=ids_digest([strings.completion(i) for i in count]),
            contexts=ids_digest([strings.context(i) for i in count]),
            max_tokens=max_tokens,
        )


def teacher_changes(then: Teacher, now: Teacher) -> list[str]:
    """What differs between two models so that one's laws are not the other's, in words."""
    found = []
    if then.tokens != now.tokens:
        found.append(f"another tokenizer: tokens {then.tokens} of {then.name} then, {now.tokens} of {now.name} now")
    for label, name in (("other weights", "weights"), ("another precision", "dtype")):
        if getattr(then, name) != getattr(now, name):
            found.append(f"{label}: {getattr(then, name)} then, {getattr(now, name)} now ({now.name})")
    if set(then.ends) != set(now.ends):
        found.append(f"other end tokens: {list(then.ends)} then, {list(now.ends)} now")
    if then.template != now.template:
        found.append(f"another chat template: {then.template or 'none'} then, {now.template or 'none'} now")
    return found


def data_changes(before: Sequences, then: Data, strings: Sequences, now: Data) -> list[str]:
    """What differs between the strings of a cache and those at hand, in words; of the kinds people run into."""
    if (then.examples, then.responses, then.contexts) == (now.examples, now.responses, now.contexts):
        return []
    limits = ""
    if then.max_tokens and now.max_tokens and then.max_tokens != now.max_tokens:
        limits = f" (at most {then.max_tokens} tokens then, {now.max_tokens} now)"
    if then.examples != now.examples:
        return [f"other examples{limits}: {then.examples} of them then, {now.examples} now"]
    old, new = _each(before), _each(strings)
    if sorted(old) == sorted(new):
        return [f"the same {then.examples} examples in another order"]
    found = []
    for label, part in (("prompts, or another chat template", 0), ("responses", 1)):
        differing = [i for i in range(then.examples) if old[i][part] != new[i][part]]
        if differing:
            found.append(
                f"other {label}{limits if part else ''}: {len(differing)} of {then.examples} differ, the first is "
                f"example {differing[0] + 1}"
            )
    return found


def token_digest(vocabulary: Vocabulary) -> str:
    """Digest of what each id means, whatever padding rows a table has beyond the last token."""
    last = next((i for i in reversed(range(vocabulary.size)) if vocabulary.tokens[i] is not None), -1)
    return Vocabulary(vocabulary.tokens[: last + 1], vocabulary.ends).fingerprint


def ids_digest(parts: Sequence[Tensor]) -> str:
    """Digest of ids, string by string, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.long().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _each(strings: Sequences) -> list[tuple[str, str]]:
    return [(ids_digest([strings.context(i)]), ids_digest([strings.completion(i)])) for i in range(len(strings))]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def record(facts: Teacher | Data) -> dict[str, Any]:
    """The JSON form."""
    return json.loads(json.dumps(asdict(facts)))  # type: ignore[no-any-return]
