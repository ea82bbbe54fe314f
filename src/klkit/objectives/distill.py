"""The one distillation loss: the same number and gradient from whatever is at hand of the two models.

Decisions come flat, one row each; where they are in padded strings, and which row predicts which token, is settled
before (:class:`klkit.sequences.Sequences`, :func:`predicted`). So nothing here has a mask or a shift to get wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.divergences.differentiable import Divergences
from klkit.divergences.linear_loss import Weights, linear_loss
from klkit.divergences.linear_rows import linear_rows
from klkit.divergences.partial import Hidden, Logits, Sampled, TopK, require_tokens
from klkit.numerics import wide_dtype
from klkit.objectives.distill_losses import CROSS_ENTROPY, TokenLoss, token_loss
from klkit.objectives.distill_rows import RowForm, Teacher, weighted

Student = Logits | Hidden


@dataclass(frozen=True, eq=False, slots=True)
class Distilled:
    """A distillation loss, and what it is made of, ``(m,)`` each and detached, in nats.

    Attributes:
        loss: the scalar to descend.
        divergence: the loss's divergence of each decision, at the temperature, without the factor ``T²``; what
            ``exactness`` says of it. NaN for a sampled teacher, whose entropy is not known.
        cross_entropy: ``−log q(y)`` of the tokens, at temperature 1; None without tokens.
        kl: ``KL(p‖q)``, at the temperature; a lower bound from a top-k teacher, None from a sampled one.
        reverse_kl: ``KL(q‖p)``, likewise.
        head_weight: share of ``Σ |p − q|`` in the head, where the loss is an adaptive KL: what it gives ``KL(p‖q)``, or
            with exchanged weights ``KL(q‖p)``.
        head_bounds: ``(m, 2)``, what that weight may be behind the bucket of a top-k teacher; None where it is known.
        count: sum of the decisions' weights.
        exactness: what the divergence is to that of the whole laws: ``"exact"``, ``"lower bound"``,
            ``"estimate"`` or ``"unbiased gradient"``.
    """

    loss: Float[Tensor, ""]
    divergence: Float[Tensor, " m"]
    cross_entropy: Float[Tensor, " m"] | None
    kl: Float[Tensor, " m"] | None
    reverse_kl: Float[Tensor, " m"] | None
    head_weight: Float[Tensor, " m"] | None
    head_bounds: Float[Tensor, "m 2"] | None
    count: float
    exactness: str


def distillation_loss(
    teacher: Teacher | None,
    student: Student,
    tokens: Int[Tensor, " m"] | None,
    loss: TokenLoss | str = "forward_kl",
    *,
    weight: Float[Tensor, " m"] | None = None,
    normaliser: float | None = None,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    rows: int | None = None,
    backend: str | None = None,
) -> Distilled:
    """``Σ w [(1 − c) T² D(p_T, q_T) − c log q(y)] / N`` over decisions, with ``p`` the teacher and ``q`` the student.

    Logits, hidden states with a head, or a cache of either: the kind of input changes what is held in memory, not the
    number. With hidden states on both sides, nothing of the size of all logits exists, and for the divergences that
    are sums of both KL directions or the Jensen-Shannon divergence, gradients come in closed form from the fused pass.
    A top-k teacher gives the divergence of the laws in which all other tokens are merged: a lower bound for every
    f-divergence. A sampled one is accepted for what is linear in ``p``.

    Shapes: ``m`` decisions; nats. Without decisions the loss is 0, and has a graph.

    Args:
        teacher: ``p``, of which no gradient is formed; None for the cross-entropy alone.
        student: ``q``.
        tokens: the text's token at each decision; None where no cross-entropy is wanted.
        loss: a divergence by name, see :func:`klkit.objectives.distill_losses.token_loss`.
        weight: ``w`` of each decision, by default 1; where it is 0, the divergence may be infinite.
        normaliser: ``N``, by default the sum of the weights. With gradient accumulation or several processes, the sum
            over all of them: a mean of means weighs tokens of short strings more.
        temperature: ``T`` of both laws in the divergence; the cross-entropy is at 1. The factor ``T²`` keeps the size
            of gradients (G. Hinton et al., 2015, arXiv 1503.02531).
        cross_entropy: ``c``, from 0 to 1.
        rows: decisions a chunk, where the student comes as hidden states.
        backend: as in :func:`klkit.divergences.linear_loss.linear_loss`.

    Raises:
        ValueError: what is given does not fit together, or a logit is not finite.

    Example:
        >>> z = torch.tensor([[0.0, 0.5, 1.0, -0.5, 0.3]], requires_grad=True)
        >>> p = Logits(torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]]).log())
        >>> found = distillation_loss(p, Logits(z), None, "adaptive_kl")
        >>> round(float(found.loss.detach()), 6), round(float(found.head_weight), 6)
        (0.342151, 0.475838)
        >>> found.loss.backward()
        >>> [round(x, 6) for x in z.grad[0].tolist()]
        [-0.227321, -0.11078, 0.213472, -0.031541, 0.156171]
    """
    loss = token_loss(loss) if isinstance(loss, str) else loss
    if loss.key == CROSS_ENTROPY:
        teacher, cross_entropy = None, 1.0
    require_fit(teacher, student, tokens, loss, weight, temperature, cross_entropy)
    values = student.logits if isinstance(student, Logits) else student.hidden
    dtype = wide_dtype(values)
    w = torch.ones(len(student), device=values.device) if weight is None else weight.detach()
    w = w.to(values.device, dtype)
    count = float(w.sum())
    total = count if normaliser is None else normaliser
    scale = 1 / total if total else 0.0  # without decisions there is nothing to divide
    tokens = None if tokens is None else tokens.to(values.device)
    form = RowForm(
        teacher=teacher,
        tokens=tokens,
        loss=loss,
        divergence_weight=w * ((1 - cross_entropy) * temperature**2 * scale),
        text_weight=w * (cross_entropy * scale),
        temperature=temperature,
        backend=backend,
    )
    try:
        value, table = _summed(teacher, student, form, rows)
    except ValueError as error:
        raise _blamed(error, teacher, student) from error
    divergence, forward, reverse, head, least, greatest, text = table
    whole = teacher is not None and not isinstance(teacher, Sampled)
    bracketed = isinstance(teacher, TopK) and loss.head is not None
    return Distilled(
        loss=value,
        divergence=divergence,
        cross_entropy=None if tokens is None else text,
        kl=forward if whole else None,
        reverse_kl=reverse if whole else None,
        head_weight=None if loss.head is None else head,
        head_bounds=torch.stack([least, greatest], 1) if bracketed else None,
        count=count,
        exactness=exactness(type(teacher), loss),
    )


def _summed(
    teacher: Teacher | None, student: Student, form: RowForm, rows: int | None
) -> tuple[Float[Tensor, ""], tuple[Float[Tensor, " m"], ...]]:
    """The loss, and the seven numbers a decision of :class:`klkit.objectives.distill_rows.RowForm`."""
    if isinstance(student, Logits):
        added, table = form(student.logits, slice(0, len(student)))
        return added.sum(), tuple(x.detach() for x in table)
    if isinstance(teacher, Hidden) and form.loss.fused is not None:
        return _fused(teacher, student, form, rows)
    return linear_rows(student.hidden, student.head, form, rows=rows)


def _blamed(error: ValueError, teacher: Teacher | None, student: Student) -> ValueError:
    """The error, with the name of the model whose numbers are none."""
    for name, law in (("teacher", teacher), ("student", student)):
        if isinstance(law, (Logits, Hidden)):
            values = law.logits if isinstance(law, Logits) else law.hidden
            bad = values.detach().isnan().any(-1).nonzero()
            if len(bad):
                return ValueError(
                    f"expected numbers from the {name}, got NaN at {len(bad)} of {len(values)} decisions, the first of "
                    f"them {int(bad[0])}; if its weights are in half precision, load it with dtype=float32"
                )
    return error


def _fused(
    teacher: Hidden, student: Hidden, form: RowForm, rows: int | None
) -> tuple[Float[Tensor, ""], tuple[Float[Tensor, " m"], ...]]:
    """What :func:`klkit.divergences.linear_rows.linear_rows` would give, from closed forms in one visit."""
    fused, temperature, tokens = form.loss.fused, form.temperature, form.tokens
    assert fused is not None
    tempered = temperature != 1
    ours, theirs = teacher.head.detach(), student.head
    if tempered:
        ours, theirs = ours.cooled(temperature), theirs.cooled(temperature)
    divergence = torch.zeros_like(form.divergence_weight)
    unknown = torch.full_like(divergence, torch.nan)

    def weigh(found: Divergences, at: slice) -> Weights:
        weights = fused(found)
        divergence[at] = weighted(found, weights)
        scaled = Weights(*(None if x is None else x * form.divergence_weight[at] for x in weights))
        return scaled if found.logq is None else scaled._replace(logq=-form.text_weight[at])

    value, found = linear_loss(
        teacher.hidden.detach(),
        ours,
        student.hidden,
        theirs,
        None if tempered else tokens,
        weigh,
        js=form.loss.mixed,
        head=form.loss.head,
        rows=rows,
        backend=form.backend,
    )
    text = unknown if found.logq is None else -found.logq
    if tempered and tokens is not None:
        # The text's cross-entropy is that of the law the student writes with.
        added, (*_, text) = linear_rows(student.hidden, student.head, replace(form, teacher=None), rows=rows)
        value = value + added
    head = unknown if found.head_weight is None else found.head_weight
    return value, (divergence, found.kl, found.reverse_kl, head, unknown, unknown, text)


def exactness(kind: type | None, loss: TokenLoss) -> str:
    """What the loss from a teacher of that kind is to that of its whole laws.

    Example:
        >>> exactness(TopK, token_loss("reverse_kl")), exactness(TopK, token_loss("adaptive_kl"))
        ('lower bound', 'estimate')
    """
    if kind is Sampled:
        return "unbiased gradient"
    if kind is TopK:
        return "lower bound" if loss.merging_lowers else "estimate"
    return "exact"


def require_fit(
    teacher: Teacher | None,
    student: Student,
    tokens: Tensor | None,
    loss: TokenLoss,
    weight: Tensor | None,
    temperature: float,
    cross_entropy: float,
) -> None:
    """Refuse what does not belong together.

    Raises:
        ValueError: it does not.
    """
    if not 0 <= cross_entropy <= 1 or not 0 < temperature < math.inf:
        raise ValueError(
            f"expected a share of cross-entropy from 0 to 1 and a positive temperature, got {cross_entropy} and "
            f"{temperature}"
        )
    if cross_entropy and tokens is None:
        raise ValueError("expected tokens, whose cross-entropy has a share in the loss, got None; pass one a decision")
    if teacher is None and cross_entropy != 1:
        raise ValueError(f"expected a teacher for {loss.key}, got None; only {CROSS_ENTROPY} needs none")
    counts = {
        "teacher": None if teacher is None else len(teacher),
        "student": len(student),
        "tokens": None if tokens is None else len(tokens),
        "weight": None if weight is None else len(weight),
    }
    given = {name: count for name, count in counts.items() if count is not None}
    if len(set(given.values())) > 1:
        raise ValueError(
            f"expected one row a decision of everything, got {', '.join(f'{n} {c}' for n, c in given.items())}; select "
            f"the same decisions of both models, the ones that predict the tokens"
        )
    if weight is not None and not bool((weight >= 0).all()):  # NaN neither
        raise ValueError(f"expected weights of at least 0, got {float(weight.min()):.4g}; leave such decisions out")
    if tokens is not None:
        require_tokens(tokens[:, None], student.size)
    if isinstance(teacher, (Logits, Hidden)) and teacher.size != student.size:
        raise ValueError(
            f"expected both models over the same tokens, got {teacher.size} of the teacher and {student.size} of the "
            f"student; if they share a tokenizer, cut both to its size: logits[:, :size], or head.cut(size)"
        )
    if isinstance(teacher, Sampled) and not loss.linear_in_p:
        raise ValueError(
            f"expected forward_kl with a sampled teacher, got {loss.key}, which is not linear in the teacher's law, so "
            f"that no weights of draws make it unbiased; use forward_kl, or a cache of hidden states"
        )
    if isinstance(teacher, TopK) and not loss.merging_lowers and loss.head is None:
        raise ValueError(
            f"expected an f-divergence or the adaptive KL with a top-k teacher, got {loss.spec}: nothing is known of "
            f"it when tokens are merged; use a cache of hidden states"
        )
    recorded = teacher.temperature if isinstance(teacher, TopK) else 1.0
    if isinstance(teacher, (TopK, Sampled)) and temperature != recorded:
        raise ValueError(
            f"expected temperature {recorded:g}, at which this part of the teacher's law was taken, got "
            f"{temperature:g}: a law cannot be tempered when only a part of it is known; take it at {temperature:g}, "
            f"or use a cache of hidden states"
        )
