import itertools
import math

import numpy as np
import pytest

from klkit.rng import numpy_stream
from klkit.stats.pareto import EXACT, frontier_shares, hypervolume, non_dominated, permutation_test


def points(n, seed, grid=None):
    random = numpy_stream(seed, "pareto", n)
    cost, gain = random.normal(size=(2, n))
    return (cost, gain) if grid is None else (np.round(grid * cost) / grid, np.round(grid * gain) / grid)


def dominated_by_hand(cost, gain, j):
    return any(
        cost[i] <= cost[j] and gain[i] >= gain[j] and (cost[i], gain[i]) != (cost[j], gain[j]) for i in range(len(cost))
    )


@pytest.mark.parametrize("grid", [None, 2])  # the grid makes ties of every kind
@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_its_definition(seed, grid):
    cost, gain = points(40, seed, grid)
    assert non_dominated(cost, gain).tolist() == [not dominated_by_hand(cost, gain, j) for j in range(40)]


def test_frontiers_by_hand():
    assert non_dominated(np.array([]), np.array([])).tolist() == []
    assert non_dominated(np.array([1.0, 1.0]), np.array([1.0, 2.0])).tolist() == [False, True]
    assert non_dominated(np.array([1.0, 2.0]), np.array([1.0, 1.0])).tolist() == [True, False]
    assert non_dominated(np.array([1.0, 1.0]), np.array([1.0, 1.0])).tolist() == [True, True]


def test_shares_are_a_composition_of_the_pooled_frontier():
    cost, gain = np.array([0.0, 1.0, 1.0, 2.0, 3.0]), np.array([0.0, 2.0, 2.0, 1.0, 5.0])
    labels = np.array([7, 7, 8, 8, 9])
    assert frontier_shares(cost, gain, labels) == {7: 0.5, 8: 0.25, 9: 0.25}
    assert frontier_shares(cost, gain, labels, below=3.0) == {7: 2 / 3, 8: 1 / 3, 9: 0.0}
    assert all(math.isnan(share) for share in frontier_shares(cost, gain, labels, below=-1.0).values())


@pytest.mark.parametrize("seed", range(4))
def test_the_hypervolume_is_the_area_counted_on_a_fine_grid(seed):
    random = numpy_stream(seed, "area")
    cost, gain = random.integers(-3, 14, size=(2, 12)).astype(float)  # some beyond the reference point (10, 0)
    cells = itertools.product(np.arange(-3, 10) + 0.5, np.arange(0, 14) + 0.5)
    area = sum(bool(((cost <= c) & (gain >= g)).any()) for c, g in cells)
    assert hypervolume(cost, gain, worst_cost=10.0, worst_gain=0.0) == pytest.approx(area, abs=1e-12)


def test_hypervolumes_by_hand():
    one, two = np.array([1.0]), np.array([3.0])
    assert hypervolume(one, two, worst_cost=3.0, worst_gain=-1.0) == 8.0
    assert hypervolume(one, two, worst_cost=0.5, worst_gain=0.0) == 0.0
    assert hypervolume(one, two, worst_cost=3.0, worst_gain=4.0) == 0.0
    assert hypervolume(one[:0], two[:0], worst_cost=3.0, worst_gain=4.0) == 0.0
    with pytest.raises(ValueError, match="finite reference"):
        hypervolume(one, two, worst_cost=math.inf, worst_gain=0.0)
    with pytest.raises(ValueError, match="1 NaN"):
        non_dominated(one, np.array([math.nan]))


@pytest.mark.parametrize("layout", [[2, 2, 2], [3, 3], [2, 4, 1], [5]])
def test_small_tests_visit_every_arrangement_once(layout):
    """Against the definition: all orders of every block's units, equal ones counted as often as they occur."""
    random = numpy_stream(3, "layout", *layout)
    blocks = np.repeat(np.arange(len(layout)), layout)
    labels = np.concatenate([np.arange(n) % 2 for n in layout])
    value = random.normal(size=len(labels))

    def gap(dealt):
        return float(value[dealt == 0].sum() - value[dealt == 1].sum())

    units = [np.flatnonzero(blocks == b) for b in range(len(layout))]
    seen = []
    for orders in itertools.product(*(itertools.permutations(u) for u in units)):
        dealt = labels.copy()
        for u, order in zip(units, orders, strict=True):
            dealt[u] = labels[list(order)]
        seen.append(abs(gap(dealt)) >= abs(gap(labels)) - 1e-9)
    found = permutation_test(gap, labels, blocks.tolist(), random=random)
    assert found.exact
    assert found.p_value == pytest.approx(np.mean(seen))
    assert found.arrangements == math.prod(math.comb(n, n // 2) for n in layout)
    assert found.statistic == gap(labels)


def test_large_tests_draw_and_agree_with_the_exact_law():
    """16 pairs that all favour one label: by signs, two of 2^16 arrangements are as extreme."""
    labels, blocks = np.tile([0, 1], 16), np.repeat(np.arange(16), 2)
    value = np.where(labels == 0, 1.0, 0.0)

    def gap(dealt):
        return float(value[dealt == 0].sum() - value[dealt == 1].sum())

    assert EXACT < 2**16
    found = permutation_test(gap, labels, blocks, random=numpy_stream(0, "draws"), draws=999)
    assert not found.exact
    assert found.arrangements == 1000
    assert 0.001 <= found.p_value <= 0.003  # the given arrangement counts

    half = np.where(np.arange(32) < 8, value, 0.0)  # four pairs speak, twelve are silent: 2 of 2^4
    found = permutation_test(
        lambda d: float(half[d == 0].sum() - half[d == 1].sum()), labels, blocks, random=numpy_stream(1, "draws")
    )
    assert found.p_value == pytest.approx(1 / 8, abs=0.015)


def test_equal_methods_are_never_told_apart():
    labels, blocks = np.tile([0, 1, 2], 4), np.repeat(np.arange(4), 3)
    assert permutation_test(lambda d: 0.0, labels, blocks, random=numpy_stream(0, "none")).p_value == 1.0
    with pytest.raises(ValueError, match="a block for each of 12 labels, got 3"):
        permutation_test(lambda d: 0.0, labels, blocks[:3], random=numpy_stream(0, "none"))
