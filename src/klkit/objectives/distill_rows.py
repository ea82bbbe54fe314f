"""What each decision adds to a distillation loss, from the student's logits and whatever is known of the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.divergences.differentiable import Divergences, divergences
from klkit.divergences.kl import kl, reverse_kl
from klkit.divergences.linear_loss import Weights
from klkit.divergences.partial import Hidden, Logits, Sampled, TopK, bucketed, head_bracket, sampled_cross_entropy
from klkit.numerics import log_softmax, wide_dtype
from klkit.objectives.distill_losses import TokenLoss

Teacher = Logits | Hidden | TopK | Sampled


@dataclass(frozen=True, eq=False, slots=True)
class RowForm:
    """From rows of the student's logits to what each adds to the loss, and to what it is made of.

    A function for :func:`klkit.divergences.linear_rows.linear_rows`. The numbers of a row are divergence, KL, reverse
    KL, head weight, its least and greatest value, and cross-entropy; NaN where one is not known or not wanted.

    Attributes:
        teacher: what is known of it at all decisions; None for the cross-entropy alone.
        tokens: the text's, or None.
        loss: the divergence.
        divergence_weight: factor of each decision's divergence, ``(m,)``.
        text_weight: factor of its cross-entropy, ``(m,)``.
        temperature: of both laws in the divergence.
        backend: kernels for what is fused.
    """

    teacher: Teacher | None
    tokens: Int[Tensor, " m"] | None
    loss: TokenLoss
    divergence_weight: Float[Tensor, " m"]
    text_weight: Float[Tensor, " m"]
    temperature: float = 1.0
    backend: str | None = None

    def __call__(self, logits: Float[Tensor, "c v"], rows: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Contributions, ``(c,)``, differentiable in ``logits``, and seven numbers, ``(c,)`` each."""
        unknown = torch.full(logits.shape[:1], torch.nan, dtype=wide_dtype(logits), device=logits.device)
        tokens = None if self.tokens is None else self.tokens[rows]
        found, logq = None, None
        if isinstance(self.teacher, (Logits, Hidden)) and self.loss.fused is not None:
            found = self._visit(self.teacher, logits, tokens, rows)
        elif self.teacher is None or self.temperature == 1:
            logq = log_softmax(logits)
        if tokens is None:
            text = unknown
        elif found is not None and found.logq is not None:
            text = -found.logq
        else:
            text = -(log_softmax(logits) if logq is None else logq).gather(-1, tokens[:, None])[:, 0]
        if self.teacher is None:
            return times(self.text_weight[rows], text), (*[unknown] * 6, text)
        if found is not None:
            assert self.loss.fused is not None
            head = unknown if found.head_weight is None else found.head_weight
            row: tuple[Tensor, ...]
            row = weighted(found, self.loss.fused(found)), found.kl, found.reverse_kl, head, unknown, unknown
        else:
            logq = log_softmax(cooled(logits, self.temperature)) if logq is None else logq
            if isinstance(self.teacher, Sampled):
                # Its entropy is not known, so this is no divergence to report, only one to descend.
                added = times(self.divergence_weight[rows], sampled_cross_entropy(self.teacher, logq, rows))
                return added + times(self.text_weight[rows], text), (*[unknown] * 6, text)
            form = self._bucketed if isinstance(self.teacher, TopK) else self._whole
            row = form(logq, rows)
        added = times(self.divergence_weight[rows], row[0]) + times(self.text_weight[rows], text)
        return added, (*row, text)

    def _visit(self, teacher: Logits | Hidden, logits: Tensor, tokens: Tensor | None, rows: slice) -> Divergences:
        """Everything that one visit to both models' logits gives."""
        t, loss = self.temperature, self.loss
        with torch.no_grad():
            ours = cooled(teacher.rows(rows), t)
        drawn = tokens if t == 1 else None
        return divergences(ours, cooled(logits, t), drawn, js=loss.mixed, head=loss.head, backend=self.backend)

    def _whole(self, logq: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """Any divergence of whole laws."""
        assert isinstance(self.teacher, (Logits, Hidden))
        with torch.no_grad():
            logp = log_softmax(cooled(self.teacher.rows(rows), self.temperature)).to(logq)
            both = kl(logp, logq), reverse_kl(logp, logq)
        return self.loss.rows(logp, logq), *both, *[torch.full_like(both[0], torch.nan)] * 3

    def _bucketed(self, logq: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """The divergence of the laws in which all tokens but the likeliest are one."""
        assert isinstance(self.teacher, TopK)
        logp, logq = bucketed(self.teacher, logq, rows)
        forward, reverse = kl(logp, logq), reverse_kl(logp, logq)
        if self.loss.head is None:
            return self.loss.rows(logp, logq), forward, reverse, *[torch.full_like(forward.detach(), torch.nan)] * 3
        found = head_bracket(logp, logq, mass=self.loss.head.mass, head=self.loss.head.rule)
        share = 1 - found.estimate if self.loss.swapped else found.estimate
        value = times(share, forward) + times(1 - share, reverse)
        return value, forward, reverse, found.estimate, found.least, found.greatest


def weighted(found: Divergences, weights: Weights) -> Float[Tensor, "*b"]:
    """``Σ w · quantity`` of each row, in the order of both tuples."""
    parts = [times(w, x) for w, x in zip(weights, found, strict=False) if w is not None and x is not None]
    return torch.stack(parts).sum(0)


def times(weight: Float[Tensor, "*b"], value: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """``weight · value``; a weight of 0 silences a value that is infinite or unknown, and its gradient."""
    return weight * torch.where(weight == 0, 0.0, value)


def cooled(logits: Float[Tensor, "c v"], temperature: float) -> Float[Tensor, "c v"]:
    """Logits over the temperature; the same tensor at 1."""
    return logits if temperature == 1 else logits / temperature
