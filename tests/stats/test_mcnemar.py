from fractions import Fraction
from itertools import product
from math import comb

import pytest

from klkit.stats.mcnemar import mcnemar_p


def enumerated(b, c):
    """Probability, over all fair coins, of a split at least as uneven."""
    n = b + c
    return float(sum(Fraction(comb(n, k), 2**n) for k in range(n + 1) if abs(2 * k - n) >= abs(b - c)))


def test_every_small_table_against_the_sum_over_all_tables():
    for b, c in product(range(14), repeat=2):
        assert mcnemar_p(b, c) == pytest.approx(enumerated(b, c), rel=1e-15), (b, c)


def test_large_counts_do_not_overflow():
    assert 0 < mcnemar_p(5000, 5400) < 1e-3
    assert mcnemar_p(3000, 3000) == 1.0


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="at least 0"):
        mcnemar_p(-1, 3)
