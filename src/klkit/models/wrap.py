"""Every transformation of a model is a model: tempered, truncated, restricted, extended.

A transformation maps the read-out's rows and leaves the trunk alone, so it costs no forward pass,
composes with any other, and its divergence from any model is estimated, or computed exactly, by the
same code. This is also how one measures the law that a decoder *really* samples from.

A truncation is a threshold: where rounding moves two nearly equal tokens past each other, one batch
shape may keep another token than the next. In fp64, and so for automata, that does not happen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.divergences.linear import Head
from klkit.models.automaton import Automaton
from klkit.models.base import LanguageModel, Named, NotTractable, Vocabulary, head_of
from klkit.numerics import log_softmax, mass_slack
from klkit.sequences import Content, Sequences

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Transformed:
    """A model whose rows of log-probabilities are mapped: same trunk, other read-out.

    Attributes:
        base: the model that is transformed.
        rows: maps normalised rows ``(m, v)`` to normalised rows over ``vocabulary``, row by row.
        vocabulary: what the transformed model chooses from.
        name: the base's name and what was done to it.
        heads: the same map on the base's output head, where it leads to another head.
        what: what was done, in words that tell it from anything else; empty where the laws are the base's.
    """

    base: LanguageModel
    rows: Rows
    vocabulary: Vocabulary
    name: str
    heads: Callable[[Head], Head] | None = None
    what: str = ""

    @property
    def window(self) -> int | None:
        """The base's window."""
        return self.base.window

    @property
    def width(self) -> int:
        """The base's width."""
        return self.base.width

    @property
    def dtype(self) -> torch.dtype:
        """The base's precision."""
        return self.base.dtype

    def context(self, prompt: Content | None) -> Int[Tensor, " c"]:
        """What the base reads before it responds to ``prompt``."""
        return self.base.context(prompt)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token as text; an added one by the name it was given."""
        size = self.base.vocabulary.size
        return [self.base.pieces([i])[0] if i < size else self.vocabulary.tokens[i] or "" for i in tokens]

    def encode(self, x: Sequences) -> Float[Tensor, "m d"]:
        """The base's trunk vectors."""
        if self.vocabulary.size == self.base.vocabulary.size:
            return self.base.encode(x)
        column = torch.arange(x.tokens.shape[1])
        self._check(x.tokens[column < x.start[:, None]])
        tokens = self._readable(x.tokens.where(column < x.stop[:, None], 0))
        return self.base.encode(
            Sequences(tokens, x.start, x.stop, x.prompt, x.cluster, x.finished, sampler_logp=x.sampler_logp)
        )

    def readout(self, h: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        """The base's rows, mapped."""
        return self.rows(self.base.readout(h))

    def begin(self, contexts: Sequence[Int[Tensor, " _c"]]) -> tuple[Any, Float[Tensor, "b d"]]:
        """Read contexts with the base."""
        for context in contexts:
            self._check(context)
        return self.base.begin(contexts)

    def advance(self, state: Any, tokens: Int[Tensor, " b"]) -> tuple[Any, Float[Tensor, "b d"]]:
        """Append one token to every row."""
        return self.base.advance(state, self._readable(tokens))

    def select(self, state: Any, rows: Int[Tensor, " k"]) -> Any:
        """The base's state of the given rows."""
        return self.base.select(state, rows)

    def head(self) -> Head | None:
        """The base's output head, mapped, where it has one and the map leads to one."""
        base = head_of(self.base)
        return None if base is None or self.heads is None else self.heads(base)

    def embedding(self) -> Float[Tensor, "v e"] | None:
        """The base's vectors, and zeros for added tokens."""
        table = self.base.embedding()
        added = self.vocabulary.size - self.base.vocabulary.size
        return table if table is None else torch.nn.functional.pad(table, (0, 0, 0, added))

    def _check(self, context: Tensor) -> None:
        size = self.base.vocabulary.size
        if len(context) and int(context.max()) >= size:
            raise ValueError(
                f"expected contexts over the {size} tokens that {self.base.name} was trained on, got id "
                f"{int(context.max())}; leave added tokens out of the prompt"
            )

    def _readable(self, tokens: Tensor) -> Tensor:
        # A token that the base has no vector for is one this model excludes: the string's log-ratio
        # is infinite from there on, and what the base reads in its place cannot change that.
        return tokens.where(tokens < self.base.vocabulary.size, self.base.vocabulary.ends[0])


def _transformed(
    model: LanguageModel, rows: Rows, what: str, heads: Callable[[Head], Head] | None = None
) -> Transformed:
    return Transformed(
        base=model, rows=rows, vocabulary=model.vocabulary, name=f"{model.name}|{what}", heads=heads, what=what
    )


def _same(head: Head) -> Head:
    return head


def renamed(model: LanguageModel, name: str) -> Transformed:
    """The model under another name, sharing all it does.

    Example:
        >>> from klkit.models.automaton import coin
        >>> renamed(coin(end=0.5), "mine").name
        'mine'
    """
    return Transformed(base=model, rows=lambda logp: logp, vocabulary=model.vocabulary, name=name, heads=_same)


def transformations(model: Named) -> str:
    """What was done to the laws of the innermost model, in order, each after a bar; empty where nothing was.

    Example:
        >>> from klkit.models.automaton import coin
        >>> transformations(renamed(temperature(coin(end=0.5), 2.0), "mine"))
        '|temperature=2'
    """
    found: list[str] = []
    inner: Any = model
    while hasattr(inner, "base"):
        found.append(getattr(inner, "what", ""))
        inner = inner.base
    return "".join(f"|{what}" for what in reversed(found) if what)


def innermost(model: Named) -> Any:
    """The model under all transformations: what holds the weights.

    Example:
        >>> from klkit.models.automaton import coin
        >>> p = coin(end=0.5)
        >>> innermost(temperature(top_k(p, 1), 0.5)) is p
        True
    """
    inner: Any = model
    while hasattr(inner, "base"):
        inner = inner.base
    return inner


def model_digest(model: Named) -> str:
    """What tells one model's laws from another's: the digest of its weights, or its name, and what was done to it."""
    inner: Any = innermost(model)
    return str(getattr(inner, "digest", inner.name)) + transformations(model)


def temperature(model: LanguageModel, t: float) -> Transformed:
    """The model sampled at temperature ``t``: ``p_t(a) ∝ p(a)^(1/t)`` at every decision.

    Raises:
        ValueError: ``t`` is not positive and finite.

    Example:
        >>> from klkit.models.automaton import coin
        >>> p = temperature(coin(end=0.8), 0.5)
        >>> [round(x, 6) for x in p.readout(p.begin([p.context(None)])[1]).exp()[0].tolist()]
        [0.058824, 0.941176]
        >>> p.name
        'coin(0.8)|temperature=0.5'
    """
    if not 0 < t < float("inf"):
        raise ValueError(f"expected a positive finite temperature, got {t}; for greedy decoding use top_k(model, 1)")
    return _transformed(model, lambda logp: log_softmax(logp / t), f"temperature={t:g}", lambda head: head.cooled(t))


def top_k(model: LanguageModel, k: int) -> Transformed:
    """The model restricted, at every decision, to its ``k`` most probable tokens, renormalised.

    Exactly ``k`` tokens stay: of equally probable ones at the edge, those with the lowest ids.
    (Decoders that compare with the k-th largest score keep all of them.)

    Raises:
        ValueError: ``k`` is below 1.

    Example:
        >>> from klkit.models.automaton import memoryless
        >>> p = top_k(memoryless([0.5, 0.5], end=0.2), 2)
        >>> p.readout(p.begin([p.context(None)])[1]).exp().tolist()
        [[0.5, 0.5, 0.0]]
    """
    if k < 1:
        raise ValueError(f"expected k of at least 1, got {k}; one token must stay possible")

    def rows(logp: Tensor) -> Tensor:
        if k >= logp.shape[-1]:
            return logp
        edge = logp.topk(k, dim=-1).values[:, -1:]
        above, level = logp > edge, logp == edge
        keep = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
        return log_softmax(logp.masked_fill(~keep, -torch.inf))

    return _transformed(model, rows, f"top_k={k}")


def top_p(model: LanguageModel, p: float) -> Transformed:
    """The model restricted, at every decision, to its most probable tokens of total mass ``p``, renormalised.

    The smallest such set: tokens in order of probability (lower ids first among equals) stay as long
    as the mass before them is below ``p``. Nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751.

    Raises:
        ValueError: ``p`` is not in (0, 1].

    Example:
        >>> from klkit.models.automaton import memoryless
        >>> model = top_p(memoryless([0.75, 0.25], end=0.2), 0.7)
        >>> [round(x, 6) for x in model.readout(model.begin([model.context(None)])[1]).exp()[0].tolist()]
        [0.75, 0.25, 0.0]
    """
    if not 0 < p <= 1:
        raise ValueError(f"expected p in (0, 1], got {p}; p=1 keeps every token")

    def rows(logp: Tensor) -> Tensor:
        ordered, ids = logp.sort(dim=-1, descending=True, stable=True)
        mass = ordered.double().exp()
        slack = min(mass_slack(logp.dtype), p / 2)
        keep = torch.zeros_like(logp, dtype=torch.bool).scatter_(-1, ids, mass.cumsum(-1) - mass < p - slack)
        return log_softmax(logp.masked_fill(~keep, -torch.inf))

    return (
        _transformed(model, rows, f"top_p={p:g}") if p < 1 else _transformed(model, lambda logp: logp, "top_p=1", _same)
    )


def restrict(model: LanguageModel, allowed: Sequence[int]) -> Transformed:
    """The model restricted, at every decision, to the tokens ``allowed``, renormalised.

    Unless an end token is allowed, strings stop only at a length limit.

    Raises:
        ValueError: no id is allowed, or one is outside the vocabulary; when read out, a decision at
            which the model gives every allowed token probability zero.

    Example:
        >>> from klkit.models.automaton import memoryless
        >>> p = restrict(memoryless([0.25, 0.75], end=0.2), [1, 2])
        >>> [round(x, 6) for x in p.readout(p.begin([p.context(None)])[1]).exp()[0].tolist()]
        [0.0, 0.75, 0.25]
    """
    ids = sorted(set(allowed))
    size = model.vocabulary.size
    if not ids or ids[0] < 0 or ids[-1] >= size:
        raise ValueError(f"expected at least one token id in 0..{size - 1}, got {ids[:10]}; list the ids to keep")
    barred = torch.ones(size, dtype=torch.bool)
    barred[ids] = False

    def rows(logp: Tensor) -> Tensor:
        kept = logp.masked_fill(barred.to(logp.device), -torch.inf)
        if bool((kept == -torch.inf).all(-1).any()):
            raise ValueError(
                f"expected an allowed token to be possible at every decision, got one at which {model.name} gives all "
                f"{len(ids)} of them probability zero; allow more tokens"
            )
        return log_softmax(kept)

    # The first ids only, as where padding rows are left out, are a head with fewer rows.
    heads = (lambda head: head.cut(len(ids))) if ids[-1] == len(ids) - 1 else None
    named = _transformed(model, rows, f"restrict={len(ids)}", heads)
    # Which ids, not only how many: two restrictions are two laws.
    return replace(named, what=f"restrict={hashlib.sha256(repr(ids).encode()).hexdigest()[:8]}")


def extend(model: LanguageModel, size: int, tokens: Sequence[str | None] = ()) -> Transformed:
    """The model over a vocabulary of ``size`` ids: added ones are impossible, ``log p = −inf``.

    For pairs whose tables differ in padding rows or in tokens that were added later.

    Args:
        tokens: the strings of the added ids, where they have any.

    Raises:
        ValueError: ``size`` is below the model's own, or there are more names than added ids.

    Example:
        >>> from klkit.models.automaton import coin
        >>> p = extend(coin(end=0.5), 3)
        >>> p.readout(p.begin([p.context(None)])[1]).exp().tolist()
        [[0.5, 0.5, 0.0]]
    """
    own = model.vocabulary
    added = size - own.size
    if added < 0 or len(tokens) > added:
        raise ValueError(
            f"expected a size of at least {own.size + len(tokens)} ({own.size} tokens and {len(tokens)} new names), "
            f"got {size}; to leave tokens out use restrict"
        )
    names = (*own.tokens, *tokens, *[None] * (added - len(tokens)))
    return Transformed(
        base=model,
        rows=lambda logp: torch.nn.functional.pad(logp, (0, added), value=-torch.inf),
        vocabulary=Vocabulary(names, own.ends),
        name=f"{model.name}|extend={size}",
        what=f"extend={size}",
        heads=_same,  # what a head has no row for is excluded
    )


def as_automaton(model: LanguageModel) -> Automaton:
    """The automaton that ``model`` is: itself, or a transformed one with its read-out tabulated.

    Whether its strings must end is not checked here: a truncation may have removed the end token.

    Raises:
        NotTractable: the model is not an automaton under transformations of its read-out.

    Example:
        >>> from klkit.models.automaton import coin
        >>> as_automaton(temperature(coin(end=0.5), 2.0)).log_probabilities.exp().tolist()
        [[0.5, 0.5]]
    """
    if isinstance(model, Automaton):
        return model
    if not isinstance(model, Transformed):
        raise NotTractable(
            f"expected an automaton, possibly transformed, got {type(model).__name__} {model.name!r}, whose strings "
            f"have no exactly computable divergence; estimate it, or tabulate the model with klkit.models.automaton"
        )
    base = as_automaton(model.base)
    added = model.vocabulary.size - base.vocabulary.size
    return Automaton(
        log_probabilities=model.rows(base.log_probabilities),
        transitions=torch.nn.functional.pad(base.transitions, (0, added), value=base.start),
        vocabulary=model.vocabulary,
        start=base.start,
        name=model.name,
        tight=False,
    )
