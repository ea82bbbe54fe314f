"""Control variates: mean zero by enumeration, and moments that mean what they say."""

import pytest
import torch
from tests.bank import random_pair, short_pair
from tests.enumeration import strings

from klkit.estimators.statistics import score
from klkit.estimators.variates import ended, later, token_features, variates
from klkit.rng import stream


def scored(p, q, max_tokens):
    everything = strings(p, max_tokens)
    return everything, score(p, q, everything.x, features=token_features(p.embedding(), 3))


def by_prefix(x, values):
    """Sum rows of ``values`` over all decisions that follow one and the same prefix."""
    sums = {}
    for value, row, place in zip(values, x.row().tolist(), x.position().tolist(), strict=True):
        prefix = tuple(x.completion(row)[:place].tolist())
        sums[prefix] = sums.get(prefix, 0) + value
    return torch.stack(list(sums.values()))


@pytest.mark.parametrize("pair", [short_pair(), short_pair(1), random_pair(2)])
def test_every_product_has_mean_zero_given_the_prefix(pair):
    everything, statistics = scored(*pair, 4)
    v = variates(statistics)
    weight = everything.probability[statistics.x.row()][:, None]
    for columns in (v.end, v.other):
        assert by_prefix(statistics.x, weight * columns).abs().max() < 1e-12
        assert (weight * columns).abs().sum(0).min() > 0.01  # and none is zero throughout


def test_variances_given_the_prefix_are_the_known_ones():
    everything, statistics = scored(*random_pair(3), 4)
    v = variates(statistics)
    weight = everything.probability[statistics.x.row()][:, None]
    drawn = torch.stack([v.end[:, 0], v.other[:, 0], v.other[:, 2]], dim=1).square()
    assert by_prefix(statistics.x, weight * (drawn - v.variance)).abs().max() < 1e-12


def test_a_cut_string_has_no_end():
    everything, statistics = scored(*random_pair(6), 3)
    x = everything.x
    assert int(ended(statistics).sum()) == int(x.finished.sum()) < len(x)
    assert set(x.targets()[ended(statistics)].tolist()) == {random_pair(6)[0].vocabulary.ends[0]}


def test_later_sums_stay_within_strings():
    _, statistics = scored(*random_pair(7), 3)
    left = later(statistics, torch.ones(statistics.x.decisions, 1, dtype=torch.float64))[:, 0]
    assert torch.equal(left.long(), statistics.x.lengths[statistics.x.row()] - 1 - statistics.x.position())


def test_token_features_are_scaled_principal_components():
    table = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5, 3, 2, 1, 0.5]) + 4
    features = token_features(table, 4).double()
    assert features.shape == (40, 4)
    assert features.mean(0).abs().max() < 1e-6
    assert torch.allclose(features.T @ features / 40, torch.eye(4, dtype=torch.float64), atol=1e-5)
    centred = (table - table.mean(0)).double()
    along = (features.T @ centred / 40).norm(dim=1)  # standard deviations along the components, largest first
    assert torch.allclose(along, torch.linalg.svdvals(centred)[:4] / 40**0.5, atol=1e-5)
    assert torch.equal(token_features(table.clone(), 4), features.float())


@pytest.mark.parametrize(
    ("table", "rank"), [(torch.eye(5), 4), (torch.ones(5, 3), 0), (torch.arange(10.0)[:, None], 1)]
)
def test_token_features_stop_at_the_rank(table, rank):
    assert token_features(table, 16).shape == (len(table), rank)


@pytest.mark.parametrize("width", [6, 300])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_token_features_make_nothing_of_rows_that_are_garbage(width, garbage):
    table = torch.randn(400, width, generator=torch.Generator().manual_seed(1)) + 4
    padded = torch.cat([table, torch.full((2, width), garbage)])
    padded[-1, 1:] = 0.5  # one bad number is enough
    found = token_features(padded, 4)
    assert torch.isfinite(found).all()
    assert torch.equal(found[400:], torch.zeros(2, 4))
    # Counted as the mean, these rows only stretch the scale that makes the variance 1.
    torch.testing.assert_close(found[:400], token_features(table, 4) * (402 / 400) ** 0.5, rtol=1e-4, atol=1e-5)


def test_token_features_of_nothing_usable():
    assert token_features(torch.full((3, 2), torch.nan)).shape == (3, 0)
    mostly_zero = torch.zeros(50, 3)
    mostly_zero[0, 0], mostly_zero[1, 1] = 1.0, 1.0
    assert token_features(mostly_zero).shape == (50, 2)


def test_token_features_of_a_wide_embedding_capture_as_much_as_the_exact_ones():
    generator = stream(0, "wide")
    scales = torch.arange(1, 401).double() ** -0.7
    table = (torch.randn(900, 400, generator=generator, dtype=torch.float64) * scales) + 3.0
    features = token_features(table.float(), 8).double()
    centred = table - table.mean(0)
    exact = torch.linalg.svdvals(centred)[:8].square().sum()
    found = torch.linalg.qr(features).Q.T @ centred
    assert found.square().sum() > 0.99 * exact
    torch.testing.assert_close(features.mean(0), torch.zeros(8).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std(0, correction=0), torch.ones(8).double(), atol=1e-4, rtol=0)
