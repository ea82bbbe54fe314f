import csv
import json
import math

import numpy as np
import pytest
import torch

from klkit.api.prompts import read_prompts
from klkit.api.reproduce_gradient import FORMULAS, GradientStudy, Spread, estimated_gradients, spreads
from klkit.api.reproduce_report import gradient_words
from klkit.cli import main
from klkit.models.spec import load
from klkit.rng import stream
from klkit.sampling.ancestral import sample
from klkit.train.policy import Decisions


@pytest.fixture(scope="module")
def batch():
    p, q = load("klkit:reviews-positive"), load("klkit:reviews")
    contexts = [p.context(text) for text in read_prompts("klkit:reviews").contents[:3]]
    x = sample(p, contexts, max_tokens=20, seed=0).sequences
    return p, q, x, estimated_gradients(p, q, Decisions.of(x))


def by_hand(p, q, x, i):
    """``log p`` of a string's tokens and next-token divergences, from the networks alone."""
    tokens = x.tokens[i : i + 1, : int(x.stop[i])]
    start = int(x.start[i])
    logp, logq = (m.model(tokens).logits[0, start - 1 : -1].log_softmax(-1) for m in (p, q))
    drawn = tokens[0, start:, None]
    kl = (logp.exp() * (logp - logq.detach())).sum(-1)
    return logp.gather(1, drawn)[:, 0], logq.detach().gather(1, drawn)[:, 0], kl


def test_gradients_are_those_of_the_formulas_string_by_string(batch):
    """Each formula written out with a loop over tokens, and differentiated."""
    p, q, x, found = batch
    weights = [w for w in p.model.parameters() if w.requires_grad]
    losses = dict.fromkeys(set(FORMULAS) - {"mix"}, 0.0)
    for i in range(len(x)):
        logp, logq, kl = by_hand(p, q, x, i)
        u, d, n = (logp - logq).detach(), kl.detach(), len(logp)
        per_string = {
            "mc_full": u.sum() * logp.sum(),
            "mc": sum(u[j:].sum() * logp[j] for j in range(n)),
            "hybrid": sum((u[j] + d[j + 1 :].sum()) * logp[j] for j in range(n)),
            "rb": sum(kl[j] + d[j + 1 :].sum() * logp[j] for j in range(n)),
            "rb_full": kl.sum() + d.sum() * logp.sum(),
            "rb_detached": d.sum() * logp.sum(),
            "token_local": kl.sum(),
        }
        losses = {name: losses[name] + loss / len(x) for name, loss in per_string.items()}
    assert set(found) == set(losses)
    for name, loss in losses.items():
        wanted = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, weights, retain_graph=True)])
        assert float((found[name] - wanted).norm()) < 1e-4 * float(wanted.norm()), name


def test_spreads_are_those_of_the_textbook_and_biases_are_found():
    generator = stream(0, "spreads")
    k, d = 400, 30
    truth = torch.ones(d) / d**0.5
    shift = torch.zeros(d)
    shift[0] = 0.5
    gradients = {}
    scales = {
        "mc_full": 1.5,
        "mc": 1.0,
        "hybrid": 0.7,
        "rb_full": 2.0,
        "rb": 0.4,
        "rb_detached": 1.2,
        "token_local": 0.3,
    }
    for name, scale in scales.items():
        noise = scale * torch.randn(k, d, generator=generator)
        gradients[name] = truth + noise + (shift if name == "token_local" else 0)
    rows = {row["method"]: row for row in spreads(gradients, 0)}
    for name, values in gradients.items():
        row = rows[name]
        assert row["total"] == pytest.approx(float(values.var(0).sum()), rel=1e-4)
        assert row["norm"] == pytest.approx(float(values.norm(dim=1).var()), rel=1e-3)
        assert row["total_ratio"] == pytest.approx(row["total"] / rows["mc_full"]["total"])
        assert row["total_lower"] <= row["total_ratio"] <= row["total_upper"]
        if name != "token_local":
            assert abs(row["bias_z"]) < 4
            assert row["bias_lower"] < 0.2
    biased = rows["token_local"]
    assert biased["bias_lower"] < 0.5 < biased["bias_upper"]
    assert biased["bias_lower"] > 0.3
    assert biased["bias_z"] > 4
    # Independent estimators: the best mix has the harmonic sum of their variances.
    rb, mc = rows["rb"]["total"], rows["mc"]["total"]
    assert rows["mix"]["total"] == pytest.approx(1 / (1 / rb + 1 / mc), rel=0.05)


def test_words_follow_from_the_numbers():
    def row(step, method, ratio):
        z = 9.0 if method == "token_local" else 0.0
        return Spread(
            step=step, kl=1.0, kl_error=0.1, method=method, total=1.0, total_ratio=ratio, total_lower=ratio - 0.1,
            total_upper=ratio + 0.1, norm=ratio, norm_ratio=ratio, norm_lower=0.0, norm_upper=9.0, bias=0.1,
            bias_lower=0.0, bias_upper=0.2, bias_z=z,
        )  # fmt: skip

    rows = [row(step, method, ratio) for step, ratio in ((1, 0.5), (2, 1.0), (3, 2.0)) for method in FORMULAS]
    said = {line.split(" against")[0]: line for line in gradient_words(rows)}
    wanted = "total variance less at 1, more at 1, not resolved at 1 of 3 checkpoints (median ratio 1.000)"
    assert wanted in said["rb"]
    assert "variance of the norm less at 0, more at 0, not resolved at 3" in said["rb"]
    assert "resolved (z > 3) at 3 of 3" in said["token_local"]
    assert "resolved (z > 3) at 0 of 3" in said["rb_detached"]


def test_studies_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="increase from 1"):
        GradientStudy(checkpoints=(0, 5))
    with pytest.raises(ValueError, match="rollouts"):
        GradientStudy(rollouts=10)


def test_the_smoke_run_writes_its_files_and_goes_on_where_it_stopped(tmp_path, capsys):
    command = ["reproduce", "gradient", "--smoke", "--prompts", "4", "--rollouts", "16", "--workers", "1"]
    command += ["--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code in (0, None), capsys.readouterr().err
    first = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "gradient.csv").open()))
    assert [row["method"] for row in rows] == list(FORMULAS) * 2
    assert all(math.isfinite(float(value)) for row in rows for name, value in row.items() if name != "method")
    assert np.diff([float(row["kl"]) for row in rows[::8]])[0] != 0
    assert len(json.loads((tmp_path / "gradient.json").read_text())["rows"]) == 16
    for name in ("total", "norm"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for weights in (tmp_path / "runs").glob("*.safetensors"):
        weights.unlink()  # nothing is measured again, so nobody misses them
    with pytest.raises(SystemExit):
        main(command)
    assert capsys.readouterr().out == first
    with pytest.raises(SystemExit) as stop:
        main([*command, "--seed", "5"])
    assert stop.value.code == 2
    assert "same settings" in capsys.readouterr().err
