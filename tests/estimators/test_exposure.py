"""Accumulated error on a model's own prefixes: by hand, by enumeration, and where there is none."""

import math

import numpy as np
import pytest
import torch
from tests.bank import short_pair
from tests.enumeration import strings

from klkit.divergences.kl import kl
from klkit.estimators.exposure import exposure_bias
from klkit.estimators.statistics import score
from klkit.sampling.ancestral import sample
from klkit.sequences import Sequences


def packed(lengths, cluster=None):
    contexts = [torch.tensor([0])] * len(lengths)
    return Sequences.pack(contexts, [torch.ones(n, dtype=torch.long) for n in lengths], cluster=cluster)


def test_by_hand():
    own, given = packed([2, 1]), packed([3, 3])
    found = exposure_bias(torch.tensor([0.2, 0.7, 0.4]), own, torch.tensor([0.1, 0.2, 9.0, 0.3, 0.4, 9.0]), given)
    # The student's strings are gone after two positions. Means: .3, .7 against .2, .3.
    assert found.reach == 2
    np.testing.assert_allclose(found.own, [0.3, 1.0], rtol=1e-6)
    np.testing.assert_allclose(found.given, [0.2, 0.5], rtol=1e-6)
    assert found.value == pytest.approx(1.0)
    assert math.isnan(found.lower)


def test_positions_that_few_strings_reach_do_not_count():
    x = packed([1] * 30 + [5])
    values = torch.ones(35)
    assert exposure_bias(values, x, values, x).reach == 1


def test_no_error_is_no_bias_and_an_error_on_own_prefixes_alone_is_infinite():
    x = packed([2] * 12)
    zero, one = torch.zeros(24), torch.ones(24)
    found = exposure_bias(zero, x, zero, x)
    assert (found.value, found.lower, found.upper) == (0.0, 0.0, 0.0)
    assert exposure_bias(one, x, zero, x).value == math.inf


def enumerated(p, q):
    """``Σ_t E_law[D_t | still going]`` for both laws by enumeration, for as long as any string goes on."""
    totals = []
    for law in (q, p):
        every = strings(law, 4)
        x = every.x
        d = kl(p.readout(p.encode(x)), q.readout(q.encode(x)))
        mass = every.probability[x.row()]
        per_position = [
            float((mass * d)[x.position() == t].sum() / mass[x.position() == t].sum())
            for t in range(int(x.lengths.max()))
        ]
        totals.append(np.cumsum(per_position))
    return totals


@pytest.mark.parametrize("seed", [0, 1])
def test_the_estimate_and_its_interval_are_about_the_enumerated_value(seed):
    p, q = short_pair(seed)
    n = 1500
    own, given = (
        sample(law, [p.context(None)] * n, max_tokens=4, seed=s, prompt=[0] * n).sequences
        for s, law in enumerate((q, p))
    )
    rows_own, rows_given = score(p, q, own).rows.kl, score(p, q, given).rows.kl
    found = exposure_bias(rows_own, own, rows_given, given)
    r, e = enumerated(p, q)
    wanted = (r[found.reach - 1] - e[found.reach - 1]) / e[found.reach - 1]
    assert found.reach >= 3
    assert found.lower < wanted < found.upper
    assert found.upper - found.lower < 0.5
    np.testing.assert_allclose(found.own, r[: found.reach], rtol=0.15)
    np.testing.assert_allclose(found.given, e[: found.reach], rtol=0.15)
