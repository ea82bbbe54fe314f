"""Two models over one vocabulary: compared by token strings, or refused.

Tables of logits are padded to round sizes, fine-tuning adds tokens, and two tokenizers of one size
can be different ones. What is the same is checked by the strings, never by the size; what differs
harmlessly is brought to one vocabulary and said; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from klkit.models.base import LanguageModel, Vocabulary, VocabularyMismatch
from klkit.models.wrap import Transformed, extend, restrict
from klkit.sequences import Prompts

NEGLIGIBLE = 1e-6  # mass of unused rows below which they leave the softmax
PROBED_PROMPTS = 8


def align(
    p: LanguageModel, q: LanguageModel, prompts: Prompts | None = None, *, shared_only: bool = False
) -> tuple[LanguageModel, LanguageModel, tuple[str, ...]]:
    """Return ``(p, q)`` over one vocabulary with one set of end tokens, and notes on what that took.

    - Equal tables pass untouched.
    - Where table sizes differ, rows that no tokenizer defines leave both softmaxes if they carry less
      than 1e-6 of the mass at the first decision of the prompts; else they stay.
    - A token that only one model has gets probability zero under the other: harmless for ``KL(p‖q)``
      if it is ``q``'s, an infinite ``KL(p‖q)`` if it is ``p``'s.
    - If end tokens differ, responses end for both where they end for ``p``.

    Args:
        prompts: where the mass of unused rows is measured; without them, at the empty prompt.
        shared_only: condition both models, at every decision, on the tokens that both have. This is
            another quantity than the divergence of the models, and the notes say so.

    Raises:
        VocabularyMismatch: an id stands for different strings in the two models.

    Example:
        >>> from klkit.models.automaton import coin
        >>> p, q, notes = align(coin(end=0.5), coin(end=0.25))
        >>> notes
        ()
    """
    one, two = p.vocabulary, q.vocabulary
    if p is q or one == two:
        return p, q, ()
    _refuse_different_strings(p, q)
    notes: list[str] = []
    size = max(one.size, two.size)
    first, second = _padded(one, size), _padded(two, size)
    names = tuple(a if a is not None else b for a, b in zip(first, second, strict=True))
    shared = min(one.size, two.size)
    keep: list[int] | None = None
    if one.size != two.size:
        keep = _without_padding(p, q, names, prompts, notes)
        _note_added(p, q, names[shared:], shared, notes)
    one_sided = [i for i in range(shared) if (first[i] is None) != (second[i] is None)]
    if one_sided:
        notes.append(
            f"{len(one_sided)} ids from {one_sided[0]} on are named by one tokenizer only, but both models have rows "
            f"for them: compared by id"
        )
    if shared_only and (one_sided or any(name is not None for name in names[shared:])):
        keep = [i for i in range(shared) if first[i] is not None and second[i] is not None]
        notes.append(f"conditional on the {len(keep)} tokens that both models have: not the divergence of the models")
    if set(one.ends) != set(two.ends):
        notes.append(
            f"end tokens differ ({_quoted(one, one.ends)} for {p.name}, {_quoted(two, two.ends)} for {q.name}): "
            f"responses end at those of {p.name}"
        )
    common = Vocabulary(names, one.ends)
    return _over(p, common, keep), _over(q, common, keep), tuple(notes)


def contexts(model: LanguageModel, prompts: Prompts | None) -> list[Int[Tensor, " _c"]]:
    """What ``model`` reads before it responds to each prompt, by its own template; one empty prompt without any.

    Example:
        >>> from klkit.models.automaton import coin
        >>> [c.tolist() for c in contexts(coin(end=0.5), None)]
        [[1]]
    """
    return [model.context(None)] if prompts is None else [model.context(content) for content in prompts.contents]


def context_note(own: Sequence[Tensor], other: Sequence[Tensor]) -> str | None:
    """A note if two models read different tokens before some responses, else None.

    Example:
        >>> import torch
        >>> context_note([torch.tensor([1])], [torch.tensor([1])]) is None
        True
    """
    differ = sum(not torch.equal(a, b) for a, b in zip(own, other, strict=True))
    if not differ:
        return None
    return (
        f"the models read different contexts for {differ} of {len(own)} prompts (each its own template): "
        f"the divergence is between their responses"
    )


def differing(p: Sequence[str | None], q: Sequence[str | None]) -> list[tuple[int, str, str]]:
    """Ids that stand for different strings in two vocabularies, with both: none where a comparison by tokens exists.

    Args:
        p, q: the string of each id, None where it has none.

    Example:
        >>> differing(("a", "b", None), ("a", "c", "d", "e"))
        [(1, 'b', 'c')]
    """
    pairs = zip(p, q, strict=False)
    return [(i, a, b) for i, (a, b) in enumerate(pairs) if a is not None and b is not None and a != b]


def _refuse_different_strings(p: LanguageModel, q: LanguageModel) -> None:
    wrong = differing(p.vocabulary.tokens, q.vocabulary.tokens)
    if not wrong:
        return
    listed = "; ".join(f"id {i} is {a!r} in {p.name} and {b!r} in {q.name}" for i, a, b in wrong[:3])
    permuted = {a for _, a, _ in wrong} == {b for _, _, b in wrong}
    raise VocabularyMismatch(
        f"expected two models over the same tokens, got {len(wrong)} ids with different strings"
        f"{' (the same strings in another order)' if permuted else ''}: {listed}; "
        f"a divergence between token choices needs one tokenizer, so compare models of one family, or the laws of "
        f"their texts: bytes=True, --bytes on the command line"
    )


def _without_padding(
    p: LanguageModel, q: LanguageModel, names: Sequence[str | None], prompts: Prompts | None, notes: list[str]
) -> list[int] | None:
    """Ids that some tokenizer defines, if the mass of the others is negligible; None to keep every row."""
    unused = [i for i, name in enumerate(names) if name is None]
    if not unused:
        return None
    masses = [_mass(model, [i for i in unused if i < model.vocabulary.size], prompts) for model in (p, q)]
    carried = f"they carry at most {masses[0]:.1e} of {p.name} and {masses[1]:.1e} of {q.name}"
    rows = f"{len(unused)} rows from {unused[0]} on are defined by no tokenizer"
    if max(masses) < NEGLIGIBLE:
        notes.append(f"{rows}: left out of both softmaxes ({carried})")
        return [i for i, name in enumerate(names) if name is not None]
    notes.append(f"{rows}: kept ({carried}); rows that one model lacks have probability zero there")
    return None


def _mass(model: LanguageModel, rows: Sequence[int], prompts: Prompts | None) -> float:
    """Largest probability of ``rows`` together, at the first decision of the first prompts."""
    if not rows:
        return 0.0
    some = None if prompts is None else Prompts(prompts.contents[:PROBED_PROMPTS])
    h = model.begin(contexts(model, some))[1]
    return float(torch.stack([model.readout(row[None])[0].exp()[list(rows)].double().sum() for row in h]).max())


def _note_added(p: LanguageModel, q: LanguageModel, added: Sequence[str | None], start: int, notes: list[str]) -> None:
    named = [name for name in added if name is not None]
    if not named:
        return
    what = f"{len(named)} tokens from {start} on, such as {named[0]!r}, exist in"
    if q.vocabulary.size > p.vocabulary.size:
        notes.append(
            f"{what} {q.name} only: probability zero under {p.name}; KL({p.name}‖{q.name}) counts what {q.name} spends "
            f"on them, the other direction is infinite"
        )
    else:
        notes.append(
            f"{what} {p.name} only: KL({p.name}‖{q.name}) is infinite wherever {p.name} gives them mass; "
            f"shared_only=True conditions on the shared tokens instead"
        )


def _over(model: LanguageModel, common: Vocabulary, keep: Sequence[int] | None) -> LanguageModel:
    """``model`` over the common vocabulary, under its own name."""
    if model.vocabulary == common and keep is None:
        return model
    size, wrapped = model.vocabulary.size, model
    if keep is not None:
        inside = [i for i in keep if i < size]
        if len(inside) < size:
            wrapped = restrict(wrapped, inside)
    if size < common.size:
        wrapped = extend(wrapped, common.size, common.tokens[size:])
    return Transformed(
        base=wrapped, rows=lambda logp: logp, vocabulary=common, name=model.name, heads=lambda head: head
    )


def _padded(vocabulary: Vocabulary, size: int) -> tuple[str | None, ...]:
    return (*vocabulary.tokens, *[None] * (size - vocabulary.size))


def _quoted(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    return ", ".join(repr(vocabulary.tokens[i] or i) for i in ids)
