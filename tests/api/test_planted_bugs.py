"""The classic bugs, planted in a whole run of a neural pair: the audit must fail, and must not fail without them."""

from dataclasses import replace

import pytest
import torch

import klkit.api.strings as strings
from klkit.api.run import measure
from klkit.api.settings import Settings
from klkit.models.spec import load_pair
from klkit.models.wrap import temperature, top_p

SETTINGS = Settings(p="klkit:docs-lora", q="klkit:docs", samples=256, max_tokens=48, floor="none")
real = strings.sample


@pytest.fixture(scope="module")
def pair():
    return load_pair("klkit:docs-lora", "klkit:docs")  # one set of weights, the adapter switched


class Misread:
    """A model that reads strings with left padding which nobody masked."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def encode(self, x):
        padding = torch.full((3,), self.model.vocabulary.ends[0])
        return self.model.encode(x.after([torch.cat([padding, x.context(i)]) for i in range(len(x))]))


def from_another_law(change):
    return lambda model, *arguments, **options: real(change(model), *arguments, **options)


def shifted(model, *arguments, **options):
    draw = real(model, *arguments, **options)
    return replace(draw, hidden=draw.hidden.roll(1, 0))


def padded(model, *arguments, **options):
    draw = real(model, *arguments, **options)
    return replace(draw, hidden=Misread(model).encode(draw.sequences))


def audited(pair, monkeypatch, sample):
    monkeypatch.setattr(strings, "sample", sample)
    return measure(*pair, SETTINGS).audit


@pytest.mark.parametrize(
    ("sample", "check"),
    [
        (from_another_law(lambda model: temperature(model, 0.9)), "surprisal_z"),
        (from_another_law(lambda model: top_p(model, 0.95)), "surprisal_z"),
        (shifted, "surprisal_z"),
        (padded, "log_ratio_z"),
    ],
    ids=["temperature", "top-p", "shift by one", "padding side"],
)
def test_planted(pair, monkeypatch, sample, check):
    audit = audited(pair, monkeypatch, sample)
    assert not audit["passed"]
    assert audit["checks"][check]["verdict"] == "fail"


def test_wrong_adapter(pair, monkeypatch):
    """The strings come from the base, since the adapter was not switched on for sampling."""

    def from_base(model, *arguments, **options):
        draw = real(pair[1], *arguments, **options)
        return replace(draw, hidden=model.encode(draw.sequences))

    audit = audited(pair, monkeypatch, from_base)
    assert not audit["passed"]
    assert audit["checks"]["log_ratio_z"]["verdict"] == "fail"


def test_nothing_planted(pair, monkeypatch):
    audit = audited(pair, monkeypatch, real)
    assert audit["passed"]
    assert all(check["verdict"] != "fail" for check in audit["checks"].values())
