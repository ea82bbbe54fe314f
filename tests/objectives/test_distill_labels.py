"""Every claim about what is optimised, held against the enumeration of all strings of a small student and teacher."""

import pytest
import torch

from klkit.divergences.partial import Logits
from klkit.objectives.distill import distillation_loss
from klkit.objectives.distill_labels import SEQUENCE_FORWARD, SEQUENCE_REVERSE, claim
from klkit.objectives.distill_losses import LOSSES, token_loss
from klkit.objectives.policy import kl_surrogate
from klkit.objectives.toy import Toy

LAWS = {
    "teacher": lambda toy: toy.reference,
    "student": lambda toy: toy.policy.log_softmax(-1),
    "data": lambda t: t.old,
}


def one_loss_a_string(toy, key, temperature=1.0):
    """The loss of each string as a trainer forms it, without a mean over tokens."""
    losses = []
    for i in range(len(toy.token)):
        batch = toy.batch(torch.tensor([i]))
        mask = batch.mask[0]
        found = distillation_loss(
            Logits(batch.rows_q[0][mask]),
            Logits(batch.rows_p[0][mask]),
            toy.token[i][mask],
            key,
            normaliser=1.0,
            temperature=temperature,
        )
        losses.append(found.loss)
    return torch.stack(losses)


def mean(toy, text, per_string):
    return (toy.law(LAWS[text](toy)).detach() * per_string).sum()


def differentiated(toy, text, key, temperature=1.0):
    """The same mean, but with the law of the strings differentiated too: the gradient of the quantity itself."""
    return (toy.law(LAWS[text](toy)) * one_loss_a_string(toy, key, temperature)).sum()


def relative(found, target):
    return float((found - target).norm() / target.norm())


@pytest.fixture(scope="module")
def toy():
    return Toy.make(3, 3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("text", ["data", "teacher", "student"])
@pytest.mark.parametrize("key", LOSSES)
def test_whether_the_gradient_is_that_of_the_quantity(key, text, temperature):
    toy = Toy.make(3, 2)
    said = claim(token_loss(key), text, temperature=temperature)
    formed = toy.gradient(mean(toy, text, one_loss_a_string(toy, key, temperature)))
    true = toy.gradient(differentiated(toy, text, key, temperature))
    assert said.gradient == (float((formed - true).norm()) < 1e-9)


def test_token_forward_kl_on_teacher_text_is_the_sequence_kl(toy):
    said = claim(token_loss("forward_kl"), "teacher")
    assert (said.objective, said.value, said.gradient) == (SEQUENCE_FORWARD, True, True)
    p, q = toy.law(toy.reference), toy.law(toy.policy.log_softmax(-1))
    losses = one_loss_a_string(toy, "forward_kl")
    torch.testing.assert_close(mean(toy, "teacher", losses), (p * (p / q).log()).sum())
    found = toy.gradient(mean(toy, "teacher", losses))
    assert relative(found, toy.targets()["forward_kl"]) < 1e-12


def test_maximum_likelihood_on_teacher_text_has_the_same_gradient_with_more_noise(toy):
    exact = toy.targets()["forward_kl"]
    p = toy.law(toy.reference)
    noise = {}
    for key in ("cross_entropy", "forward_kl"):
        each = torch.stack([toy.gradient(x) for x in one_loss_a_string(toy, key)])
        assert relative(torch.einsum("n,nkv->kv", p, each), exact) < 1e-12
        noise[key] = float((p * (each - exact).square().sum((1, 2))).sum())
    assert noise["forward_kl"] < noise["cross_entropy"] / 2
    assert claim(token_loss("cross_entropy"), "teacher").objective == SEQUENCE_FORWARD


def test_token_reverse_kl_on_student_text_has_the_value_and_not_the_gradient(toy):
    said = claim(token_loss("reverse_kl"), "student")
    assert (said.objective, said.value, said.gradient) == (SEQUENCE_REVERSE, True, False)
    p, q = toy.law(toy.reference), toy.law(toy.policy.log_softmax(-1))
    losses = one_loss_a_string(toy, "reverse_kl")
    torch.testing.assert_close(mean(toy, "student", losses), (q * (q / p).log()).sum())
    assert relative(toy.gradient(mean(toy, "student", losses)), toy.targets()["kl"]) > 0.1


def test_with_the_score_term_it_has_both(toy):
    said = claim(token_loss("reverse_kl"), "student", score=True)
    assert (said.objective, said.value, said.gradient) == (SEQUENCE_REVERSE, True, True)
    q = toy.law(toy.policy.log_softmax(-1)).detach()
    total = torch.zeros_like(toy.policy)
    for i in range(len(toy.token)):
        batch = toy.batch(torch.tensor([i]))
        local = (batch.rows_p.exp() * (batch.rows_p - batch.rows_q)).sum(-1)
        total += q[i] * toy.gradient(kl_surrogate(local, batch.logp, batch.logq, batch.mask).loss)
    assert relative(total, toy.targets()["kl"]) < 1e-12


def test_text_of_the_student_teaches_nothing_by_its_likelihood(toy):
    formed = toy.gradient(mean(toy, "student", one_loss_a_string(toy, "cross_entropy")))
    assert float(formed.norm()) < 1e-12
    assert "nothing is learnt" in claim(token_loss("cross_entropy"), "student").notes[0]


def test_words_for_mixtures_and_parts():
    said = claim(token_loss("adaptive_kl"), "data", on_policy=0.25)
    assert not said.gradient
    assert said.objective.startswith("0.75 × [mean adaptive_kl of next-token laws along the given texts] + 0.25 × [")
    batches = claim(token_loss("forward_kl"), "teacher", per_token=True)
    assert any("divided by the tokens of each batch" in note for note in batches.notes)
    assert "temperature 2" in claim(token_loss("forward_kl"), "teacher", temperature=2.0).objective


@pytest.mark.parametrize(
    ("key", "text", "options", "message"),
    [
        ("forward_kl", "nobody", {}, "expected text of one of data, teacher, student, got 'nobody'"),
        ("forward_kl", "student", {"score": True}, "got forward_kl at 1 on text of the student"),
        ("reverse_kl", "data", {"score": True}, "got reverse_kl at 1 on text of the data"),
    ],
)
def test_refusals(key, text, options, message):
    with pytest.raises(ValueError, match=message):
        claim(token_loss(key), text, **options)


def test_shares_of_one_leave_nothing_of_the_other():
    sft = claim(token_loss("cross_entropy"), "teacher")
    assert claim(token_loss("adaptive_kl"), "teacher", cross_entropy=1.0).objective == sft.objective
    alone = claim(token_loss("reverse_kl"), "data", on_policy=1.0)
    assert (alone.objective, alone.gradient) == (SEQUENCE_REVERSE, False)


def test_a_mixture_with_the_texts_likelihood_names_both_parts():
    same = claim(token_loss("forward_kl"), "teacher", cross_entropy=0.25)
    assert (same.objective, same.gradient) == (SEQUENCE_FORWARD, True)
    other = claim(token_loss("reverse_kl"), "data", cross_entropy=0.25, temperature=2.0)
    assert other.objective.startswith("3 × [mean reverse_kl of next-token laws at temperature 2")
    assert other.objective.endswith("0.25 × [negative log-likelihood of the given texts]")


@pytest.mark.parametrize(("text", "cross_entropy"), [("data", 0.5), ("teacher", 0.25), ("student", 0.5)])
def test_whether_a_mixture_has_its_gradient(toy, text, cross_entropy):
    said = claim(token_loss("forward_kl"), text, cross_entropy=cross_entropy)
    parts = [one_loss_a_string(toy, key) for key in ("forward_kl", "cross_entropy")]
    loss = (1 - cross_entropy) * parts[0] + cross_entropy * parts[1]
    formed = toy.gradient(mean(toy, text, loss))
    true = toy.gradient((toy.law(LAWS[text](toy)) * loss).sum())
    assert said.gradient == (float((formed - true).norm()) < 1e-9)


def test_a_part_of_the_teacher_is_not_called_the_whole():
    bound = claim(token_loss("forward_kl"), "teacher", exactness="lower bound")
    assert bound.objective == f"a lower bound of [{SEQUENCE_FORWARD}] from the teacher's likeliest tokens"
    guess = claim(token_loss("adaptive_kl"), "data", exactness="estimate")
    assert guess.objective.startswith("an estimate, neither above nor below for certain, of [mean adaptive_kl")
    assert any("weights are constants" in note for note in guess.notes)
