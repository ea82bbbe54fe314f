"""The classic bugs, planted in a whole run of a neural pair: the audit must fail, and must not fail without them."""

from dataclasses import replace

import pytest
import torch

import klkit.api.batches as batches
from klkit.api.run import measure
from klkit.api.settings import Settings
from klkit.models.spec import load_pair
from klkit.models.wrap import temperature, top_p

SETTINGS = Settings(p="klkit:docs-lora", q="klkit:docs", samples=256, max_tokens=48)
real = batches.sample


@pytest.fixture(scope="module")
def pair():
    return load_pair("klkit:docs-lora", "klkit:docs")  # one set of weights, the adapter switched


class Delegate:
    """A model that does as another one does, but for what a subclass breaks."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)


class ReadsPadding(Delegate):
    """Samples with left padding that nobody masked."""

    def begin(self, contexts):
        padding = torch.full((3,), self.model.vocabulary.ends[0])
        return self.model.begin([torch.cat([padding, context]) for context in contexts])


class SamplesWithout(Delegate):
    """Samples with its adapter switched off, and reads with it on."""

    def __init__(self, model, base):
        super().__init__(model)
        self.base_model = base

    def begin(self, contexts):
        return self.base_model.begin(contexts)

    def advance(self, state, tokens):
        return self.base_model.advance(state, tokens)


class ReadsOneBehind(Delegate):
    """Predicts each token from the trunk vector before the right one, when it reads and when it samples."""

    def encode(self, x):
        return self.model.encode(x).roll(1, 0)


def from_another_law(change):
    return lambda model, *arguments, **options: real(change(model), *arguments, **options)


def shifted(model, *arguments, **options):
    draw = real(model, *arguments, **options)
    return replace(draw, hidden=draw.hidden.roll(1, 0))


def audited(pair, monkeypatch, sample):
    monkeypatch.setattr(batches, "sample", sample)
    return measure(*pair, SETTINGS).audit


@pytest.mark.parametrize(
    ("sample", "check"),
    [
        (from_another_law(lambda model: temperature(model, 0.9)), "surprisal_z"),
        (from_another_law(lambda model: top_p(model, 0.95)), "surprisal_z"),
        (shifted, "surprisal_z"),
    ],
    ids=["temperature", "top-p", "shift by one"],
)
def test_strings_that_are_not_from_p(pair, monkeypatch, sample, check):
    audit = audited(pair, monkeypatch, sample)
    assert not audit["passed"]
    assert audit["checks"][check]["verdict"] == "fail"


@pytest.mark.parametrize("broken", [ReadsPadding, SamplesWithout, ReadsOneBehind], ids=lambda cls: cls.__name__)
def test_a_model_whose_two_passes_differ(pair, broken):
    p, q = pair
    audit = measure(broken(p, q) if broken is SamplesWithout else broken(p), q, SETTINGS).audit
    assert not audit["passed"]
    assert audit["checks"]["two_passes"]["verdict"] == "fail"


def test_an_adapter_that_is_nowhere_active(pair):
    """Then both sides are one model, up to rounding."""
    base = pair[1]
    result = measure(Delegate(base), base, SETTINGS)
    assert result.headline.value < 1e-9
    assert result.audit["checks"]["no_difference_share"]["verdict"] == "warn"


def test_nothing_planted(pair, monkeypatch):
    audit = audited(pair, monkeypatch, real)
    assert audit["passed"]
    assert all(check["verdict"] != "fail" for check in audit["checks"].values())
