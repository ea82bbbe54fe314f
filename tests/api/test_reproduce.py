import csv
import json

import pytest
import torch

import klkit
from klkit.api.reproduce import estimator_table, reproduce_estimators, save_table
from klkit.estimators.statistics import score
from klkit.models.automaton import random_automaton
from klkit.rng import stream
from klkit.sampling.ancestral import sample


@pytest.fixture(scope="module")
def pair():
    generator = stream(8, "reproduce")
    return tuple(random_automaton(3, 6, generator=generator) for _ in range(2))


@pytest.fixture(scope="module")
def pool(pair):
    p, q = pair
    prompts = [k for k in range(8) for _ in range(60)]
    x = sample(p, [p.context(None)] * len(prompts), max_tokens=200, seed=0, prompt=prompts).sequences
    return score(p, q, x, batch_size=480, features=p.embedding())


def test_the_table_agrees_with_the_exact_answers(pair, pool):
    truth = klkit.exact(*pair)
    rows = {(row.method, row.strings): row for row in estimator_table(pool).rows}
    for method, variance in (("mc", truth.variance_mc), ("rb", truth.variance_rb)):
        row = rows[method, 1]
        assert abs(row.mean - truth.value) < 4 * row.mean_error
        assert abs(row.std - variance**0.5) < 5 * row.std_error
        assert rows[method, 10].std == pytest.approx(row.std / 10**0.5, rel=0.25)
    assert rows["rb", 1].negative == 0
    assert rows["mc", 1].negative > 0
    assert rows["rb_cv", 5].std < rows["rb", 5].std


def test_uneven_and_small_pools_are_refused(pool):
    with pytest.raises(ValueError, match="equally many"):
        estimator_table(pool.select(torch.arange(100)))
    with pytest.raises(ValueError, match="at least 20"):
        reproduce_estimators("klkit:docs", "klkit:docs", prompts="klkit:docs", count=2, pool=5, max_tokens=8, seed=0)


def test_files_of_a_small_reproduction(tmp_path):
    table = reproduce_estimators(
        "klkit:docs-tuned", "klkit:docs", prompts="klkit:docs", count=4, pool=20, max_tokens=8, seed=0
    )
    save_table(table, tmp_path)
    assert table.prompts == 4
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert len(rows) == len(json.loads((tmp_path / "table.json").read_text())["rows"]) == 18
    assert "Rao-Blackwell with variates" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "per_prompt.png").read_bytes().startswith(b"\x89PNG")
