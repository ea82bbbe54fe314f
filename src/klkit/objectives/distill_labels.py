"""What a distillation run optimises, in words that hold: of which laws of whole texts, and whether exactly.

Every sentence here is checked by enumeration in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from klkit.objectives.distill_losses import CROSS_ENTROPY, TokenLoss

TEXTS = ("data", "teacher", "student")
"""Who wrote the text: somebody else, the teacher, or the student as it is now."""

SEQUENCE_FORWARD = "KL(teacher‖student) between the laws of whole responses"
SEQUENCE_REVERSE = "KL(student‖teacher) between the laws of whole responses"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a configuration optimises.

    Attributes:
        objective: the quantity, in words.
        value: whether the mean loss is that quantity, up to a constant that no weight changes.
        gradient: whether the mean gradient is that quantity's gradient.
        notes: what else has to be said.
    """

    objective: str
    value: bool
    gradient: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.gradient:
            return f"{self.objective}; the gradient is unbiased"
        return f"{self.objective}; the gradient is NOT that quantity's"

    @property
    def lines(self) -> tuple[str, ...]:
        """The claim and its notes, one sentence each."""
        return (str(self), *self.notes)


def claim(
    loss: TokenLoss,
    text: str = "data",
    *,
    score: bool = False,
    on_policy: float = 0.0,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    exactness: str = "exact",
    per_token: bool = False,
) -> Claim:
    """What a loss of next-token laws on such texts optimises.

    Args:
        loss: the divergence.
        text: who wrote it, one of :data:`TEXTS`.
        score: whether each token's score is weighted with the divergences after it (``sequence-rkl``).
        on_policy: share of the texts that the student writes instead, as it is then.
        temperature: of the divergence.
        cross_entropy: share of the cross-entropy of the text.
        exactness: see :class:`klkit.objectives.distill.Distilled`.
        per_token: whether a batch's sum is divided by its number of tokens instead of strings.

    Raises:
        ValueError: ``text`` names nobody, or a score term is asked for where there is none.

    Example:
        >>> from klkit.objectives.distill_losses import token_loss
        >>> print(claim(token_loss("forward_kl"), "teacher"))
        KL(teacher‖student) between the laws of whole responses; the gradient is unbiased
        >>> claim(token_loss("reverse_kl"), "student").gradient
        False
    """
    if text not in TEXTS:
        raise ValueError(f"expected text of one of {', '.join(TEXTS)}, got {text!r}")
    if score and (loss.key != "reverse_kl" or text != "student" or temperature != 1):
        raise ValueError(
            f"expected reverse_kl at temperature 1 on the student's own text for the score term, got {loss.key} at "
            f"{temperature:g} on text of the {text}; it belongs to KL(student‖teacher) of whole responses"
        )
    text = "student" if on_policy == 1 else text
    found = _plain(loss, text, score, temperature)
    if 0 < on_policy < 1 and text != "student":
        found = _mixed(1 - on_policy, found, on_policy, _plain(loss, "student", False, temperature))
    if loss.key != CROSS_ENTROPY:
        if exactness in ("lower bound", "estimate"):
            found = _of_a_part(found, exactness)
        if cross_entropy == 1:
            found = _likelihood(text)
        elif cross_entropy:
            found = _mixed((1 - cross_entropy) * temperature**2, found, cross_entropy, _likelihood(text))
    notes = list(found.notes)
    if per_token and "between the laws of whole responses" in found.objective:
        notes.append("divided by the tokens of each batch, not its strings: unbiased up to that factor, which varies")
    if loss.head is not None and cross_entropy != 1:
        notes.append("the head's weights are constants: the gradient is that of the divergence with these weights")
    if exactness == "unbiased gradient":
        notes.append("from a sampled teacher: the gradient is that of the whole law on average, with more noise")
    return Claim(found.objective, found.value, found.gradient, tuple(dict.fromkeys(notes)))


def _mixed(share: float, first: Claim, rest: float, second: Claim) -> Claim:
    """The claim for a weighted sum of two losses; it may be that both follow the same quantity."""
    same = first.objective == second.objective
    objective = f"{share:.4g} × [{first.objective}] + {rest:.4g} × [{second.objective}]"
    return Claim(
        first.objective if same else objective,
        first.value and second.value,
        first.gradient and second.gradient,
        (*first.notes, *second.notes),
    )


def _of_a_part(whole: Claim, exactness: str) -> Claim:
    """The claim where of the teacher's laws only the likeliest tokens are known."""
    certain = (
        "a lower bound of" if exactness == "lower bound" else "an estimate, neither above nor below for certain, of"
    )
    return Claim(f"{certain} [{whole.objective}] from the teacher's likeliest tokens", whole.value, whole.gradient)


def _plain(loss: TokenLoss, text: str, score: bool, temperature: float) -> Claim:
    """The claim without mixtures."""
    laws = "next-token laws" if temperature == 1 else f"next-token laws at temperature {temperature:g}"
    if loss.key == CROSS_ENTROPY:
        return _likelihood(text)
    if score:
        return Claim(SEQUENCE_REVERSE, True, True)
    if loss.key == "forward_kl" and text == "teacher" and temperature == 1:
        return Claim(
            SEQUENCE_FORWARD,
            True,
            True,
            ("it is the Rao-Blackwell form of maximum likelihood on the same texts: same mean, less noise",),
        )
    mean = f"mean {loss.key} of {laws} along "
    if text == "student":
        if loss.key == "reverse_kl" and temperature == 1:
            return Claim(SEQUENCE_REVERSE, True, False, _MISSING)
        return Claim(mean + "the student's own texts", True, False, _MISSING)
    whose = "the teacher's texts" if text == "teacher" else "the given texts"
    notes = () if text == "teacher" else ("on texts that neither model wrote, no KL between laws of responses follows",)
    return Claim(mean + whose, True, True, notes)


def _likelihood(text: str) -> Claim:
    """The claim for the cross-entropy of a text."""
    if text == "teacher":
        return Claim(
            SEQUENCE_FORWARD,
            True,
            True,
            ("its value is above it by the teacher's entropy; forward_kl on the same texts has less noise",),
        )
    if text == "student":
        # E_q[-grad log q] = 0: the mean gradient is nothing at all.
        return Claim("entropy of the student's own texts", True, False, ("its mean gradient is 0: nothing is learnt",))
    return Claim("negative log-likelihood of the given texts", True, True)


_MISSING = (
    "left out is how the student's weights change the texts themselves; --objective sequence-rkl follows "
    f"{SEQUENCE_REVERSE}",
)
