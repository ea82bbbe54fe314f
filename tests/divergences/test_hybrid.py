"""The divergence from known tokens and draws: unbiased to the last digit by enumeration, whatever the two laws."""

import itertools
import math

import pytest
import torch

from klkit.divergences.fused import row_statistics
from klkit.divergences.hybrid import hybrid_kl, hybrid_statistics
from klkit.divergences.kl import kl
from klkit.divergences.partial import Hybrid, Scalars

DOUBLE = torch.float64


def law_of(logp, k, draws, *, size=None, whole=None):
    """One law with every row of ``draws``, ``(n, s)``."""
    known = logp.topk(k)
    n = len(draws)
    rest = logp.scatter(0, known.indices, -torch.inf).logsumexp(0)
    complete = bool((logp > -torch.inf).all()) if whole is None else whole
    return Hybrid(
        known.indices.expand(n, -1),
        known.values.expand(n, -1),
        rest.expand(n),
        draws,
        logp[draws],
        torch.full((n,), complete),
        size,
    )


def enumerated(logp, k, count, **options):
    """The law with every sequence of draws from its tail, and the probability of each sequence."""
    tail = logp.scatter(0, logp.topk(k).indices, -torch.inf)
    ids = (tail > -torch.inf).nonzero()[:, 0].tolist()
    draws = torch.tensor(list(itertools.product(ids, repeat=count)))
    return law_of(logp, k, draws, **options), (tail - tail.logsumexp(0)).exp()[draws].prod(1)


def pair(seed, spread, size=7):
    generator = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(2, size, generator=generator, dtype=DOUBLE)
    return (1.5 * z).log_softmax(0), (1.5 * z + spread * noise).log_softmax(0)


def divergence(logp, logq):
    return float((logp.exp() * (logp - logq)).where(logp > -torch.inf, 0.0).sum())


def means(law, chance, logq):
    found = hybrid_kl(law, logq.expand(len(chance), -1))
    assert float(chance.sum()) == pytest.approx(1, abs=1e-14)
    return float(chance @ found.kl), float(chance @ found.plain)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("spread", [1e-4, 0.3, 1.0, 4.0])
def test_the_mean_over_all_draws_is_the_divergence(spread, count):
    logp, logq = pair(0, spread)
    law, chance = enumerated(logp, 3, count)
    truth = divergence(logp, logq)
    assert means(law, chance, logq) == pytest.approx((truth, truth), abs=1e-12, rel=1e-12)


def loud(logq):
    """Much on a token of the tail, more than the law of the tail can give to any."""
    return torch.cat([logq[:-1], logq.max()[None] + 4]).log_softmax(0)


def test_unbiased_where_q_prefers_a_token_of_the_tail():
    logp = torch.tensor([0.5, 0.2, 0.12, 0.1, 0.07, 0.01], dtype=DOUBLE).log()
    logq = loud((logp + 0.1 * pair(1, 1.0, 6)[1]).log_softmax(0))
    law, chance = enumerated(logp, 2, 3)
    assert float(logq[-1].exp()) > 4 * 0.2
    truth = divergence(logp, logq)
    assert means(law, chance, logq) == pytest.approx((truth, truth), abs=1e-12)


def test_unbiased_where_every_token_of_the_tail_is_loud():
    logp = torch.tensor([0.49, 0.47, 0.02, 0.01, 0.01], dtype=DOUBLE).log()
    logq = torch.tensor([0.01, 0.01, 0.3, 0.3, 0.38], dtype=DOUBLE).log()
    law, chance = enumerated(logp, 3, 3)
    truth = divergence(logp, logq)
    assert means(law, chance, logq) == pytest.approx((truth, truth), abs=1e-12)


def test_unbiased_where_q_has_ids_that_p_has_not():
    logp, wide = pair(2, 0.5)[0], pair(3, 1.0, 10)[1]
    law, chance = enumerated(logp, 3, 3, size=7)
    truth = divergence(logp, wide[:7])
    assert means(law, chance, wide) == pytest.approx((truth, truth), abs=1e-12)


def test_unbiased_where_p_excludes_tokens_and_only_if_that_is_said():
    logp, logq = pair(4, 0.4)
    logp = logp.index_fill(0, logp.topk(7).indices[[4, 6]], -torch.inf).log_softmax(0)
    truth = divergence(logp, logq)
    assert means(*enumerated(logp, 3, 2), logq) == pytest.approx((truth, truth), abs=1e-12)
    biased, plain = means(*enumerated(logp, 3, 2, whole=True), logq)
    assert plain == pytest.approx(truth, abs=1e-12)
    assert abs(biased - truth) > 1e-3


def spreads(logp, logq, k=3, count=4):
    """Standard deviation of both estimates over all sequences of draws."""
    law, chance = enumerated(logp, k, count)
    found = hybrid_kl(law, logq.expand(len(chance), -1))
    return [math.sqrt(float(chance @ (x - chance @ x).square())) for x in (found.kl, found.plain)]


def test_the_control_variate_removes_most_of_the_noise_between_close_laws():
    for spread, at_most in ((0.01, 0.02), (0.1, 0.12), (0.3, 0.4)):
        ours, plain = spreads(*pair(5, spread))
        assert ours < at_most * plain


def test_the_control_variate_adds_little_noise_between_distant_laws():
    for seed in range(6):
        ours, plain = spreads(*pair(seed, 4.0))
        assert ours < 1.25 * plain
    logp = torch.tensor([0.5, 0.2, 0.12, 0.1, 0.079, 0.001], dtype=DOUBLE).log()
    ours, plain = spreads(logp, loud(logp), k=2)
    assert ours < 1.25 * plain


def test_close_laws_give_no_negative_number():
    law, _ = enumerated(pair(6, 0.0)[0], 3, 3)
    for spread in (1e-6, 1e-3, 0.05):
        assert float(hybrid_kl(law, pair(6, spread)[1].expand(len(law), -1)).kl.min()) > 0


def test_equal_laws_are_at_zero():
    for dtype in (torch.float32, DOUBLE):
        logp = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=dtype).mul(3).log_softmax(0)
        law = law_of(logp, 30, logp.topk(500).indices[-32:].view(4, 8))
        assert float(hybrid_kl(law, logp.expand(4, -1)).kl.abs().max()) < (1e-12 if dtype == torch.float32 else 1e-20)


def test_tiny_divergences_survive_single_precision():
    z = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=DOUBLE).mul(2)
    logp = z.log_softmax(0)
    logq = (z + 1e-3 * torch.randn(2000, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)).log_softmax(0)
    draws = torch.multinomial(logp.scatter(0, logp.topk(1500).indices, -torch.inf).exp(), 6)[None]
    exact, rounded = (
        float(hybrid_kl(law_of(logp.to(dtype), 1500, draws), logq.to(dtype)[None]).kl)
        for dtype in (DOUBLE, torch.float)
    )
    assert exact == pytest.approx(divergence(logp, logq), rel=0.1)
    assert exact < 1e-6
    assert rounded == pytest.approx(exact, rel=1e-3)


def test_exact_where_nothing_was_left_to_draw():
    logp, logq = pair(7, 1.0)
    law = law_of(logp, 7, torch.zeros(1, 2, dtype=torch.long))
    law = Hybrid(law.tokens, law.logp, law.rest, law.draws, torch.full((1, 2), -torch.inf), law.whole)
    found = hybrid_kl(law, logq[None])
    truth = float(kl(logp, logq))
    assert (float(found.kl), float(found.plain)) == pytest.approx((truth, truth), rel=1e-12)


def test_rows_are_taken_on_their_own():
    logp, logq = pair(8, 0.5)
    law, chance = enumerated(logp, 3, 2)
    rows = logq.expand(len(chance), -1)
    whole = hybrid_kl(law, rows)
    parts = [hybrid_kl(law, rows[s], s) for s in (slice(0, 3), slice(3, len(rows)))]
    for name in whole._fields:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


# Infinite

LOGP = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=DOUBLE).log()
DRAWS = torch.tensor([[2, 3, 2, 2]])


def without(token):
    return torch.full((5,), 0.2, dtype=DOUBLE).log().index_fill(0, torch.tensor([token]), -torch.inf).log_softmax(0)


@pytest.mark.parametrize(("token", "mass", "named"), [(1, 0.3, 1), (2, 0.3 * 3 / 4, 2), (4, 1.1754944e-38, 4)])
def test_infinite_where_q_is_seen_to_exclude_a_token(token, mass, named):
    """Of a known one the mass is known, of a drawn one the draws say it, and of others only that there is some."""
    found = hybrid_kl(law_of(LOGP, 2, DRAWS), without(token)[None])
    assert float(found.kl) == float(found.plain) == math.inf
    assert float(found.lost) == pytest.approx(mass, rel=1e-6)
    assert int(found.excluded) == named


def test_an_exclusion_that_p_may_share_is_not_counted():
    found = hybrid_kl(law_of(LOGP, 2, DRAWS, whole=False), without(4)[None])
    assert bool(found.kl.isfinite())
    assert float(found.lost) == 0
    assert int(found.excluded) == -1


def test_infinite_where_q_excludes_the_whole_tail():
    logq = torch.tensor([0.5, 0.5, 0, 0, 0], dtype=DOUBLE).log()
    assert float(hybrid_kl(law_of(LOGP, 2, DRAWS), logq[None]).kl) == math.inf


def test_what_both_exclude_is_nothing():
    logp = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0], dtype=DOUBLE).log()
    logq = torch.tensor([0.2, 0.3, 0.3, 0.2, 0.0], dtype=DOUBLE).log()
    law = law_of(logp, 2, torch.tensor([[2, 2]]))
    assert float(hybrid_kl(law, logq[None]).kl) == pytest.approx(divergence(logp, logq), rel=1e-12)


# Statistics


def whole_law(logp, k, count, ends):
    """Laws with their scalars and draws, as a cache has them."""
    generator = torch.Generator().manual_seed(3)
    known = logp.topk(k)
    tail = logp.scatter(1, known.indices, -torch.inf)
    draws = torch.multinomial(tail.exp(), count, replacement=True, generator=generator)
    entropy = -(logp.exp() * logp).sum(1)
    end = logp[:, list(ends)].logsumexp(1)
    scalars = Scalars(
        logp[:, 4],
        entropy,
        (logp.exp() * (logp + entropy[:, None]).square()).sum(1),
        torch.stack([end, (1 - end.exp()).log()], 1),
    )
    whole = torch.ones(len(logp), dtype=torch.bool)
    return Hybrid(known.indices, known.values, tail.logsumexp(1), draws, logp.gather(1, draws), whole, None, scalars)


EXACT = ("logp", "logq", "entropy_p", "entropy_q", "variance_logp", "end_p", "end_q", "end_kl", "top_p", "top_q")


def test_statistics_are_those_of_the_whole_law_where_they_can_be():
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 300, 40, generator=generator)
    logp, logits_q, ends = (2 * z).log_softmax(1), 2 * z + 0.3 * noise + 5, (0, 7)
    tokens = torch.full((300,), 4)
    want = row_statistics(logp, logits_q, tokens, ends)
    law = whole_law(logp, 10, 6, ends)
    got = hybrid_statistics(law, logits_q, tokens, ends)
    for name in EXACT:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=2e-5, atol=2e-6)
    assert all(bool(getattr(got, name).isnan().all()) for name in ("reverse_kl", "total_variation", "variance_ratio"))
    for kind, tolerance in ((False, 0.004), (True, 0.02)):
        error = hybrid_statistics(law, logits_q, tokens, ends, plain=kind).kl.double() - want.kl
        assert abs(float(error.mean() / error.std() * 300**0.5)) < 4
        assert 0 < float(error.std()) < tolerance
    assert float(got.lost.max()) == 0
    assert int(got.excluded.max()) == -1


def test_the_text_shows_an_exclusion_too():
    logp = LOGP.float()[None]
    law = whole_law(logp, 2, 1, (0,))
    law = Hybrid(law.tokens, law.logp, law.rest, DRAWS[:, :1], law.logp[:, :1], ~law.whole, None, law.scalars)
    found = hybrid_statistics(law, without(4).float()[None], torch.tensor([4]), (0,))
    assert float(found.kl) == math.inf
    assert float(found.lost) == pytest.approx(0.05)
    assert int(found.excluded) == 4


def test_the_first_of_the_most_probable_tokens_is_the_top_one():
    logp = torch.tensor([[0.2, 0.3, 0.3, 0.1, 0.1]]).log()
    law = whole_law(logp, 2, 1, (0,))
    law = Hybrid(law.tokens.flip(1), law.logp, law.rest, law.draws, law.logp_draws, law.whole, None, law.scalars)
    assert int(hybrid_statistics(law, logp, torch.tensor([4]), (0,)).top_p) == 1


def test_what_does_not_fit_is_refused():
    law = law_of(LOGP, 2, DRAWS)
    with pytest.raises(ValueError, match=r"expected ids in 0..2, the tokens that q chooses from, got 2..3"):
        hybrid_kl(law, torch.zeros(1, 3, dtype=DOUBLE).log_softmax(1))
    with pytest.raises(ValueError, match="expected laws with what was worked out of them when whole, got none"):
        hybrid_statistics(law, LOGP[None], torch.tensor([1]), (0,))
