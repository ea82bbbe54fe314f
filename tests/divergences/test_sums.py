"""Everything that follows from a row's sums, against sums written as they are defined, in double precision."""

import math

import pytest
import torch

from klkit.divergences.backends import eager
from klkit.divergences.sums import FARTHEST, NEAREST, RowSums, norms_of, values


def definition(a, b):
    """Each field of :class:`RowSums` for one row of Python floats."""
    top_p, top_q = a.index(max(a)), b.index(max(b))
    high, low, top = a[top_p], b[top_p], b[top_q]
    x, d = [v - high for v in a], [(w - low) - (v - high) for v, w in zip(a, b, strict=True)]
    ea, eb = [math.exp(v) for v in x], [math.exp(w - top) for w in b]

    def f(t):
        return math.expm1(t) - t if abs(t) > 1e-3 else t * t * (1 / 2 + t * (1 / 6 + t * (1 / 24 + t / 120)))

    def total(weights, *factors):
        return math.fsum(math.prod(terms) for terms in zip(weights, *factors, strict=True))

    return (
        *(top_p, top_q, high, low, top),
        *(total(ea), total(eb), total(ea, d), total(eb, d), total(ea, x), total(eb, [w - top for w in b])),
        *(total(ea, [f(t) for t in d]), total(eb, [f(-t) for t in d]), total(ea, x, x), total(ea, d, d)),
        *(min(d), max(d)),
    )


@pytest.mark.parametrize("scale", [3.0, 1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("offset", [0.0, 40.0])
def test_the_eager_sums_are_those_defined(scale, offset):
    a = 2 * torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = a + scale * torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + offset
    for got, x, y in zip(eager.row_sums(a, b), a.tolist(), b.tolist(), strict=True):
        torch.testing.assert_close(got, torch.tensor(definition(x, y), dtype=torch.float64), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("gap", [0.0, 5.0, NEAREST - 1, NEAREST + 1, FARTHEST - 1, FARTHEST + 1, 500.0])
def test_every_distance_between_the_tops(gap):
    """From laws with one top token to laws that share nothing: one formula hands over to the next."""
    a, b = torch.zeros(1, 6, dtype=torch.float64), torch.zeros(1, 6, dtype=torch.float64)
    a[0, 0], b[0, 1] = 3.0, gap
    sums = RowSums(*eager.row_sums(a, b).unbind(1))
    found = values(sums)
    logp, logq = a.log_softmax(-1), b.log_softmax(-1)
    torch.testing.assert_close(found.kl, (logp.exp() * (logp - logq)).sum(-1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.reverse_kl, (logq.exp() * (logq - logp)).sum(-1), rtol=1e-9, atol=1e-12)
    reference, paired, norm, shift = norms_of(sums, found)[0]
    torch.testing.assert_close(a[0] - reference - norm, logp[0])
    torch.testing.assert_close(b[0] - paired - norm - shift, logq[0])
    assert float(b.max() - paired) <= NEAREST
