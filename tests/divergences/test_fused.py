"""Row statistics against plain Python sums in double precision, row by row."""

import math
from dataclasses import fields

import pytest
import torch

from klkit.divergences.f import total_variation
from klkit.divergences.fused import RowStatistics, mixture_kl, row_statistics
from klkit.divergences.kl import entropy, kl, reverse_kl
from klkit.divergences.mixtures import jensen_shannon
from klkit.numerics import log_softmax

NO = -math.inf


def reference(logp: list[float], logq: list[float], y: int, ends: tuple[int, ...]) -> dict[str, float]:
    """Every field by its definition, over log-probabilities as Python floats."""
    support = [a for a in range(len(logp)) if logp[a] > NO]
    p, q = [math.exp(x) for x in logp], [math.exp(x) for x in logq]

    def divergence(a, b):
        if any(x > NO and z == NO for x, z in zip(a, b, strict=True)):
            return math.inf
        return math.fsum(math.exp(x) * (x - z) for x, z in zip(a, b, strict=True) if x > NO)

    def entropy_of(a):
        return -math.fsum(math.exp(x) * x for x in a if x > NO)

    def coin(a):
        sides = [a[i] for i in ends], [x for i, x in enumerate(a) if i not in ends]
        top = [max(side, default=NO) for side in sides]
        return [
            NO if t == NO else t + math.log(math.fsum(math.exp(x - t) for x in side))
            for side, t in zip(sides, top, strict=True)
        ]

    def half(a, b):
        return math.fsum(x * math.log(x / ((x + z) / 2)) for x, z in zip(a, b, strict=True) if x > 0)

    def variance(values):
        mean = math.fsum(p[a] * values[a] for a in support)
        return math.fsum(p[a] * (values[a] - mean) ** 2 for a in support)

    gone = [a for a in support if logq[a] == NO]
    ratio = {a: logp[a] - logq[a] for a in support}
    return {
        "logp": logp[y],
        "logq": logq[y],
        "kl": divergence(logp, logq),
        "reverse_kl": divergence(logq, logp),
        "total_variation": math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
        "entropy_p": entropy_of(logp),
        "entropy_q": entropy_of(logq),
        "variance_logp": variance({a: logp[a] for a in support}),
        "variance_ratio": math.inf if gone else variance(ratio),
        "end_p": math.fsum(p[i] for i in ends),
        "end_q": math.fsum(q[i] for i in ends),
        "end_kl": divergence(coin(logp), coin(logq)),
        "top_p": logp.index(max(logp)),
        "top_q": logq.index(max(logq)),
        "lost": max(math.fsum(p[a] for a in gone), 1e-300) if gone else 0.0,
        "excluded": max(gone, key=lambda a: logp[a]) if gone else -1,
        "confidence": max(p),
        "js": (half(p, q) + half(q, p)) / 2,
    }


def cases() -> tuple[torch.Tensor, torch.Tensor]:
    zp, zq = 2 * torch.randn(2, 16, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    zp[1, 3] = zq[1, 3] = NO  # a shared exclusion
    zp[2, :3] = NO  # p excludes, an end token among them
    zq[3, 4] = NO  # q excludes
    zq[4, :2] = NO  # q excludes both end tokens
    zp[5, :2] = zq[5, :2] = NO  # neither can end
    zp[6, 1:] = NO  # p always ends
    zp[7, 1:] = zq[7, 1:] = NO  # both always end
    zq[8] = zp[8]  # identical
    zq[9] = zp[9] + 1e-4 * zq[9]  # almost identical
    zp[10], zq[10, 0] = zp[10] * 100, 60.0  # p almost one-hot, q almost always ends
    zp[11, 0], zq[11, 0] = -60.0, -70.0  # ends almost never
    zp[12, :3] = zq[12, 3:] = NO  # disjoint
    zp[13] = torch.tensor([0.0, 500, 0, 0, 0, 0, 0])  # p underflows off its token
    zp[14], zq[14, 2] = zp[13], NO  # ... and q excludes one of those
    zp[15], zq[15] = 20 + zp[13].roll(1), zp[13].roll(2)  # one-hot on different tokens
    return zp, zq


def check(zp, zq, ends, dtype, rtol, atol, backend="eager"):
    logp, logq = log_softmax(zp.to(dtype)), log_softmax(zq.to(dtype))
    tokens = torch.arange(len(zp)) % zp.shape[1]
    got = row_statistics(zp.to(dtype), zq.to(dtype), tokens, ends, js=True, backend=backend)
    plain = row_statistics(zp.to(dtype), zq.to(dtype), tokens, ends, backend=backend)
    assert plain.js is None
    for i in range(len(zp)):
        expected = reference(logp[i].tolist(), logq[i].tolist(), int(tokens[i]), ends)
        for field in fields(RowStatistics):
            value = float(getattr(got, field.name)[i])
            assert value == pytest.approx(expected[field.name], rel=rtol, abs=atol), (i, field.name)
            if field.name != "js":
                value = float(getattr(plain, field.name)[i])
                assert value == pytest.approx(expected[field.name], rel=rtol, abs=atol), (i, field.name, "without js")
    return got


@pytest.mark.parametrize("ends", [(0,), (0, 1), (1, 0, 5), ()])
def test_every_field_in_double_precision(ends):
    got = check(*cases(), ends, torch.float64, 1e-10, 1e-13)
    assert torch.equal(got.lost > 0, got.kl == torch.inf)
    assert torch.equal(got.excluded >= 0, got.kl == torch.inf)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("ends", [(0,), (0, 1)])
def test_every_field_in_single_precision(ends, backend):
    got = check(*cases(), ends, torch.float32, 2e-5, 1e-6, backend)
    assert torch.equal(got.lost > 0, got.kl == torch.inf)
    assert (got.kl[8], got.reverse_kl[8], got.end_kl[8]) == (0, 0, 0)


def test_long_rows_agree_with_the_divergences():
    generator = torch.Generator().manual_seed(0)
    zp = 3 * torch.randn(6, 50257, generator=generator)
    zq = zp + torch.tensor([1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0])[:, None] * torch.randn(6, 50257, generator=generator)
    logp, logq = log_softmax(zp), log_softmax(zq)
    got = row_statistics(logp, logq, torch.zeros(6, dtype=torch.long), (0, 5))
    a, b = zp.double().log_softmax(-1), zq.double().log_softmax(-1)
    p, u = a.exp(), a - b
    for value, truth, rtol in [
        (got.kl, kl(a, b), 1e-3),
        (got.reverse_kl, reverse_kl(a, b), 1e-3),
        (got.total_variation, total_variation(a, b), 2e-3),
        (got.entropy_p, entropy(a), 5e-6),
        (got.entropy_q, entropy(b), 5e-6),
        (got.variance_logp, (p * (a + entropy(a)[:, None]).square()).sum(-1), 1e-5),
        (got.variance_ratio, (p * (u - kl(a, b)[:, None]).square()).sum(-1), 1e-3),
        (got.end_p, p[:, [0, 5]].sum(-1), 1e-5),
    ]:
        torch.testing.assert_close(value.double(), truth, rtol=rtol, atol=0)
    assert torch.equal(got.top_p, zp.argmax(-1))
    assert torch.equal(got.same_top, zp.argmax(-1) == zq.argmax(-1))


def test_the_chain_rule_of_ending_and_going_on():
    zp, zq = (z[:2] for z in cases())
    logp, logq = zp.log_softmax(-1), zq.log_softmax(-1)
    rows = row_statistics(logp, logq, torch.zeros(2, dtype=torch.long), (0,))
    content = kl(logp[:, 1:].log_softmax(-1), logq[:, 1:].log_softmax(-1))
    torch.testing.assert_close(rows.kl, rows.end_kl + (1 - rows.end_p) * content)


@pytest.mark.parametrize("rest", [1e-3, 1e-6, 1e-9, 1e-15])
def test_the_end_divergence_keeps_its_digits_where_ending_is_almost_certain(rest):
    zp, zq = torch.tensor([[0.0, math.log(rest)]]), torch.tensor([[0.0, math.log(3 * rest)]])
    got = row_statistics(log_softmax(zp), log_softmax(zq), torch.tensor([0]), (0,)).end_kl
    truth = kl(zp.double().log_softmax(-1), zq.double().log_softmax(-1))
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=0)


def test_the_end_divergence_where_going_on_underflows():
    zp, zq = torch.zeros(1, 4), torch.tensor([[0.0, -200.0, -201.0, -202.0]])
    got = row_statistics(log_softmax(zp), log_softmax(zq), torch.tensor([0]), (0,)).end_kl
    expected = 0.25 * math.log(0.25) + 0.75 * (math.log(0.75) + 200 - math.log1p(math.exp(-1) + math.exp(-2)))
    assert float(got) == pytest.approx(expected, rel=1e-6)


def test_half_precision_is_widened_and_inputs_are_left_alone():
    zp, zq = cases()
    logp, logq = zp.log_softmax(-1).half(), zq.log_softmax(-1).half()
    before = logp.clone(), logq.clone()
    rows = row_statistics(logp, logq, torch.zeros(16, dtype=torch.long), (0,))
    assert rows.kl.dtype == rows.logp.dtype == torch.float32
    assert torch.equal(logp, before[0])
    assert torch.equal(logq, before[1])
    rows = row_statistics(zp.log_softmax(-1), zq.log_softmax(-1).float(), torch.zeros(16, dtype=torch.long), (0,))
    assert rows.kl.dtype == torch.float64


def test_no_graph_is_kept():
    logp = torch.zeros(2, 3, requires_grad=True).log_softmax(-1)
    assert not row_statistics(logp, logp, torch.zeros(2, dtype=torch.long), (0,)).kl.requires_grad
    with torch.inference_mode():
        row_statistics(logp * 1, logp * 1, torch.zeros(2, dtype=torch.long), (0,))


@pytest.mark.parametrize("js", [False, True])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_rows_need_not_be_normalised(backend, js):
    zp, zq = (z.float() for z in cases())
    tokens = torch.arange(len(zp)) % 7
    one = row_statistics(zp, zq, tokens, (0,), js=js, backend=backend)
    other = row_statistics(zp + 8, zq - 16, tokens, (0,), js=js, backend=backend)
    for field in fields(RowStatistics)[: None if js else -1]:
        torch.testing.assert_close(getattr(one, field.name), getattr(other, field.name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("js", [False, True])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_probabilities_are_left_where_they_were_asked_for(backend, js):
    zp, zq = (z.float() for z in cases())
    truth, tokens = zp.double().softmax(-1), torch.zeros(16, dtype=torch.long)
    plain = row_statistics(zp, zq, tokens, (0, 1), js=js, backend=backend)
    again = row_statistics(zp, zq, tokens, (0, 1), overwrite=True, js=js, backend=backend)
    torch.testing.assert_close(zp.double(), truth, rtol=2e-5, atol=1e-9)
    for field in fields(RowStatistics)[: None if js else -1]:
        assert torch.equal(getattr(plain, field.name), getattr(again, field.name)), field.name


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_the_jensen_shannon_divergence_comes_on_request_and_changes_nothing_else(backend):
    zp, zq = (z.float() for z in cases())
    tokens = torch.zeros(16, dtype=torch.long)
    plain = row_statistics(zp, zq, tokens, (0, 1), backend=backend)
    more = row_statistics(zp, zq, tokens, (0, 1), js=True, backend=backend)
    assert plain.js is None
    truth = jensen_shannon(log_softmax(zp.double()), log_softmax(zq.double()))
    torch.testing.assert_close(more.js.double(), truth, rtol=1e-5, atol=1e-9)
    for field in fields(RowStatistics)[:-1]:
        torch.testing.assert_close(getattr(plain, field.name), getattr(more, field.name), rtol=1e-6, atol=0)


@pytest.mark.parametrize("js", [False, True])
def test_rows_are_selected_and_put_together(js):
    zp, zq = cases()
    whole = row_statistics(zp, zq, torch.zeros(16, dtype=torch.long), (0,), js=js)
    again = RowStatistics.cat([whole.select(torch.arange(5)), whole.select(torch.arange(5, 16))])
    for field in fields(RowStatistics)[: None if js else -1]:
        assert torch.equal(getattr(again, field.name), getattr(whole, field.name)), field.name
    assert (again.js is None) == (not js)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["p", "q"])
def test_what_is_no_law_is_refused(backend, bad, side):
    good, wrong = torch.zeros(3, 9), torch.zeros(3, 9)
    wrong[1, 4] = bad
    pair = (wrong, good) if side == "p" else (good, wrong)
    with pytest.raises(ValueError, match=f"row 1 of 3 of {side} is not"):
        row_statistics(*pair, torch.zeros(3, dtype=torch.long), (0,), backend=backend)
    wrong[1] = NO
    with pytest.raises(ValueError, match=f"row 1 of 3 of {side} is not"):
        row_statistics(*pair, torch.zeros(3, dtype=torch.long), (0,), backend=backend)


def test_shapes_are_compared():
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 4\)"):
        row_statistics(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), (0,))


@pytest.mark.parametrize("odds", [-800.0, -30.0, -1.0, 0.0, 2.0, 30.0, 800.0])
def test_divergence_from_the_posterior_mixture(odds):
    zp, zq = cases()
    logp, logq = zp.log_softmax(-1), zq.log_softmax(-1)
    got = mixture_kl(logp, logq, torch.full((16,), odds, dtype=torch.float64))
    log_w, log_v = (
        -math.log1p(math.exp(-odds)) if odds > -700 else odds,
        -odds if odds > 700 else -math.log1p(math.exp(odds)),
    )
    for i in range(16):
        total = []
        for a, b in zip(logp[i].tolist(), logq[i].tolist(), strict=True):
            if a > NO:
                x, y = a + log_w, b + log_v
                mixed = max(x, y) + math.log1p(math.exp(-abs(x - y)))
                total.append(math.exp(a) * (a - mixed))
        assert float(got[i]) == pytest.approx(math.fsum(total), rel=1e-9, abs=1e-13), i


def test_equal_odds_give_half_of_jensen_shannon():
    zp, zq = cases()
    logp, logq, even = zp.log_softmax(-1), zq.log_softmax(-1), torch.zeros(16, dtype=torch.float64)
    both = mixture_kl(logp, logq, even) + mixture_kl(logq, logp, even)
    torch.testing.assert_close(both / 2, jensen_shannon(logp, logq))
    certain = torch.full((16,), torch.inf, dtype=torch.float64)
    assert not mixture_kl(logp, logq, certain).any()
