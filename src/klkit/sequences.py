"""Prompts, and ragged strings held as flat completion tokens.

A *decision* is one token that a model had to choose: every completion token, the end token
included. Decisions are numbered flat, string by string, ``m`` in all; padding has no number and so
never reaches a divergence. The shift between a token and the row of log-probabilities that predicts
it happens in one place, :meth:`Sequences.predictors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Message = Mapping[str, object]
Content = str | Sequence[Message] | Tensor
"""One prompt: plain text, a conversation (list of role/content messages), or token ids."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the models are asked to continue.

    Attributes:
        contents: one entry a prompt: text, a conversation, or a 1-d tensor of token ids.
        groups: the group of each prompt (a category, a language, …), by which results are broken down; or None.
    """

    contents: tuple[Content, ...]
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.contents:
            raise ValueError("expected at least one prompt, got none; pass prompts=None to start from an empty context")
        if self.groups is not None and len(self.groups) != len(self.contents):
            raise ValueError(
                f"expected one group for each of {len(self.contents)} prompts, got {len(self.groups)}; "
                f"name the group of every prompt, or leave groups out"
            )

    def __len__(self) -> int:
        return len(self.contents)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Strings that were sampled or given: what samplers return and estimators read.

    Attributes:
        tokens: prompt then completion, right-padded, ``(n, l)``.
        start: where each completion begins, ``(n,)``; at least 1, since a model needs a context.
        stop: one past each completion's last token (the end token included), ``(n,)``.
        prompt: index of each string's prompt, ``(n,)``.
        cluster: index of the unit that is independent of the others, ``(n,)``: the prompt if there
            are several, else the string (or, for arithmetic sampling, the set of strings).
        finished: whether the string ended by itself rather than at the length limit, ``(n,)``.
        sampler_logp: log-probability of each decision under the law that drew it, ``(m,)``, when
            that law was not ``p`` itself (an older policy); else None.
    """

    tokens: Int[Tensor, "n l"]
    start: Int[Tensor, " n"]
    stop: Int[Tensor, " n"]
    prompt: Int[Tensor, " n"]
    cluster: Int[Tensor, " n"]
    finished: Bool[Tensor, " n"]
    sampler_logp: Float[Tensor, " m"] | None = None

    def __post_init__(self) -> None:
        n, width = self.tokens.shape
        if n and (int(self.start.min()) < 1 or int(self.stop.max()) > width or bool((self.stop < self.start).any())):
            raise ValueError(
                f"expected 1 <= start <= stop <= {width} for every string, got start from {int(self.start.min())} "
                f"and stop up to {int(self.stop.max())}; every string needs at least one context token"
            )
        if self.sampler_logp is not None and len(self.sampler_logp) != self.decisions:
            raise ValueError(
                f"expected one sampler log-probability for each of {self.decisions} decisions, "
                f"got {len(self.sampler_logp)}; end tokens count, padding does not"
            )

    @classmethod
    def pack(
        cls,
        contexts: Sequence[Int[Tensor, " _c"]],
        completions: Sequence[Int[Tensor, " _t"]],
        *,
        prompt: Sequence[int] | None = None,
        cluster: Sequence[int] | None = None,
        finished: Sequence[bool] | None = None,
    ) -> Sequences:
        """Lay out one context and one completion a string in a padded block.

        Without ``prompt`` each string is its own prompt; without ``cluster`` the cluster is the
        prompt; without ``finished`` every string counts as finished.

        Example:
            >>> import torch
            >>> x = Sequences.pack([torch.tensor([5])], [torch.tensor([1, 2, 0])])
            >>> x.tokens.tolist(), x.lengths.tolist()
            ([[5, 1, 2, 0]], [3])
        """
        n = len(contexts)
        if len(completions) != n:
            raise ValueError(f"expected one completion for each of {n} contexts, got {len(completions)}")
        start = torch.tensor([len(c) for c in contexts], dtype=torch.long)
        stop = start + torch.tensor([len(c) for c in completions], dtype=torch.long)
        tokens = torch.zeros(n, int(stop.max()) if n else 0, dtype=torch.long)
        for i, (context, completion) in enumerate(zip(contexts, completions, strict=True)):
            tokens[i, : start[i]] = context
            tokens[i, start[i] : stop[i]] = completion
        ids = torch.arange(n) if prompt is None else torch.as_tensor(prompt, dtype=torch.long)
        return cls(
            tokens=tokens,
            start=start,
            stop=stop,
            prompt=ids,
            cluster=ids if cluster is None else torch.as_tensor(cluster, dtype=torch.long),
            finished=torch.ones(n, dtype=torch.bool)
            if finished is None
            else torch.as_tensor(finished, dtype=torch.bool),
        )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def lengths(self) -> Int[Tensor, " n"]:
        """Decisions in each string."""
        return self.stop - self.start

    @property
    def decisions(self) -> int:
        """Decisions in all strings together: ``m``."""
        return int(self.lengths.sum())

    def row(self) -> Int[Tensor, " m"]:
        """The string that each decision belongs to."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)

    def position(self) -> Int[Tensor, " m"]:
        """The place of each decision in its completion, from 0."""
        lengths = self.lengths
        offset = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        return torch.arange(len(offset)) - offset

    def targets(self) -> Int[Tensor, " m"]:
        """The token chosen at each decision."""
        row = self.row()
        return self.tokens[row, self.start[row] + self.position()]

    def predictors(self) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
        """(row, column) of the token whose output predicts each decision: the one just before it."""
        row = self.row()
        return row, self.start[row] + self.position() - 1

    def context(self, i: int) -> Int[Tensor, " c"]:
        """The context of string ``i``."""
        return self.tokens[i, : int(self.start[i])]

    def completion(self, i: int) -> Int[Tensor, " t"]:
        """The completion of string ``i``."""
        return self.tokens[i, int(self.start[i]) : int(self.stop[i])]

    def select(self, rows: Sequence[int] | Int[Tensor, " k"]) -> Sequences:
        """The strings ``rows``, in that order, without padding columns that none of them needs."""
        keep = torch.as_tensor(rows, dtype=torch.long)
        stop = self.stop[keep]
        logp = None
        if self.sampler_logp is not None:
            parts = torch.split(self.sampler_logp, self.lengths.tolist())
            logp = torch.cat([parts[i] for i in keep.tolist()]) if len(keep) else self.sampler_logp[:0]
        return Sequences(
            tokens=self.tokens[keep, : int(stop.max()) if len(keep) else 0],
            start=self.start[keep],
            stop=stop,
            prompt=self.prompt[keep],
            cluster=self.cluster[keep],
            finished=self.finished[keep],
            sampler_logp=logp,
        )

    def after(self, contexts: Sequence[Int[Tensor, " _c"]]) -> Sequences:
        """The same completions behind other contexts (one a string): another model's chat template.

        Raises:
            ValueError: the number of contexts is not the number of strings.
        """
        if len(contexts) != len(self):
            raise ValueError(f"expected one context for each of {len(self)} strings, got {len(contexts)}")
        packed = Sequences.pack(list(contexts), [self.completion(i) for i in range(len(self))])
        return replace(self, tokens=packed.tokens, start=packed.start, stop=packed.stop)

    @staticmethod
    def cat(parts: Sequence[Sequences]) -> Sequences:
        """Concatenate strings; rows of different widths are padded to the widest."""
        width = max(part.tokens.shape[1] for part in parts)
        pad = [torch.nn.functional.pad(part.tokens, (0, width - part.tokens.shape[1])) for part in parts]
        logps = [part.sampler_logp for part in parts if part.sampler_logp is not None]
        if logps and len(logps) != len(parts):
            raise ValueError("expected sampler log-probabilities on all parts or on none, got a mixture")
        rest = {
            f.name: torch.cat([getattr(part, f.name) for part in parts])
            for f in fields(Sequences)
            if f.name not in ("tokens", "sampler_logp")
        }
        return Sequences(tokens=torch.cat(pad), sampler_logp=torch.cat(logps) if logps else None, **rest)


def predicted(
    labels: Int[Tensor, "n l"], *, ignore: int = -100
) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Int[Tensor, " m"]]:
    """(row, column, token) of every label that a causal model predicts: outputs at that column are for that token.

    For labels in the convention of transformers, where ``labels[i, t]`` stands at its own token's place: what predicts
    it is the output one column before. A label in column 0 is predicted by nothing.

    Args:
        labels: token ids, and ``ignore`` where none is wanted.
        ignore: what marks prompts and padding.

    Example:
        >>> import torch
        >>> row, column, token = predicted(torch.tensor([[-100, 7, 8], [-100, -100, 9]]))
        >>> row.tolist(), column.tolist(), token.tolist()
        ([0, 0, 1], [0, 1, 1], [7, 8, 9])
    """
    row, column = (labels[:, 1:] != ignore).nonzero().unbind(1)
    return row, column, labels[row, column + 1]
