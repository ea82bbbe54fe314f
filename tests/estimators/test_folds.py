"""Moments mean what fitting takes them for, and add up however strings come."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from tests.bank import random_pair
from tests.enumeration import strings

from klkit.estimators.folds import Folds, Moments, deal
from klkit.estimators.statistics import score
from klkit.estimators.variates import token_features


def scored(p, q, max_tokens):
    everything = strings(p, max_tokens)
    return everything, score(p, q, everything.x, features=token_features(p.embedding(), 3))


def assert_close(a: Moments, b: Moments) -> None:
    for f in fields(Moments):
        assert np.allclose(getattr(a, f.name), getattr(b, f.name), rtol=1e-12, atol=1e-12), f.name


def test_moments_have_the_means_that_fitting_relies_on():
    everything, statistics = scored(*random_pair(4), 4)
    n = len(everything.x)
    alone = Folds.of(statistics, np.arange(n), n)  # each string in a fold of its own

    def mean(name):
        return torch.tensordot(everything.probability, torch.from_numpy(getattr(alone.moments, name)), 1)

    gram, e = mean("gram"), alone.moments.echo.shape[-1]
    assert torch.allclose(mean("going_on")[:e], gram[:e, :e], atol=1e-12)
    assert torch.allclose(mean("going_on")[e:], gram[e:, :e], atol=1e-12)
    assert mean("echo").abs().max() < 1e-12
    for i, known in enumerate(mean("known")):
        assert torch.allclose(known, gram[i * e : (i + 1) * e, i * e : (i + 1) * e], atol=1e-12)
    # Targets are covariances of the variates with what is still to come, and so with the whole string's sum.
    sums, total = torch.from_numpy(alone.sums), statistics.per_string(statistics.rows.kl)
    covariance = everything.probability @ (sums * total[:, None])
    assert torch.allclose(mean("target")[:, 0], covariance, atol=1e-12)
    # Sums of variates vary as the gram says: their increments are uncorrelated.
    squares = sums.T @ (everything.probability[:, None] * sums)
    assert torch.allclose(squares, gram, atol=1e-12)


def test_sums_by_fold_are_those_of_its_strings_however_they_come_in_batches():
    _, statistics = scored(*random_pair(5), 3)
    n = len(statistics.x)
    fold = np.random.default_rng(0).integers(0, 3, n)
    whole = Folds.of(statistics, fold, 4)
    for k in range(3):
        rows = torch.from_numpy(np.flatnonzero(fold == k))
        alone = Folds.of(statistics.select(rows), np.zeros(len(rows), dtype=np.int64), 1)
        assert_close(alone.moments[np.array([0])], whole.moments[np.array([k])])
        assert np.allclose(alone.sums, whole.sums[rows.numpy()], rtol=1e-12, atol=1e-14)
    assert whole.moments.strings.tolist() == [*np.bincount(fold), 0]
    parts = [Folds.of(statistics.select(rows), fold[rows.numpy()], 4) for rows in torch.randperm(n).split(4)]
    added = parts[0].moments
    for part in parts[1:]:
        added = added + part.moments
    assert_close(added, whole.moments)
    both = whole.moments.combined(np.array([[True, False, True, False], [False, False, False, False]]))
    assert np.allclose(both.gram[0], whole.moments.gram[0] + whole.moments.gram[2])
    assert not both.gram[1].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_tidying_drops_empty_folds_and_spoilt_columns_only(value):
    _, statistics = scored(*random_pair(12, symbols=4), 3)
    features = statistics.features.clone()
    assert features.shape[1] == 3
    features[7, 1] = value
    fold = 2 * (np.arange(len(statistics.x)) % 2)  # the second of three folds stays empty
    spoilt = Folds.of(replace(statistics, features=features), fold, 3)
    clean = Folds.of(replace(statistics, features=statistics.features[:, [0, 2]]), fold // 2, 2)
    tidy, left_out = spoilt.tidy()
    assert (left_out, spoilt.features, tidy.features) == (1, 3, 2)
    assert tidy.fold.tolist() == (fold // 2).tolist()
    assert np.allclose(tidy.sums, clean.sums, rtol=1e-12, atol=1e-14)
    assert_close(tidy.moments, clean.moments)


def test_a_cluster_is_dealt_whole_and_folds_are_even():
    cluster = np.repeat(np.arange(20), 3)[np.random.default_rng(1).permutation(60)]
    fold = deal(cluster)
    assert all(len(set(fold[cluster == k])) == 1 for k in range(20))
    assert sorted(np.bincount(fold)) == [6] * 4 + [9] * 4
    # A run knows its clusters beforehand, so each string can be dealt when it comes.
    assert np.array_equal(deal(np.arange(20))[cluster], fold)
    assert deal(np.array([5, 6])).max() == 1
