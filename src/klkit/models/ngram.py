"""n-gram language models as automata: real text, and still an exact answer to every question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from klkit.models.automaton import Automaton, automaton

Context = tuple[int, ...]


def ngram(
    texts: Sequence[str],
    order: int,
    *,
    smoothing: float = 1.0,
    words: bool = False,
    symbols: Sequence[str] | None = None,
    name: str | None = None,
) -> Automaton:
    """An n-gram model fitted to texts, with Dirichlet smoothing towards the next shorter context.

    ``p(a | c) = (count(c a) + λ p(a | c')) / (count(c) + λ)``, where ``c'`` is ``c`` without its oldest
    symbol and the empty context's own prior is uniform over symbols and the end token. Every symbol
    is possible everywhere. A context that was never seen says exactly what its longest seen suffix
    says, so that suffix is the state, and the automaton grows with the text, not with the alphabet.

    Args:
        texts: each one string, from its beginning to its end.
        order: symbols in an n-gram; the state holds ``order − 1``, beginning-of-string included.
        smoothing: ``λ``, in units of observations.
        words: take words at white space as symbols instead of characters.
        symbols: the alphabet, to share it between models; by default what the texts contain.

    Raises:
        ValueError: no text, an order below 1, ``λ`` not positive, or a symbol outside the alphabet.

    Source: D. MacKay and L. Peto, "A hierarchical Dirichlet language model", 1995.

    Example:
        >>> p = ngram(["abab", "ab"], 2, smoothing=0.5)
        >>> p.vocabulary.tokens, p.states
        (('a', 'b', '<end>'), 3)
    """
    sequences = [text.split() if words else list(text) for text in texts]
    alphabet = sorted({symbol for sequence in sequences for symbol in sequence}) if symbols is None else list(symbols)
    if not sequences or not alphabet or order < 1 or not smoothing > 0:
        raise ValueError(
            f"expected at least one text and symbol, an order of at least 1 and a positive smoothing, got "
            f"{len(sequences)} texts, {len(alphabet)} symbols, order {order} and smoothing {smoothing}"
        )
    number = {symbol: i for i, symbol in enumerate(alphabet)}
    unknown = sorted({symbol for sequence in sequences for symbol in sequence} - set(number))
    if unknown:
        raise ValueError(f"expected texts over the {len(alphabet)} symbols given, got {unknown[:10]}; add them")
    end = len(alphabet)
    begin = -1  # stands before a string, in contexts only
    counts: dict[Context, Counter[int]] = {(): Counter()}
    for sequence in sequences:
        ids = [begin, *(number[symbol] for symbol in sequence), end]
        for i in range(1, len(ids)):
            for length in range(min(order - 1, i) + 1):
                counts.setdefault(tuple(ids[i - length : i]), Counter())[ids[i]] += 1

    # Shorter contexts first, so that each finds the row it is smoothed towards.
    rows: dict[Context, torch.Tensor] = {}
    prior = torch.full((end + 1,), 1 / (end + 1), dtype=torch.float64)
    for context in sorted(counts, key=lambda c: (len(c), c)):
        seen = torch.zeros(end + 1, dtype=torch.float64)
        for token, count in counts[context].items():
            seen[token] = count
        shorter = rows[context[1:]] if context else prior
        rows[context] = (seen + smoothing * shorter) / (seen.sum() + smoothing)

    def state(history: Context) -> Context:
        history = history[max(0, len(history) - order + 1) :]
        while history not in rows:
            history = history[1:]
        return history

    start = state((begin,))
    # Only what strings can reach: state 0 is the start.
    place = {start: 0}
    successors: list[list[int]] = []
    for context in (queue := [start]):
        for token in range(end):
            after = state((*context, token))
            if after not in place:
                place[after] = len(place)
                queue.append(after)
        successors.append([place[state((*context, token))] for token in range(end)])
    return automaton(
        torch.stack([rows[context] for context in queue]),
        torch.tensor(successors),
        symbols=alphabet,
        name=name or f"{order}-gram",
    )
