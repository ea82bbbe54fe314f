"""Noise of rounding size: after every layer of every architecture, the same each time, and gone afterwards."""

import pytest
import torch
from tests.models.test_spec import STRINGS, log_probs
from tests.tiny import KINDS, build, folder, tokenizer

from klkit.divergences.kl import kl
from klkit.models.automaton import coin
from klkit.models.checkpoints import quiet
from klkit.models.hf import HuggingFaceModel
from klkit.models.noise import decoder_layers, with_rounding_noise
from klkit.models.spec import load, load_pair
from klkit.models.wrap import innermost, temperature


@pytest.fixture(scope="module", params=list(KINDS))
def model(request):
    with quiet():
        return HuggingFaceModel(build(request.param), tokenizer(), name=request.param)


def test_every_layer_is_disturbed_and_none_afterwards(model):
    layers = decoder_layers(model)
    assert len(layers) == 2
    calm = model.encode(STRINGS)
    for layer in layers:
        seen = []
        handle = layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with_rounding_noise(model, 0.01).encode(STRINGS)
        model.encode(STRINGS)
        handle.remove()
        hidden = [out[0] if isinstance(out, tuple) else out for out in seen]
        # This hook came first, so it sees the noise of earlier layers only.
        assert torch.equal(*hidden) == (layer is layers[0])
    noisy = with_rounding_noise(model, 0.01)
    assert not torch.equal(noisy.encode(STRINGS), calm)
    assert torch.equal(noisy.encode(STRINGS), noisy.encode(STRINGS))
    assert not torch.equal(with_rounding_noise(model, 0.01, seed=1).encode(STRINGS), noisy.encode(STRINGS))
    assert torch.equal(with_rounding_noise(model, 0.0).encode(STRINGS), calm)
    assert torch.equal(model.encode(STRINGS), calm)
    assert not [hook for layer in layers for hook in layer._forward_hooks]


def test_the_divergence_is_quadratic_in_the_noise():
    model = load(str(folder("llama")), dtype="float64")
    found = []
    for scale in (1e-3, 1e-4):
        noisy = with_rounding_noise(model, scale)
        found.append(float(kl(log_probs(noisy), log_probs(model)).sum()))
    assert found[0] / found[1] == pytest.approx(100, rel=0.1)


def test_the_scale_follows_the_precision():
    base = str(folder("llama"))
    assert with_rounding_noise(load(base)).scale == 2**-25
    noisy = with_rounding_noise(load(base, dtype="bfloat16"))
    assert noisy.scale == 2**-9
    assert noisy.name == f"{base}|noise=0.002"
    assert noisy.encode(STRINGS).dtype == torch.bfloat16


def test_an_error_inside_leaves_no_hooks():
    model = load(str(folder("gpt2")))
    noisy = with_rounding_noise(model, 0.1)
    too_long = type(STRINGS).pack([torch.arange(60)], [torch.arange(9)])
    with pytest.raises(ValueError, match="expected at most 64 tokens"):
        noisy.encode(too_long)
    assert not [hook for layer in decoder_layers(model) for hook in layer._forward_hooks]


def test_strings_are_drawn_without_noise():
    model = load(str(folder("gpt2")))
    contexts = [STRINGS.context(0)]
    assert torch.equal(with_rounding_noise(model, 0.1).begin(contexts)[1], model.begin(contexts)[1])


def test_under_transformations_and_adapters():
    p, q = load_pair("klkit:docs-lora,temperature=0.5", "klkit:docs")
    for model in (p, q):
        noisy = with_rounding_noise(model, 1e-3)
        assert innermost(noisy) is innermost(model)
        assert 0 < float((log_probs(noisy) - log_probs(model)).abs().max()) < 0.5
    assert log_probs(with_rounding_noise(temperature(q, 0.5), 0.0)).equal(log_probs(temperature(q, 0.5)))


def test_what_has_no_layers_is_refused():
    with pytest.raises(ValueError, match=r"expected a network with decoder layers.* measure another floor"):
        with_rounding_noise(coin(end=0.5))
    model = load(str(folder("gpt2")))
    with pytest.raises(ValueError, match="expected a scale of noise of at least 0, got -1"):
        with_rounding_noise(model, -1.0)
    model.model.config.n_layer = 7
    with pytest.raises(ValueError, match="expected a list of 7 decoder layers"):
        with_rounding_noise(model)
