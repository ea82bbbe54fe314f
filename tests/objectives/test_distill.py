"""One loss from every kind of input; and one test for each kind of mistake that users of other tools report."""

import itertools

import pytest
import torch

from klkit.divergences.linear import Head
from klkit.divergences.partial import Hidden, Logits, Sampled, TopK
from klkit.objectives.distill import distillation_loss
from klkit.objectives.distill_losses import LOSSES, token_loss
from klkit.sequences import Sequences, predicted

P = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]], dtype=torch.float64)
Z = torch.tensor([[0.0, 0.5, 1.0, -0.5, 0.3]], dtype=torch.float64)
GOLDEN = {
    "forward_kl": (0.33375243, (-0.263451, -0.074869, 0.221178, -0.017179, 0.134322)),
    "reverse_kl": (0.34977473, (-0.194522, -0.143380, 0.206476, -0.044580, 0.176006)),
    "adaptive_kl": (0.34215071, (-0.227321, -0.110780, 0.213472, -0.031541, 0.156171)),
    "adaptive_kl_swapped": (0.34137645, None),
    "adaptive_kl,head=inside": (0.34383788, None),
    "adaptive_kl,mass=0.8": (0.33716648, None),
    "generalised_js": (0.08156476, (-0.051556, -0.026298, 0.050839, -0.007391, 0.034406)),
    "generalised_js,p_weight=0.1": (0.02966802, None),
    "generalised_js,p_weight=0.9": (0.03076381, None),
    "skew_kl": (0.26431693, (-0.186618, -0.071446, 0.169478, -0.018324, 0.106910)),
    "skew_reverse_kl": (0.27129083, (-0.157247, -0.100674, 0.164974, -0.030132, 0.123079)),
    "alpha_beta": (0.40110534, (-0.239790, -0.143158, 0.230934, -0.044665, 0.196679)),
    "total_variation": (0.35549946, (-0.075853, -0.125060, 0.164989, -0.046007, 0.081931)),
}
ALL = [*LOSSES, "adaptive_kl,head=inside,mass=0.8", "generalised_js,p_weight=0.2", "normalised_js,p_weight=0.8"]


def models(rows=40, size=31, dtype=torch.float64, seed=0):
    """Hidden states and weights of a teacher and a student that starts to learn from it, and a text."""
    g = torch.Generator().manual_seed(seed)
    hidden_p, weight_p = torch.randn(rows, 6, generator=g), torch.randn(size, 6, generator=g)
    hidden_q = torch.cat([hidden_p, torch.randn(rows, 2, generator=g)], 1)
    weight_q = torch.cat([weight_p, 0.5 * torch.randn(size, 2, generator=g)], 1)
    tokens = torch.randint(0, size, (rows,), generator=g)
    made = [x.to(dtype) for x in (hidden_p, weight_p, hidden_q, weight_q)]
    return *made[:2], made[2].requires_grad_(), made[3].requires_grad_(), tokens


def kinds(hidden_p, weight_p, hidden_q, weight_q):
    """The same teacher and student, four times."""
    p, q = Hidden(hidden_p, Head(weight_p)), Hidden(hidden_q, Head(weight_q))
    logits = Logits(hidden_p @ weight_p.T)
    return [(logits, Logits(hidden_q @ weight_q.T)), (p, Logits(hidden_q @ weight_q.T)), (logits, q), (p, q)]


@pytest.mark.parametrize("spec", GOLDEN)
@pytest.mark.parametrize("kind", ["dense", "chunked"])
def test_golden_values(spec, kind):
    z = Z.clone().requires_grad_()
    eye = torch.eye(5, dtype=torch.float64)
    teacher, student = Logits(P.log()), Logits(z)
    if kind == "chunked":
        teacher, student = Hidden(P.log(), Head(eye)), Hidden(z, Head(eye))
    found = distillation_loss(teacher, student, None, spec)
    value, slope = GOLDEN[spec]
    assert float(found.loss.detach()) == pytest.approx(value, abs=1e-7 if value > 0 else 0)
    assert float(found.divergence) == pytest.approx(value, abs=1e-7)
    if slope is not None:
        (grad,) = torch.autograd.grad(found.loss, z)
        assert grad[0].tolist() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "temperature"),
    [(torch.float64, 1e-10, 1.0), (torch.float64, 1e-10, 2.0), (torch.float32, 1e-6, 1.0)],
)
def test_every_kind_of_input_gives_one_number_and_one_gradient(spec, temperature, dtype, tolerance):
    *tensors, tokens = models(dtype=dtype)
    weight = torch.linspace(0.0, 1.0, len(tokens))
    options = {"weight": weight, "normaliser": 7.0, "temperature": temperature, "cross_entropy": 0.25, "rows": 9}
    found = []
    for teacher, student in kinds(*tensors):
        one = distillation_loss(teacher, student, tokens, spec, **options)
        found.append((one, torch.autograd.grad(one.loss, tensors[2:])))
    first, grads = found[0]
    for one, slopes in found[1:]:
        assert float(one.loss.detach()) == pytest.approx(float(first.loss.detach()), rel=tolerance)
        for a, b in zip(slopes, grads, strict=True):
            assert float((a - b).norm() / b.norm()) < tolerance
        assert one.count == pytest.approx(float(weight.sum()))
        for name in ("divergence", "kl", "reverse_kl", "head_weight", "cross_entropy"):
            a, b = getattr(one, name), getattr(first, name)
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=20 * tolerance, atol=20 * tolerance, equal_nan=True)


@pytest.mark.parametrize("spec", [spec for spec in ALL if token_loss(spec).merging_lowers])
@pytest.mark.parametrize("student", ["dense", "chunked"])
def test_a_top_k_cache_gives_the_bound_that_it_says(spec, student):
    *tensors, tokens = models()
    (whole, dense), *_, (_, chunked) = kinds(*tensors)
    exact = distillation_loss(whole, dense, None, spec)
    logp = whole.logits.log_softmax(-1)
    for k in (2, 8, 31):
        likely, ids = logp.topk(k, dim=-1)
        found = distillation_loss(TopK(ids, likely), dense if student == "dense" else chunked, tokens, spec, rows=11)
        assert found.exactness == "lower bound"
        assert bool((found.divergence <= exact.divergence + 1e-9).all())
        assert found.loss.requires_grad
    torch.testing.assert_close(found.divergence, exact.divergence, rtol=1e-6, atol=1e-9)


def test_adaptive_kl_from_a_top_k_cache_says_what_its_weight_may_be():
    *tensors, _ = models()
    (whole, dense), *_ = kinds(*tensors)
    exact = distillation_loss(whole, dense, None, "adaptive_kl")
    logp = whole.logits.log_softmax(-1)
    for k, spec in itertools.product((4, 16, 31), ("adaptive_kl", "adaptive_kl_swapped")):
        likely, ids = logp.topk(k, dim=-1)
        found = distillation_loss(TopK(ids, likely), dense, None, spec)
        assert found.exactness == "estimate"
        least, greatest = found.head_bounds.unbind(1)
        assert bool((least <= exact.head_weight + 1e-9).all())
        assert bool((exact.head_weight <= greatest + 1e-9).all())
        assert bool((found.kl <= exact.kl + 1e-9).all())
        assert bool((found.reverse_kl <= exact.reverse_kl + 1e-9).all())
        w = found.head_weight if spec == "adaptive_kl" else 1 - found.head_weight
        torch.testing.assert_close(found.divergence, w * found.kl + (1 - w) * found.reverse_kl)
    torch.testing.assert_close(found.head_weight, exact.head_weight, rtol=1e-6, atol=1e-6)


def test_a_sampled_teacher_has_the_gradient_of_the_whole_one_on_average():
    p, z = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([[0.1, 0.7, -0.4]]).double().requires_grad_()
    draws = torch.tensor(list(itertools.product(range(3), repeat=2)))
    chance = p[draws].prod(1)
    mean = torch.zeros_like(z)
    for row, weight in zip(draws, chance, strict=True):
        found = distillation_loss(Sampled(row[None], torch.full((1, 2), 0.5)), Logits(z), None, "forward_kl")
        mean += weight * torch.autograd.grad(found.loss, z)[0]
        assert found.exactness == "unbiased gradient"
        assert found.kl is None
        assert bool(found.divergence.isnan().all())
    exact = distillation_loss(Logits(p.log()[None]), Logits(z), None, "forward_kl")
    torch.testing.assert_close(mean, torch.autograd.grad(exact.loss, z)[0])


@pytest.mark.parametrize("spec", [key for key in LOSSES if key not in ("forward_kl", "cross_entropy")])
def test_a_sampled_teacher_is_refused_for_all_else(spec):
    *tensors, _ = models(rows=2)
    with pytest.raises(ValueError, match=f"expected forward_kl with a sampled teacher, got {spec}"):
        distillation_loss(Sampled(torch.zeros(2, 1).long(), torch.ones(2, 1)), kinds(*tensors)[0][1], None, spec)


# What users of other tools report, one test a kind


def test_report_masks_and_shifts():
    """A label at its own place is predicted one column before; prompts and padding are no decisions."""
    tokens = torch.tensor([[5, 6, 7, 2, 0, 0], [5, 8, 2, 0, 0, 0]])
    labels = torch.tensor([[-100, -100, 7, 2, -100, -100], [-100, 8, 2, -100, -100, -100]])
    row, column, target = predicted(labels)
    x = Sequences.pack([tokens[0, :2], tokens[1, :1]], [tokens[0, 2:4], tokens[1, 1:3]])
    assert target.tolist() == x.targets().tolist() == [7, 2, 8, 2]
    assert (row.tolist(), column.tolist()) == tuple(part.tolist() for part in x.predictors())
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 6, 9, generator=g)
    b.requires_grad_()
    found = distillation_loss(Logits(a[row, column]), Logits(b[row, column]), target, "forward_kl", cross_entropy=0.5)
    found.loss.backward()
    touched = b.grad.abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [1, 1]]
    # transformers' own loss for the same labels
    z = torch.nn.functional.cross_entropy(b.detach()[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert float(found.cross_entropy.mean()) == pytest.approx(float(z))


def test_report_padding_that_is_the_end_token():
    """TRL #2058, #6357: with pad = end, a mask made from ids loses the end; labels say where it counts."""
    end = pad = 2
    labels = torch.tensor([[-100, 7, end, -100], [-100, 7, 8, end]])
    tokens = torch.tensor([[5, 7, end, pad], [5, 7, 8, end]])
    _, _, target = predicted(labels)
    assert target.tolist() == [7, end, 7, 8, end]
    x = Sequences.pack([tokens[0, :1], tokens[1, :1]], [tokens[0, 1:3], tokens[1, 1:]])
    assert x.targets().tolist() == target.tolist()


@pytest.mark.parametrize("sizes", [(40,), (20, 20), (1, 39), (7, 13, 20)])
def test_report_accumulation_over_unequal_batches(sizes):
    """transformers' and TRL's classic: a mean of means is not the mean. The global count makes them one."""
    *tensors, tokens = models()
    _, _, _, (teacher, student) = kinds(*tensors)
    whole = distillation_loss(teacher, student, tokens, "adaptive_kl", cross_entropy=0.3)
    exact = torch.autograd.grad(whole.loss, tensors[2:])
    parts = [torch.zeros_like(x) for x in exact]
    start, value = 0, 0.0
    for size in sizes:
        at = slice(start, start + size)
        start += size
        one = distillation_loss(
            Hidden(teacher.hidden[at], teacher.head),
            Hidden(student.hidden[at], student.head),
            tokens[at],
            "adaptive_kl",
            cross_entropy=0.3,
            normaliser=whole.count,
        )
        value += float(one.loss.detach())
        for total, grad in zip(parts, torch.autograd.grad(one.loss, tensors[2:]), strict=True):
            total += grad
    assert value == pytest.approx(float(whole.loss.detach()), rel=1e-12)
    for total, true in zip(parts, exact, strict=True):
        torch.testing.assert_close(total, true)


def test_report_temperature_belongs_to_the_divergence_and_comes_with_its_square():
    """TRL #5731 tempered the cross-entropy too; others forget the square, or apply it twice."""
    found = distillation_loss(Logits(P.log()), Logits(Z), None, "forward_kl", temperature=2.0)
    assert float(found.loss) == pytest.approx(0.35895976, abs=1e-7)
    assert float(found.divergence) == pytest.approx(0.35895976 / 4, abs=1e-7)
    *tensors, tokens = models()
    for teacher, student in kinds(*tensors):
        cold, hot = (
            distillation_loss(teacher, student, tokens, "forward_kl", temperature=t, cross_entropy=0.5)
            for t in (1.0, 3.0)
        )
        torch.testing.assert_close(cold.cross_entropy, hot.cross_entropy)
        mixed = 0.5 * 9 * hot.divergence.mean() + 0.5 * hot.cross_entropy.mean()
        assert float(hot.loss.detach()) == pytest.approx(float(mixed))


@pytest.mark.parametrize("spec", ["forward_kl", "reverse_kl"])
def test_report_temperature_in_the_limit(spec):
    """``T² KL`` tends to half the mean squared difference of centred logits."""
    a, b = P.log(), Z
    limit = float((a - a.mean() - b + b.mean()).square().mean() / 2)
    assert limit == pytest.approx(0.370896, abs=1e-6)
    found = distillation_loss(Logits(a), Logits(b), None, spec, temperature=1e4)
    assert float(found.loss) == pytest.approx(limit, rel=1e-3)


def test_report_ends_of_the_jensen_shannon_family():
    """ms-swift #10078: near beta 0 and 1 the usual form switches learning off; the normalised one joins both KLs."""
    value = {
        w: float(distillation_loss(Logits(P.log()), Logits(Z), None, f"normalised_js,p_weight={w}").loss)
        for w in (0, 1e-6, 0.5, 1 - 1e-6, 1)
    }
    assert value[0] == pytest.approx(GOLDEN["forward_kl"][0], abs=1e-7)
    assert value[1e-6] == pytest.approx(value[0], rel=1e-5)
    assert value[0.5] == pytest.approx(0.326259, abs=1e-6)
    assert value[1 - 1e-6] == pytest.approx(value[1], rel=1e-5)
    assert value[1] == pytest.approx(GOLDEN["reverse_kl"][0], abs=1e-7)
    faded = distillation_loss(Logits(P.log()), Logits(Z), None, "generalised_js,p_weight=0.000001")
    assert float(faded.loss) < 1e-6


def test_report_top_k_without_a_bucket_collapses():
    """verl #5041, #7855: a student that leaves the support must pay for it."""
    logp = torch.tensor([[0.6, 0.3, 0.05, 0.05]], dtype=torch.float64).log()
    law = TopK(torch.tensor([[0, 1]]), logp[:, :2])
    inside = distillation_loss(law, Logits(logp), None, "reverse_kl")
    away = torch.tensor([[0.06, 0.03, 0.455, 0.455]], dtype=torch.float64).log()
    outside = distillation_loss(law, Logits(away), None, "reverse_kl")
    assert float(inside.loss) == pytest.approx(0.0, abs=1e-12)
    assert float(outside.loss) > 1.0


def test_report_padded_vocabularies():
    """The same tokenizer with more rows: cut, never filled with logits of 0."""
    hidden_p, weight_p, hidden_q, weight_q, tokens = models()
    wide = torch.cat([weight_q.detach(), torch.zeros(9, 8, dtype=torch.float64)]).requires_grad_()
    same = distillation_loss(Hidden(hidden_p, Head(weight_p)), Hidden(hidden_q, Head(weight_q)), tokens, "reverse_kl")
    cut = distillation_loss(
        Hidden(hidden_p, Head(weight_p)), Hidden(hidden_q, Head(wide).cut(31)), tokens, "reverse_kl"
    )
    torch.testing.assert_close(same.loss, cut.loss)
    cut.loss.backward()
    assert float(wide.grad[31:].abs().max()) == 0.0
    with pytest.raises(ValueError, match=r"got 31 of the teacher and 40 of the student; .* head.cut\(size\)"):
        distillation_loss(Hidden(hidden_p, Head(weight_p)), Hidden(hidden_q, Head(wide)), tokens)


@pytest.mark.parametrize("spec", ALL)
def test_report_mixed_precision(spec):
    """ms-swift #10156: a teacher in half precision beside a student in single made divergences negative."""
    hidden_p, weight_p, _, _, tokens = models(dtype=torch.float32)
    half = hidden_p.bfloat16(), weight_p.bfloat16()
    q = half[0].float().requires_grad_(), half[1].float().requires_grad_()
    for teacher, student in kinds(*half, *q):
        found = distillation_loss(teacher, student, tokens, spec)
        assert found.loss.dtype == torch.float32
        if spec != "cross_entropy":
            assert float(found.divergence.min()) >= 0
            assert torch.isfinite(found.loss)
    # the chunked path computes with the very same weights: no difference at all
    if spec != "cross_entropy":
        assert float(found.divergence.max()) < 1e-9


def first(law, rows):
    return Logits(law.logits[:rows]) if isinstance(law, Logits) else Hidden(law.hidden[:rows], law.head)


@pytest.mark.parametrize("spec", ALL)
def test_report_empty_batch(spec):
    """torchtune returns a constant here, LMOps #38 a NaN: it is 0, with a graph, and counted as nothing."""
    *tensors, tokens = models(rows=3)
    for teacher, student in kinds(*tensors):
        some = [
            type(x)(x.logits[:0]) if isinstance(x, Logits) else Hidden(x.hidden[:0], x.head) for x in (teacher, student)
        ]
        found = distillation_loss(*some, tokens[:0], spec)
        assert (float(found.loss.detach()), found.count) == (0.0, 0.0)
        for grad in torch.autograd.grad(found.loss, tensors[2:], allow_unused=True):
            assert grad is None or float(grad.abs().sum()) == 0.0
    masked = distillation_loss(*kinds(*tensors)[3], tokens, spec, weight=torch.zeros(3))
    assert (float(masked.loss.detach()), masked.count) == (0.0, 0.0)
    masked.loss.backward()


@pytest.mark.parametrize("spec", ALL)
def test_report_teacher_and_student_agree(spec):
    """0/0 in the adaptive weight, and everything else that may come of equal laws."""
    *tensors, _ = models()
    hidden = tensors[0].clone().requires_grad_()
    if spec == "cross_entropy":
        return
    for teacher, student in kinds(*tensors[:2], hidden, tensors[1]):
        found = distillation_loss(teacher, student, None, spec)
        (grad,) = torch.autograd.grad(found.loss, hidden)
        assert float(found.loss.detach()) < 1e-12
        assert float(grad.abs().max()) < 1e-8
        if token_loss(spec).head is not None:
            assert bool(torch.isfinite(found.head_weight).all())


@pytest.mark.parametrize("spec", ["forward_kl", "adaptive_kl", "skew_kl"])
def test_report_a_teacher_that_is_no_number(spec):
    *tensors, tokens = models()
    tensors[0] = tensors[0].clone()
    tensors[0][3, 1] = torch.nan
    for teacher, student in kinds(*tensors):
        with pytest.raises(
            ValueError, match="numbers from the teacher, got NaN at 1 of 40 decisions, the first of them 3"
        ):
            distillation_loss(teacher, student, tokens, spec)


def test_report_excluded_tokens():
    """TRL #5594: what both exclude costs nothing; what the teacher alone excludes makes the reverse KL infinite."""
    logp = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    z = torch.tensor([[1.0, 0.0, -torch.inf, -torch.inf]], requires_grad=True)
    found = distillation_loss(Logits(logp), Logits(z), None, "reverse_kl")
    found.loss.backward()
    assert torch.isfinite(found.loss)
    assert bool(torch.isfinite(z.grad).all())
    wider = distillation_loss(Logits(logp), Logits(torch.zeros(1, 4)), None, "reverse_kl")
    assert float(wider.loss) == torch.inf
    silenced = distillation_loss(Logits(logp), Logits(torch.zeros(1, 4)), None, "reverse_kl", weight=torch.zeros(1))
    assert float(silenced.loss) == 0.0


def test_report_a_silent_branch():
    """atropos #456: the distillation that never acted. Another teacher is another loss and another gradient."""
    *tensors, tokens = models()
    for spec in LOSSES:
        found = []
        for shift in (0.0, 1.0):
            teacher, student = kinds(tensors[0] + shift, *tensors[1:])[3]
            one = distillation_loss(teacher, student, tokens, spec)
            found.append((float(one.loss.detach()), torch.autograd.grad(one.loss, tensors[2])[0]))
        moved = spec != "cross_entropy"
        assert (abs(found[0][0] - found[1][0]) > 1e-3) == moved
        assert (float((found[0][1] - found[1][1]).norm()) > 1e-3) == moved


def test_no_gradient_reaches_the_teacher():
    *tensors, tokens = models()
    tensors = [x.detach().requires_grad_() for x in tensors]
    for teacher, student in kinds(*tensors):
        loss = distillation_loss(teacher, student, tokens, "adaptive_kl").loss
        if isinstance(teacher, Hidden):
            assert torch.autograd.grad(loss, tensors[:2], allow_unused=True) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_entropy": 1.5}, "expected a share of cross-entropy from 0 to 1"),
        ({"temperature": 0.0}, "positive temperature, got 0 and 0.0|and 0.0"),
        ({"weight": -torch.ones(40)}, "expected weights of at least 0, got -1"),
        ({"weight": torch.full((40,), torch.nan)}, "expected weights of at least 0, got nan"),
        ({"loss": "kd"}, "expected a loss among forward_kl, reverse_kl"),
        ({"loss": "adaptive_kl,mu=0.5"}, r"expected options of adaptive_kl among: mass=0.5, head=cover; got 'mu=0.5'"),
        ({"loss": "adaptive_kl,mass=half"}, "expected a number, got 'mass=half'"),
        ({"loss": "adaptive_kl,mass=2"}, "expected a mass from 0 to 1, got 2.0"),
        ({"loss": "adaptive_kl,head=top"}, "expected head to be cover or inside, got 'top'"),
        ({"loss": "skew_kl,p_weight=1"}, "expected p_weight strictly between 0 and 1, got 1.0"),
        ({"loss": "forward_kl,mass=1"}, "expected options of forward_kl among: none; got 'mass=1'"),
    ],
)
def test_refusals(options, message):
    *tensors, tokens = models()
    teacher, student = kinds(*tensors)[0]
    with pytest.raises(ValueError, match=message):
        distillation_loss(teacher, student, tokens, **options)


def test_refusals_of_parts():
    *tensors, tokens = models(rows=2)
    _, student = kinds(*tensors)[0]
    law = TopK(torch.zeros(2, 1).long(), torch.full((2, 1), -0.5))
    with pytest.raises(
        ValueError, match="expected one row a decision of everything, got teacher 2, student 1, tokens 1"
    ):
        distillation_loss(law, first(student, 1), tokens[:1])
    with pytest.raises(ValueError, match="expected an f-divergence or the adaptive KL with a top-k teacher, got alpha"):
        distillation_loss(law, student, tokens, "alpha_beta")
    with pytest.raises(ValueError, match="expected temperature 1, at which this part of the teacher's law was taken"):
        distillation_loss(law, student, tokens, "forward_kl", temperature=2.0)
    with pytest.raises(ValueError, match="expected a teacher for forward_kl, got None"):
        distillation_loss(None, student, tokens, "forward_kl")
    with pytest.raises(ValueError, match="expected tokens, whose cross-entropy has a share"):
        distillation_loss(law, student, None, "forward_kl", cross_entropy=0.1)
    with pytest.raises(ValueError, match=r"expected ids in 0\.\.30"):
        distillation_loss(law, student, torch.tensor([0, 31]), "forward_kl")
    recorded = TopK(law.tokens, law.logp, temperature=2.0)
    assert distillation_loss(recorded, student, tokens, "forward_kl", temperature=2.0).exactness == "lower bound"
