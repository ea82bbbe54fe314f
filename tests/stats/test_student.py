import math

import pytest
from scipy import stats

from klkit.stats.student import student_quantile


@pytest.mark.parametrize("df", [2, 2.5, 3, 9, 31.7, 63, 199, 200, 201, 399, 1e4, 1e7])
@pytest.mark.parametrize("probability", [0.5, 0.5001, 0.8, 0.95, 0.975, 0.9995])
def test_agrees_with_scipy(probability, df):
    expected = stats.t.ppf(probability, df)
    assert student_quantile(probability, df) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert student_quantile(1 - probability, df) == pytest.approx(-expected, rel=1e-8, abs=1e-8)


def test_one_degree_of_freedom_is_cauchy_and_infinity_is_normal():
    assert student_quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)
    assert student_quantile(0.975, math.inf) == pytest.approx(stats.norm.ppf(0.975), rel=1e-12)


@pytest.mark.parametrize(("probability", "df"), [(0.0, 5), (1.0, 5), (math.nan, 5), (0.9, 0.5), (0.9, math.nan)])
def test_rejects_what_has_no_quantile(probability, df):
    with pytest.raises(ValueError, match="degree of freedom"):
        student_quantile(probability, df)
