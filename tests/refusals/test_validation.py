"""What any measurement must satisfy, on models whose answers are known; and what it must not be called."""

import math

import pytest
import torch
from tests.bank import C4, short_pair
from tests.enumeration import strings
from tests.tiny import build, folder, tokenizer

import klkit
from klkit.estimators.statistics import score
from klkit.models.automaton import memoryless
from klkit.models.hf import HuggingFaceModel
from klkit.models.wrap import temperature
from klkit.sequences import Prompts, Sequences

FEW = {"samples": 40, "max_tokens": 40, "floor": "none"}


def tiny(seed=0, kind="gpt2"):
    return HuggingFaceModel(build(kind, seed=seed), tokenizer(), name=f"{kind}.{seed}")


def some_strings(count=5):
    """Strings of several lengths behind contexts of several lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(1 + i % 3, 2 + i % 4) for i in range(count)]
    ids = [[torch.randint(1, 300, (n,), generator=generator) for n in pair] for pair in lengths]
    return Sequences.pack([c for c, _ in ids], [y for _, y in ids])


# Intervals


def test_fewer_than_ten_prompts_give_an_estimate_without_an_interval_and_the_reason():
    p, q = tiny(), tiny(1)
    prompts = Prompts(tuple(f"the film {i}" for i in range(9)))
    result = klkit.estimate(p, q, prompts, samples=2, max_tokens=4, floor="none")
    assert result.headline.value > 0
    assert math.isnan(result.headline.interval().lower)
    assert "nats per response, no interval (fewer than 10 clusters)" in result.sentence
    assert result.to_dict()["headline"]["ci"]["lower"] == "nan"
    assert klkit.estimate(C4.p, C4.q, **{**FEW, "samples": 10}).headline.interval().lower > 0


def test_no_difference_is_never_a_test_of_zero():
    # KL of two models that differ is above 0: the question is how large it is, so there is no p-value to misread.
    record = klkit.estimate(C4.p, C4.q, **FEW).to_dict()

    def names(value):
        if isinstance(value, dict):
            yield from value
            value = list(value.values())
        for inner in value if isinstance(value, list) else ():
            yield from names(inner)

    assert not [name for name in names(record) if "p_value" in str(name) or "significant" in str(name)]


# A fixed text is not a sample of p


def test_a_fixed_text_is_labelled_as_that_text_and_never_as_responses(tmp_path):
    text = tmp_path / "wiki.txt"
    text.write_text("the film was a quiet triumph\n" * 12)
    result = klkit.estimate(str(folder("gpt2")), str(folder("gpt2", seed=1)), text=str(text))
    assert {e.estimand for e in result.estimates} == {"F"}
    assert "nats per token of this text" in result.sentence
    assert "per response" not in result.sentence
    assert not result.lower_bound
    assert result.audit["exempt"].startswith("the text was given, not drawn from p")
    with pytest.raises(ValueError, match="nothing is sampled: every token of the text is scored once"):
        klkit.estimate(str(folder("gpt2")), str(folder("gpt2", seed=1)), text=str(text), samples=4)


# Numbers that are known


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_is_exactly_itself_at_identical_shapes(kind):
    p, again = tiny(kind=kind), tiny(kind=kind)
    result = klkit.estimate(p, p, **{**FEW, "max_tokens": 6})
    for estimate in result.estimates:
        assert (estimate.value, estimate.stderr) == (0, 0), estimate.method
    rows = score(p, again, some_strings()).rows  # two copies, in the same batches
    assert (rows.kl == 0).all()
    assert (rows.logp == rows.logq).all()
    assert result.companions["same_top"]["value"] == 1.0
    assert "same top-1 100.0%" in result.lines["per token"]


def test_rao_blackwell_and_monte_carlo_are_held_against_each_other():
    result = klkit.estimate(C4.p, C4.q, **{**FEW, "samples": 200})
    check = result.audit["checks"]["mc_against_rb_z"]
    assert check["verdict"] == "pass"
    assert abs(check["value"]) < check["threshold"]
    assert "mc_against_rb_z" in result.lines["audit"]


def test_the_order_and_the_company_of_strings_change_nothing_in_single_precision():
    p, q, x = tiny(), tiny(1), some_strings()
    whole = score(p, q, x).strings().kl
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.allclose(score(p, q, x.select(order)).strings().kl, whole[order], rtol=1e-5)
    assert torch.allclose(score(p, q, x, batch_size=1).strings().kl, whole, rtol=1e-5)


def test_the_side_of_the_padding_changes_nothing_in_single_precision():
    # Strings are read right-padded, and drawn left-padded.
    model, x = tiny(), some_strings()
    first = x.lengths.cumsum(0) - x.lengths
    right = model.readout(model.encode(x))[first]
    left = model.readout(model.begin([row[:start] for row, start in zip(x.tokens, x.start.tolist(), strict=True)])[1])
    assert torch.allclose(left, right, atol=1e-5)


def test_divergences_add_up_along_the_chain():
    # KL of the laws of whole strings, a plain sum over all strings, is that of the decisions along them.
    p, q = short_pair()
    every = strings(p, 5)
    scored = score(p, q, every.x)
    whole = every.mean(scored.per_string(scored.log_ratio))
    assert every.mean(scored.per_string(scored.rows.kl)) == pytest.approx(whole, rel=1e-12)
    assert klkit.exact(p, q).value == pytest.approx(whole, rel=1e-12)
    by_length = [klkit.exact(p, q, max_tokens=n).value for n in range(1, 6)]
    assert by_length == sorted(by_length)
    assert by_length[-1] == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("t", [0.5, 1.25, 3.0])
def test_a_known_temperature_gives_its_known_divergence(t):
    law, end = [0.5, 0.3, 0.2], 0.25
    row = torch.tensor([0.75 * a for a in law] + [end], dtype=torch.float64)
    warm = (row.log() / t).softmax(-1)
    wanted = float((row * (row / warm).log()).sum()) / end
    p = memoryless(law, end=end)
    assert klkit.exact(p, temperature(p, t)).value == pytest.approx(wanted, rel=1e-12)
    result = klkit.estimate(p, temperature(p, t), **{**FEW, "samples": 400, "max_tokens": 200})
    assert abs(result.headline.value - wanted) <= 4 * result.headline.stderr + 1e-12


def test_a_wrong_temperature_fails_the_audit(monkeypatch):
    # What the checks are for: strings of a warmer p passed off as those of p.
    import klkit.api.batches as drawn

    real = drawn.sample
    monkeypatch.setattr(drawn, "sample", lambda model, *a, **o: real(temperature(model, 3.0), *a, **o))
    p, q = memoryless([0.9, 0.1], end=0.25), memoryless([0.8, 0.2], end=0.25)
    result = klkit.estimate(p, q, **{**FEW, "samples": 400})
    assert result.failed
    assert str(result).startswith("THE SELF-AUDIT FAILED: do not use this number.")
    assert result.lines["audit"].startswith("FAILED: ")
