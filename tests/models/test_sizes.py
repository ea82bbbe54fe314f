"""Sizes of models: files, parameters, and bits for each, counted as the docstring says."""

import json
import shutil

import pytest
import torch
from tests.models.test_spec import adapter
from tests.tiny import build, folder

from klkit.models.automaton import coin
from klkit.models.family import open_family
from klkit.models.sizes import WeightSize, weight_files, weight_size
from klkit.models.spec import ModelSpec, load
from klkit.models.wrap import temperature


def size_of(text):
    spec = ModelSpec.parse(text)
    return weight_size(load(text), spec)


def distinct(network):
    return sum({p.data_ptr(): p.numel() for p in network.parameters()}.values())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom", "mamba"])
def test_a_folder(kind):
    path = folder(kind)
    file = path / "model.safetensors"
    (path / "pytorch_model.bin").write_bytes(b"another copy")
    size = size_of(str(path))
    (path / "pytorch_model.bin").unlink()
    parameters = distinct(build(kind))
    assert size == WeightSize(file.stat().st_size, parameters, 8 * file.stat().st_size / parameters)
    assert 32 <= size.bits_per_weight < 36  # fp32, and the header of a tiny file


def test_tied_weights_count_once():
    network = build("gpt2")
    assert network.lm_head.weight is network.transformer.wte.weight
    everything = sum(p.numel() for p in network.parameters())
    assert size_of(str(folder("gpt2"))).parameters == everything


def test_shards(tmp_path):
    whole = folder("llama")
    for file in whole.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert weight_files(ModelSpec.parse(str(tmp_path))) == shards
    size = size_of(str(tmp_path))
    assert size.file_bytes == sum(shard.stat().st_size for shard in shards)
    assert size.parameters == size_of(str(whole)).parameters
    shards[0].unlink()
    assert weight_files(ModelSpec.parse(str(tmp_path))) is None


def test_a_model_of_the_hub_lies_in_its_cache(tmp_path, monkeypatch):
    import huggingface_hub

    index, shard = tmp_path / "index.json", tmp_path / "shard"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}))
    shard.write_bytes(b"12345")
    there = {"model.safetensors.index.json": str(index), "model-1.safetensors": str(shard)}
    asked = []

    def cached(repository, name, revision):
        asked.append((repository, revision))
        return there.get(name)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert weight_files(ModelSpec.parse("org/name@v2")) == [shard]
    assert set(asked) == {("org/name", "v2")}
    there.clear()
    assert weight_files(ModelSpec.parse("org/name@v2")) is None


def test_adapters_count_with_their_base(tmp_path):
    base = str(folder("gpt2"))
    paths = [adapter(tmp_path / f"a{r}", base, r=r) for r in (2, 4)]
    plain = size_of(base)
    p, load_candidate = open_family(base, [f"peft={path}" for path in paths])
    with load_candidate(0), load_candidate(1) as q:  # the other one's weights lie beside them, and are not q's
        added = 2 * 4 * ((32 + 96) + (32 + 128))
        size = weight_size(q, ModelSpec.parse(f"{base},peft={paths[1]}"))
        assert size.parameters == plain.parameters + added
        file = tmp_path / "a4" / "adapter_model.safetensors"
        assert size.file_bytes == plain.file_bytes + file.stat().st_size
        assert weight_size(p, ModelSpec.parse(base)) == plain
    assert size == size_of(f"{base},peft={paths[1]}")


def test_rounded_weights_are_nominal():
    base = str(folder("llama"))
    plain = size_of(base)
    network = build("llama")
    linear = {n: p for n, p in network.named_parameters() if "proj" in n}
    inside = sum(p.numel() for p in linear.values())
    rows = sum(len(p) for p in linear.values())
    groups = sum(len(p) * -(-p.shape[1] // 10) for p in linear.values())
    for kind, bits, scales in (("int4", 4, rows), ("int8", 8, rows), ("int4/10", 4, groups), ("float16", 16, 0)):
        size = size_of(f"{base},round={kind}")
        wanted = bits * inside + 16 * scales + 32 * (plain.parameters - inside)
        assert size.bits_per_weight == pytest.approx(wanted / plain.parameters)
        assert (size.file_bytes, size.parameters) == (plain.file_bytes, plain.parameters)
        assert size.nominal.startswith(f"{len(linear)} layers at {bits} bits")


def test_without_files_memory_counts():
    model = load(str(folder("llama")), dtype="bfloat16")
    size = weight_size(temperature(model, 0.5))
    assert size == WeightSize(None, distinct(model.model), 16.0)


def test_packed_weights_are_counted_unpacked():
    class Packed(torch.nn.Module):
        """Two weights a byte and a scale an output, as four-bit layers keep them."""

        def __init__(self, layer):
            super().__init__()
            self.in_features, self.out_features = layer.in_features, layer.out_features
            self.weight = torch.nn.Parameter(
                torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False
            )
            self.register_buffer("scale", torch.ones(layer.out_features))

        def forward(self, x):
            return x.new_zeros(*x.shape[:-1], self.out_features)

    model = load(str(folder("llama")))
    plain = weight_size(model)
    mlp = model.model.model.layers[0].mlp
    count, outputs = mlp.up_proj.weight.numel(), mlp.up_proj.out_features
    mlp.up_proj = Packed(mlp.up_proj)
    size = weight_size(model)
    assert size.parameters == plain.parameters
    saved = 32 * count - 4 * count - 32 * outputs
    assert size.bits_per_weight == pytest.approx(32 - saved / plain.parameters)


def test_automata_have_no_weights():
    assert weight_size(temperature(coin(end=0.5), 0.5)) is None
