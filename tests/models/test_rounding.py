"""Rounded weights: the nearest values of each format, in every linear layer and nowhere else."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import KINDS, build, folder

from klkit.models.checkpoints import quiet
from klkit.models.rounding import linear_layers, round_weights, rounded, rounded_rows
from klkit.models.spec import load
from klkit.rng import stream


def weights(*shape, name="w"):
    return torch.randn(*shape, generator=stream(0, "rounding", name))


def nearest(row, grid):
    return grid[(row[:, None] - grid).abs().argmin(1)]


@pytest.mark.parametrize("bits", [4, 8])
def test_whole_numbers_are_the_nearest_of_a_symmetric_grid(bits):
    w, levels = weights(5, 70), 2 ** (bits - 1) - 1
    grid = torch.arange(-levels, levels + 1)
    got = rounded_rows(w, f"int{bits}")
    for row, new in zip(w, got, strict=True):
        assert torch.allclose(new, nearest(row, grid * row.abs().max() / levels))
    # A scale for every 32 columns; the last group is shorter.
    grouped = rounded_rows(w, f"int{bits}", 32)
    for start in (0, 32, 64):
        part = w[:, start : start + 32]
        assert torch.equal(grouped[:, start : start + 32], rounded(part, bits, dim=0))
    assert float((grouped - w).norm()) < float((got - w).norm())


def test_floating_formats():
    w = weights(4, 50) * torch.tensor([[1e-4], [1.0], [300.0], [0.0]])
    assert torch.equal(rounded_rows(w, "bfloat16"), w.bfloat16().float())
    assert torch.equal(rounded_rows(w, "float16"), w.half().float())
    # Every finite value of the eight-bit format, scaled so that the largest weight of a row is the largest value.
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = every[torch.isfinite(every)]
    got = rounded_rows(w, "float8_e4m3fn")
    for row, new in zip(w[:3], got[:3], strict=True):
        unit = row.abs().max() / 448
        assert torch.allclose((new - row).abs(), (nearest(row, grid * unit) - row).abs(), atol=1e-6 * float(unit))
    assert not got[3].any()


def test_the_dtype_stays_and_rounding_twice_changes_nothing():
    for dtype in (torch.float32, torch.float64):
        w = weights(3, 40).to(dtype)
        for kind in ("int8", "int4", "bfloat16", "float16", "float8_e4m3fn"):
            once = rounded_rows(w, kind)
            assert once.dtype == dtype
            assert torch.allclose(rounded_rows(once, kind), once, rtol=1e-6)
    assert rounded_rows(weights(3, 40).bfloat16(), "int4").dtype == torch.bfloat16


def test_what_a_format_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"at most 65504.* got one of 70000; round to bfloat16"):
        rounded_rows(torch.tensor([[1.0, 70000.0]]), "float16")


@pytest.mark.parametrize("kind", list(KINDS))
def test_linear_layers_and_nothing_else(kind):
    network = build(kind)
    before = {name: p.clone() for name, p in network.named_parameters()}
    note = round_weights(network, "int4")
    changed = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"{name}.weight" for name, _ in linear_layers(network)}
    assert not [name for name in changed if "embed" in name or "lm_head" in name or "norm" in name]
    assert note.startswith(f"rounded weights: {len(changed)} linear layers to int4, ")
    for name in changed:
        w = dict(network.named_parameters())[name].detach()
        rows = w.T if kind == "gpt2" else w
        assert max(len(row.unique()) for row in rows) <= 15, name


def test_packaged_rounding_is_the_same_scheme():
    assert torch.equal(
        load("klkit:docs,round=int4").model.transformer.h[3].mlp.c_fc.weight,
        load("klkit:docs-int4").model.transformer.h[3].mlp.c_fc.weight,
    )
    one, other = load("klkit:docs,round=int8"), load("klkit:docs-int8")
    assert one.digest == other.digest
    assert "78% of the parameters" in one.notes[0]


def test_layers_of_adapters_are_not_counted():
    network = build("llama")
    names = [name for name, _ in linear_layers(network)]
    with quiet():
        wrapped = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    found = [name.replace(".base_layer", "") for name, _ in linear_layers(wrapped.get_base_model())]
    assert found == names


def test_quantised_layers_are_refused():
    network = build("llama")
    layer = network.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(48 * 32 // 2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="whose weights are quantised or elsewhere"):
        round_weights(network, "int8")


def test_a_coarser_grid_is_farther_away():
    base = str(folder("llama"))
    plain = load(base)
    ids = torch.arange(5, 15)
    context = [ids]

    def distance(spec):
        model = load(spec)
        return float((model.readout(model.begin(context)[1]) - plain.readout(plain.begin(context)[1])).abs().max())

    far = [distance(f"{base},round={kind}") for kind in ("int4", "int4/8", "int8", "float16")]
    assert far == sorted(far, reverse=True)
    assert far[-1] > 0
