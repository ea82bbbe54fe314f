"""What the numbers in an evaluation of a student are: the words, the unit, and over what each is taken.

Throughout, ``p`` is the teacher and ``q`` the student. A number that comes with an error bar has companions of the same
name ending in ``_stderr``, ``_lower`` and ``_upper`` (standard error and 95 % interval, clustered by prompt).
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT, OWN, GIVEN = (
    "token of the held-out text",
    "token of the student's own",
    "token of the teacher's own",
)
EVERYWHERE = "all of the student's responses"


@dataclass(frozen=True, slots=True)
class Quantity:
    """One number of an evaluation.

    Attributes:
        words: what it is.
        unit: of the number; "" for a plain ratio.
        per: what it is a mean or a total over.
    """

    words: str
    unit: str
    per: str


QUANTITIES: dict[str, Quantity] = {
    "kl": Quantity("KL(teacher‖student), whole responses, rb_cv", "nats", "teacher's response"),
    "reverse_kl": Quantity("KL(student‖teacher), whole responses, rb_cv", "nats", "student's response"),
    "text_kl": Quantity("forward KL(teacher‖student)", "nats", TEXT),
    "text_reverse_kl": Quantity("reverse KL(student‖teacher)", "nats", TEXT),
    "text_adaptive_kl": Quantity("adaptive KL, mass 0.5, cover", "nats", TEXT),
    "text_head_weight": Quantity("weight of the forward KL in it", "", TEXT),
    "text_head_gap": Quantity("Σ|p − q| over the teacher's head", "", TEXT),
    "text_tail_gap": Quantity("Σ|p − q| over its tail", "", TEXT),
    "text_far_mass": Quantity("student's mass where p < 1e-4", "", TEXT),
    "text_far_mass_teacher": Quantity("teacher's mass where p < 1e-4", "", TEXT),
    "text_single_head": Quantity("decisions whose head is one token", "share", TEXT),
    "text_same_top": Quantity("both models' likeliest token is the same", "share", TEXT),
    "text_entropy": Quantity("entropy of the student", "nats", TEXT),
    "text_entropy_teacher": Quantity("entropy of the teacher", "nats", TEXT),
    "text_cross_entropy": Quantity("cross-entropy of the student, −log q(token)", "nats", TEXT),
    "text_cross_entropy_teacher": Quantity("cross-entropy of the teacher, −log p(token)", "nats", TEXT),
    "own_kl": Quantity("forward KL(teacher‖student) after the student's prefixes", "nats", OWN),
    "own_reverse_kl": Quantity("reverse KL(student‖teacher) after the student's prefixes", "nats", OWN),
    "given_kl": Quantity("forward KL(teacher‖student) after the teacher's prefixes", "nats", GIVEN),
    "given_reverse_kl": Quantity("reverse KL(student‖teacher) after the teacher's prefixes", "nats", GIVEN),
    "own_cross_entropy_teacher": Quantity("−log p of the student's own tokens", "nats", OWN),
    "exposure_bias": Quantity("excess accumulated error (R − ε)/ε of the forward KL", "", "position, accumulated"),
    "exposure_reach": Quantity("positions accumulated", "tokens", "at least a tenth of the responses go on so far"),
    "rouge_l": Quantity("Rouge-L F, best reference, words without stemming", "of 100", "student's response"),
    "rouge_l_teacher": Quantity("the same of the teacher's responses", "of 100", "teacher's response"),
    "distinct_1": Quantity("different words over all words", "share", EVERYWHERE),
    "distinct_2": Quantity("different word pairs over all pairs", "share", EVERYWHERE),
    "distinct_2_teacher": Quantity("the same of the teacher's responses", "share", "all of the teacher's responses"),
    "self_rouge_l": Quantity("Rouge-L between responses to one prompt", "of 100", "prompt"),
    "self_rouge_l_teacher": Quantity("the same of the teacher's responses", "of 100", "prompt"),
    "length": Quantity("tokens, end token included", "tokens", "student's response"),
    "length_teacher": Quantity("the same of the teacher", "tokens", "teacher's response"),
    "finished": Quantity("responses that end by themselves", "share", "student's response"),
    "finished_teacher": Quantity("the same of the teacher", "share", "teacher's response"),
}
"""Every number of an evaluation by its name."""
