import math

import numpy as np
import pytest
from scipy import stats

from klkit.rng import numpy_stream
from klkit.stats.spread import Scatter, pooled_scatter, scatter_ratio


def test_the_interval_is_that_of_chi_squared():
    values = numpy_stream(0, "scatter").normal(size=(4, 5))
    found = pooled_scatter(values, numpy_stream(1, "scatter"))
    assert found.df == 16
    assert found.value == pytest.approx(math.sqrt(np.mean([np.var(row, ddof=1) for row in values])))
    bounds = [found.value * math.sqrt(16 / stats.chi2(16).ppf(level)) for level in (0.975, 0.025)]
    assert [found.lower, found.upper] == pytest.approx(bounds, rel=0.01)


def test_the_ratio_has_the_interval_of_f():
    first, second = Scatter(3.0, 0.0, 0.0, 16), Scatter(2.0, 0.0, 0.0, 8)
    found = scatter_ratio(first, second, numpy_stream(2, "scatter"))
    bounds = [1.5 / math.sqrt(stats.f(16, 8).ppf(level)) for level in (0.975, 0.025)]
    assert [found.value, found.lower, found.upper] == pytest.approx([1.5, *bounds], rel=0.01)
    assert math.isnan(scatter_ratio(first, Scatter(0.0, 0.0, 0.0, 8), numpy_stream(2, "scatter")).value)


def test_means_of_settings_do_not_count_and_single_runs_are_refused():
    values = numpy_stream(3, "scatter").normal(size=(3, 4))
    shifted = values + np.array([[0.0], [100.0], [-7.0]])
    one, two = (pooled_scatter(v, numpy_stream(4, "scatter")) for v in (values, shifted))
    assert one.value == pytest.approx(two.value)
    with pytest.raises(ValueError, match="two runs"):
        pooled_scatter(values[:, :1], numpy_stream(4, "scatter"))
