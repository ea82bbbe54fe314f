"""Deterministic probabilistic finite automata: language models whose divergences are exactly computable.

The state is the only thing such a model remembers of its prefix, so expectations over all strings,
infinitely many of them, are solutions of small linear systems (``klkit.estimators.exact``). That
makes an automaton the yardstick for everything that is otherwise only estimated.
"""

from __future__ import annotations

import hashlib
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.models.base import Vocabulary
from klkit.sequences import Content, Sequences

END = "<end>"


@dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic probabilistic finite automaton: ``p(a | prefix) = P[state(prefix), a]``.

    A trunk vector is the number of a state, and the read-out looks its row up. An end token leads
    back to the start, so a context may hold earlier, ended strings; the empty prompt is one end
    token. A text prompt is read symbol by symbol: single characters when every symbol is one
    character, else words at white space.

    Attributes:
        log_probabilities: log-probability of each token in each state, nats, ``(s, v)``.
        transitions: the state after each token, ``(s, v)``; also defined for impossible tokens,
            because a model must be able to read strings that another model wrote.
        vocabulary: symbols and end tokens.
        start: the state that strings start from.
        name: what reports call the model.
        tight: whether to insist that strings end with probability one. An automaton that is not
            tight still has exact answers for strings cut at a length limit.

    Raises:
        ValueError: a row does not normalise, a transition leads nowhere, or a string may never end.
    """

    log_probabilities: Float[Tensor, "s v"]
    transitions: Int[Tensor, "s v"]
    vocabulary: Vocabulary
    start: int = 0
    name: str = "automaton"
    tight: bool = True

    def __post_init__(self) -> None:
        rows, (states, size) = self.log_probabilities, self.log_probabilities.shape
        if self.transitions.shape != rows.shape or size != self.vocabulary.size or rows.dtype != torch.float64:
            raise ValueError(
                f"expected fp64 log-probabilities and transitions of shape (states, {self.vocabulary.size}), got "
                f"{rows.dtype} {tuple(rows.shape)} and {tuple(self.transitions.shape)}; give every state a row"
            )
        total = rows.exp().sum(-1)
        wrong = ~((total - 1).abs() < 1e-9)  # written so that NaN is wrong too
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"expected every state's probabilities to sum to 1, got {float(total[i])!r} in state {i}; "
                f"normalise the row, or pass log_softmax of its weights"
            )
        if not 0 <= self.start < states or int(self.transitions.min()) < 0 or int(self.transitions.max()) >= states:
            raise ValueError(
                f"expected states numbered 0..{states - 1}, got start {self.start} and transitions "
                f"{int(self.transitions.min())}..{int(self.transitions.max())}; name an existing state for every token"
            )
        back = torch.tensor(self.vocabulary.ends, dtype=torch.long)
        if not len(back) or bool((self.transitions[:, back] != self.start).any()):
            raise ValueError(
                f"expected at least one end token, leading back to the start state {self.start}, got ends "
                f"{self.vocabulary.ends}; set transitions[:, end] = start"
            )
        endless = ~can_end(rows.exp(), self.transitions, back)
        if self.tight and endless.any():
            raise ValueError(
                f"expected every string to end with probability one, got state {int(endless.nonzero()[0])} from which "
                f"no end token can be reached; give it a path to an end, or pass tight=False and use a length limit"
            )

    @property
    def window(self) -> None:
        """No limit: the state is all that is remembered."""
        return None

    @property
    def width(self) -> int:
        """One value, the number of the state."""
        return 1

    @property
    def dtype(self) -> torch.dtype:
        """Double precision."""
        return torch.float64

    @cached_property
    def digest(self) -> str:
        """What tells this automaton from others: a hash of its tables."""
        found = hashlib.sha256(f"{self.start}".encode())
        for table in (self.log_probabilities, self.transitions):
            found.update(table.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    @property
    def states(self) -> int:
        """Number of states."""
        return self.log_probabilities.shape[0]

    def context(self, prompt: Content | None) -> Int[Tensor, " c"]:
        """One end token, then the prompt's symbols; token ids are taken as they are.

        Raises:
            ValueError: the prompt holds a token that is not in the vocabulary, or is a conversation.
        """
        end, tokens = self.vocabulary.ends[0], self.vocabulary.tokens
        if isinstance(prompt, Tensor):
            if len(prompt) and not 0 <= int(prompt.min()) <= int(prompt.max()) < len(tokens):
                raise ValueError(
                    f"expected token ids in 0..{len(tokens) - 1}, got {prompt.tolist()}; encode the prompt with "
                    f"this model's vocabulary"
                )
            return prompt.long() if len(prompt) else torch.tensor([end])
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(
                f"expected a text or token ids, got a conversation of {len(prompt)} messages; an automaton has no "
                f"chat template, so join the messages into one text"
            )
        ids = {token: i for i, token in enumerate(tokens) if token is not None and i not in self.vocabulary.ends}
        split = list(prompt or "") if all(len(token) == 1 for token in ids) else (prompt or "").split()
        unknown = [symbol for symbol in split if symbol not in ids]
        if unknown:
            raise ValueError(
                f"expected symbols among {sorted(ids)[:20]}, got {unknown[0]!r} in the prompt {prompt!r}; "
                f"use the symbols that {self.name} was built with"
            )
        return torch.tensor([end, *(ids[symbol] for symbol in split)])

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The symbol of each token id."""
        return [self.vocabulary.tokens[i] or "" for i in tokens]

    def encode(self, x: Sequences) -> Float[Tensor, "m 1"]:
        """The state before each decision of given strings."""
        row, column = x.predictors()
        state = torch.full((len(x),), self.start)
        visited = torch.empty(len(x), x.tokens.shape[1], dtype=torch.long)
        end = self.vocabulary.ends[0]
        for i in range(x.tokens.shape[1]):
            # Whatever stands in the padding is not a token; it need not even be a valid id.
            state = self.transitions[state, x.tokens[:, i].where(i < x.stop, end)]
            visited[:, i] = state
        return trunk(visited[row, column])

    def readout(self, h: Float[Tensor, "m 1"]) -> Float[Tensor, "m v"]:
        """The row of log-probabilities of each state."""
        return self.log_probabilities[h[:, 0].long()]

    def begin(self, contexts: Sequence[Int[Tensor, " _c"]]) -> tuple[Int[Tensor, " b"], Float[Tensor, "b 1"]]:
        """Read contexts of any lengths: the states they lead to, as state and as trunk vector."""
        reached = []
        for context in contexts:
            state = self.start
            for token in context.tolist():
                state = int(self.transitions[state, token])
            reached.append(state)
        states = torch.tensor(reached, dtype=torch.long)
        return states, trunk(states)

    def advance(self, state: Int[Tensor, " b"], tokens: Int[Tensor, " b"]) -> tuple[Tensor, Float[Tensor, "b 1"]]:
        """The states after one more token."""
        after = self.transitions[state, tokens]
        return after, trunk(after)

    def select(self, state: Int[Tensor, " b"], rows: Int[Tensor, " k"]) -> Int[Tensor, " k"]:
        """The states of the given rows."""
        return state[rows]

    def embedding(self) -> Float[Tensor, "v v"]:
        """One indicator a token: with it a control variate can tell all tokens apart."""
        return torch.eye(self.vocabulary.size, dtype=torch.float64)


def trunk(states: Int[Tensor, " b"]) -> Float[Tensor, "b 1"]:
    """State numbers as trunk vectors of width one."""
    return states[:, None].double()


def can_end(probabilities: Float[Tensor, "s v"], transitions: Int[Tensor, "s v"], ends: Int[Tensor, " e"]) -> Tensor:
    """Whether an end token can be reached from each state, ``(s,)``.

    When it can from every state, the symbol-transition matrix has spectral radius below one.
    """
    moves = probabilities > 0
    done = moves[:, ends].any(-1)
    for _ in range(len(done)):
        wider = done | (moves & done[transitions]).any(-1)
        if bool((wider == done).all()):
            break
        done = wider
    return done


def automaton(
    probabilities: Float[Tensor, "s v"],
    successors: Int[Tensor, "s a"],
    *,
    symbols: Sequence[str] | None = None,
    name: str = "automaton",
) -> Automaton:
    """The automaton with these next-token probabilities, one end token last, starting in state 0.

    Args:
        probabilities: of each symbol and, in the last column, of ending, ``(s, a + 1)``.
        successors: the state after each symbol, ``(s, a)``.
        symbols: what the symbols are called; by default ``a``, ``b``, …

    Raises:
        ValueError: see :class:`Automaton`.

    Example:
        >>> import torch
        >>> table = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
        >>> p = automaton(table, torch.tensor([[0, 1], [0, 1]]))
        >>> p.states, p.vocabulary.tokens
        (2, ('a', 'b', '<end>'))
    """
    states, size = probabilities.shape
    names = tuple(default_symbols(size - 1) if symbols is None else symbols)
    if len(names) != size - 1 or len(set(names)) != len(names) or END in names:
        raise ValueError(
            f"expected {size - 1} different symbols beside {END!r}, got {names}; name one a column of the table"
        )
    return Automaton(
        log_probabilities=probabilities.double().log(),
        transitions=torch.cat([successors.long(), torch.zeros(states, 1, dtype=torch.long)], -1),
        vocabulary=Vocabulary((*names, END), (size - 1,)),
        name=name,
    )


def default_symbols(count: int) -> list[str]:
    """Letters while they last, then numbered symbols (words)."""
    return list(string.ascii_lowercase[:count]) if count <= 26 else [f"s{i}" for i in range(count)]


def memoryless(symbol_law: Sequence[float], *, end: float, name: str = "memoryless") -> Automaton:
    """Independent symbols: ``p(a) = (1 − end) · symbol_law[a]`` at every decision, until the end.

    Against another such model ``KL = k / end`` with ``k`` the divergence of one decision.

    Raises:
        ValueError: ``end`` is not in (0, 1], or the law does not sum to 1.

    Example:
        >>> memoryless([0.5, 0.5], end=0.2).log_probabilities.exp().tolist()
        [[0.4, 0.4, 0.2]]
    """
    if not 0 < end <= 1:
        raise ValueError(f"expected a probability of ending in (0, 1], got {end}; strings must be able to end")
    law = torch.tensor(symbol_law, dtype=torch.float64)
    probabilities = torch.cat([(1 - end) * law, torch.tensor([end], dtype=torch.float64)])
    return automaton(probabilities[None], torch.zeros(1, len(law), dtype=torch.long), name=name)


def coin(*, end: float, name: str | None = None) -> Automaton:
    """One symbol, repeated until a coin says stop: ``p(length = l) = (1 − end)^l · end``.

    The smallest model with strings of random length, on which Rao-Blackwellisation can lose.

    Example:
        >>> p = coin(end=0.5)
        >>> p.readout(p.begin([p.context(None)])[1]).exp().tolist()
        [[0.5, 0.5]]
    """
    return memoryless([1.0], end=end, name=name or f"coin({end:g})")


def finite(strings: Mapping[str, float], *, symbols: Sequence[str], name: str = "finite") -> Automaton:
    """The law over finitely many strings as a tree: one state a prefix.

    Strings are read character by character. A prefix of none of them leads to a state that ends.

    Raises:
        ValueError: probabilities are negative or do not sum to 1, or a symbol is not declared.

    Example:
        >>> p = finite({"ab": 0.5, "": 0.25, "b": 0.25}, symbols="ab")
        >>> p.readout(p.begin([p.context(None)])[1]).exp().tolist()
        [[0.5, 0.25, 0.25]]
    """
    if min(strings.values()) < 0 or not math.isclose(math.fsum(strings.values()), 1.0, rel_tol=1e-9):
        raise ValueError(
            f"expected non-negative probabilities that sum to 1, got a sum of {math.fsum(strings.values())!r} and a "
            f"minimum of {min(strings.values())!r}; normalise the law"
        )
    undeclared = {symbol for text in strings for symbol in text} - set(symbols)
    if undeclared:
        raise ValueError(f"expected strings over the symbols {list(symbols)}, got {sorted(undeclared)}; declare them")
    prefixes = {text[:i] for text, mass in strings.items() if mass > 0 for i in range(len(text) + 1)}
    number = {prefix: i for i, prefix in enumerate(sorted(prefixes))}  # the empty prefix first
    dead = len(prefixes)
    probabilities = torch.zeros(dead + 1, len(symbols) + 1, dtype=torch.float64)
    successors = torch.full((dead + 1, len(symbols)), dead)
    probabilities[dead, -1] = 1.0
    for prefix, i in number.items():
        mass = math.fsum(m for text, m in strings.items() if text.startswith(prefix))
        probabilities[i, -1] = strings.get(prefix, 0.0) / mass
        for a, symbol in enumerate(symbols):
            after = math.fsum(m for text, m in strings.items() if text.startswith(prefix + symbol))
            probabilities[i, a] = after / mass
            successors[i, a] = number.get(prefix + symbol, dead)
    return automaton(probabilities, successors, symbols=tuple(symbols), name=name)


def random_automaton(
    states: int, symbols: int, *, generator: torch.Generator, spread: float = 1.0, name: str = "random"
) -> Automaton:
    """An automaton with random transitions and normal logits of standard deviation ``spread``.

    All tokens are possible in all states, so any two of them have a finite divergence.

    Example:
        >>> from klkit import rng
        >>> random_automaton(3, 2, generator=rng.stream(0, "demo")).states
        3
    """
    logits = spread * torch.randn(states, symbols + 1, generator=generator, dtype=torch.float64)
    successors = torch.randint(states, (states, symbols), generator=generator)
    return automaton(logits.softmax(-1), successors, name=name)
