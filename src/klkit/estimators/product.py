"""The chain that two automata walk through together: every exact answer is an expectation along it.

Both read the same string, so the pair of their states is a Markov chain under p (C. Cortes,
M. Mohri, A. Rastogi, M. Riley, 2008). Only pairs that strings of p can reach are built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.models.automaton import Automaton, can_end
from klkit.models.base import LanguageModel, NotTractable, VocabularyMismatch
from klkit.models.wrap import as_automaton
from klkit.numerics import excess
from klkit.sequences import Content

LARGEST_SYSTEM = 8000


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """The chain of state pairs that strings of ``p`` walk through; pair 0 is the start.

    Attributes:
        states: the two automata's states in each pair, ``(s, 2)``.
        p: probability of each token under ``p``, ``(s, v)``.
        after: the pair that each token leads to, ``(s, v)``, meaningful where ``moves``.
        moves: tokens of positive probability that do not end the string, ``(s, v)``.
        ratio: ``log p(a) − log q(a)`` where ``p(a) > 0`` and ``q(a) > 0``, else 0, ``(s, v)``.
        kl: divergence of the decision, ``(s,)``, where finite.
        surprisal: ``−log p(a)`` where ``p(a) > 0``, else 0, ``(s, v)``.
        infinite: whether ``q`` excludes a token of ``p`` in a pair that is reached.
    """

    states: Int[Tensor, "s 2"]
    p: Float[Tensor, "s v"]
    after: Int[Tensor, "s v"]
    moves: Bool[Tensor, "s v"]
    ratio: Float[Tensor, "s v"]
    kl: Float[Tensor, " s"]
    surprisal: Float[Tensor, "s v"]
    infinite: bool

    def matrix(self) -> Tensor:
        """``M``: probability of moving from pair to pair without ending, sparse ``(s, s)``."""
        s = len(self.p)
        source, _ = self.moves.nonzero(as_tuple=True)
        index = torch.stack([source, self.after[self.moves]])
        return torch.sparse_coo_tensor(index, self.p[self.moves], (s, s), check_invariants=False).coalesce()


def couple(p: LanguageModel, q: LanguageModel, *, prompt: Content | None, max_tokens: int | None) -> Product:
    """Pair the states that two automata reach on the same strings, those of ``p`` after ``prompt``.

    Raises:
        NotTractable: a model is not an automaton.
        VocabularyMismatch: the automata do not choose from the same tokens.
        ValueError: strings of ``p`` may never end and there is no length limit.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"expected max_tokens of at least 1, got {max_tokens}; pass None for whole strings")
    mine, theirs = as_automaton(p), as_automaton(q)
    if p.vocabulary.fingerprint != q.vocabulary.fingerprint or p.vocabulary.ends != q.vocabulary.ends:
        raise VocabularyMismatch(
            f"expected two automata over the same tokens and ends, got {p.vocabulary.tokens[:8]} with ends "
            f"{p.vocabulary.ends} and {q.vocabulary.tokens[:8]} with ends {q.vocabulary.ends}; share one alphabet"
        )
    chain = _reach(mine, theirs, p.context(prompt), q.context(prompt), max_tokens)
    if max_tokens is None and not bool(can_end(chain.p, chain.after, torch.tensor(mine.vocabulary.ends)).all()):
        raise ValueError(
            f"expected strings of {p.name} to end with probability one, got a state they cannot leave for an end "
            f"token; pass max_tokens to compare strings cut at a length limit"
        )
    return chain


def _reach(p: Automaton, q: Automaton, context_p: Tensor, context_q: Tensor, max_tokens: int | None) -> Product:
    possible = p.log_probabilities > -torch.inf
    possible[:, list(p.vocabulary.ends)] = False
    width = q.states
    frontier = p.begin([context_p])[0] * width + q.begin([context_q])[0]
    found = frontier
    depth = 1
    while len(frontier) and (max_tokens is None or depth < max_tokens):
        i, j = frontier // width, frontier % width
        reached = torch.unique((p.transitions[i] * width + q.transitions[j])[possible[i]])
        frontier = reached[~torch.isin(reached, found)]
        found = torch.cat([found, frontier])
        depth += 1
    i, j = found // width, found % width
    logp, logq = p.log_probabilities[i], q.log_probabilities[j]
    ordered, order = found.sort()
    place = torch.searchsorted(ordered, p.transitions[i] * width + q.transitions[j]).clamp(max=len(found) - 1)
    allowed, shared = logp > -torch.inf, (logp > -torch.inf) & (logq > -torch.inf)
    ratio = logp.where(shared, 0.0) - logq.where(shared, 0.0)
    prob = logp.exp()
    return Product(
        states=torch.stack([i, j], -1),
        p=prob,
        after=order[place],
        moves=possible[i],
        ratio=ratio,
        # p (e^d − 1 − d) with d = log q − log p, and q off p's support: no term is negative, and the
        # sum is Σ p (log p − log q) because both rows sum to one.
        kl=torch.where(allowed, prob * excess(-ratio), logq.exp()).sum(-1),
        surprisal=-logp.where(allowed, 0.0),
        infinite=bool((allowed & ~shared).any()),
    )


class LinearSystem:
    """``I − M``, factorised once; solutions are refined until they are accurate, or refused."""

    def __init__(self, chain: Product) -> None:
        size = len(chain.p)
        if size > LARGEST_SYSTEM:
            raise NotTractable(
                f"expected at most {LARGEST_SYSTEM} pairs of states, got {size}; pass max_tokens, which needs no "
                f"linear system"
            )
        self.chain = chain
        matrix = -chain.matrix().to_dense()
        # 1 − M_ss as the probability of leaving s: exact even where staying is nearly certain.
        stays = chain.moves & (chain.after == torch.arange(size)[:, None])
        matrix.diagonal().copy_((chain.p * ~stays).sum(-1))
        self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(matrix)

    def backward(self, f: Float[Tensor, "s c"]) -> Float[Tensor, "s c"]:
        """``(I − M)^-1 f``: expected sums from each pair on.

        Long strings make the system nearly singular, so solutions are refined with the residual
        ``f − end · V − Σ p(a) (V − V(after))``, which does not cancel when all values are large.
        """
        value: Tensor = torch.linalg.lu_solve(self.lu, self.pivots, f)
        end = (self.chain.p * ~self.chain.moves).sum(-1, keepdim=True)
        weight = self.chain.p * self.chain.moves
        for _ in range(20):
            away = torch.einsum("sa,sac->sc", weight, value[:, None] - value[self.chain.after])
            change = torch.linalg.lu_solve(self.lu, self.pivots, f - end * value - away)
            value = value + change
            if bool((change.abs().amax(0) <= 1e-13 * value.abs().amax(0)).all()):
                return value
        raise ArithmeticError(
            f"expected strings that end often enough for double precision, got a system of {len(f)} pairs of states "
            f"whose solution does not settle; pass max_tokens"
        )

    def visits(self) -> Float[Tensor, " s"]:
        """``(I − Mᵀ)^-1 e_0``: expected visits to each pair."""
        start = torch.zeros(len(self.lu), 1, dtype=torch.float64)
        start[0] = 1.0
        visits: Tensor = torch.linalg.lu_solve(self.lu, self.pivots, start, adjoint=True)[:, 0]
        return visits
