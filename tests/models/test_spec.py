"""Specs, and what is loaded from them: folders, adapters, and every way in which a checkpoint can be wrong."""

import json
import shutil
import socket

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tests.tiny import build, folder, tokenizer

from klkit.models.checkpoints import quiet
from klkit.models.spec import ModelSpec, candidate_spec, load, load_network, load_pair, spec_with
from klkit.models.wrap import temperature, top_k, top_p
from klkit.sequences import Sequences

STRINGS = Sequences.pack(
    [torch.tensor([5, 6, 7]), torch.tensor([9])], [torch.tensor([11, 12, 0]), torch.tensor([8, 200, 31, 4, 0])]
)


def log_probs(model):
    return model.readout(model.encode(STRINGS))


def adapter(path, base, *, seed=0, words=False, **settings):
    """Save a LoRA adapter with random weights (by default one of its factors starts at zero)."""
    network = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM", **settings}
    generator = torch.Generator().manual_seed(seed)
    with quiet():
        wrapped = get_peft_model(network, LoraConfig(**settings))
        for _name, weight in wrapped.named_parameters():
            if weight.requires_grad:
                weight.data.normal_(0.0, 0.3, generator=generator)
        wrapped.save_pretrained(path)
    if words:
        tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def base():
    return str(folder("gpt2"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, base):
    root = tmp_path_factory.mktemp("adapters")
    return [adapter(root / f"tuned.{i}", base, seed=i) for i in range(2)]


class TestParse:
    def test_fields(self):
        spec = ModelSpec.parse("org/name@v1, dtype=bfloat16, peft=org/lora, trust_remote_code=true, ends=2+7")
        assert (spec.path, spec.revision, spec.dtype, spec.peft) == ("org/name", "v1", "bfloat16", "org/lora")
        assert spec.trust_remote_code
        assert spec.end_ids() == (2, 7)
        assert ModelSpec.parse("x", ends=[2, 7]) == ModelSpec.parse("x,ends=2+7")
        assert ModelSpec.parse("x,dtype=float16", dtype="float64").dtype == "float64"

    def test_all_spellings_have_one_canonical_form(self, base):
        one = ModelSpec.parse(f"{base},dtype=float64,attn=eager,safetensors=yes")
        two = ModelSpec.parse(f"{base}/../{base.rsplit('/', 1)[1]},attn=eager,dtype=float64,device=cpu")
        assert one.canonical() == two.canonical()
        assert ModelSpec.parse(one.canonical()).canonical() == one.canonical()

    def test_transformations_are_part_of_it(self):
        spec = ModelSpec.parse("x,top_p=0.50,temperature=0.9,top_k=40,round=int4/32")
        assert (spec.temperature, spec.top_k, spec.top_p, spec.rounding()) == (0.9, 40, 0.5, ("int4", 32))
        assert spec.canonical() == "x,round=int4/32,temperature=0.9,top_k=40,top_p=0.5"
        assert (
            ModelSpec.parse(spec.canonical())
            == spec
            == ModelSpec.parse("x,round=int4/32", **{"temperature": 0.9, "top_k": 40, "top_p": 0.5})
        )
        assert spec.untransformed().canonical() == "x,round=int4/32"
        network = ModelSpec.parse("x,peft=y,tokenizer=z,ends=2,top_k=3,dtype=float64,round=int8").network()
        assert network.canonical() == "x,dtype=float64,round=int8"

    def test_folders_may_hold_an_at_sign(self, tmp_path):
        (tmp_path / "a@b").mkdir()
        assert ModelSpec.parse(f"{tmp_path}/a@b").revision is None

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("x,devise=cpu", "got 'devise'; did you mean device"),
            ("x,dtype", "of the form NAME=VALUE"),
            ("x,dtype=float32,dtype=float64", "each once"),
            ("x,dtype=fp8", "dtype to be one of float32, float64, bfloat16, float16, auto, got 'fp8'"),
            ("x,quantization=3bit", "quantization to be one of 8bit, 4bit"),
            ("x,trust_remote_code=maybe", "true or false, got 'maybe'"),
            ("x,ends=two", "ids joined by"),
            (",dtype=float32", "before the first comma"),
            (
                "x,temperature=0",
                "temperature to be a positive finite number, got '0'; .* greedy decoding write top_k=1",
            ),
            ("x,temperature=inf", "temperature to be a positive finite number, got 'inf'"),
            ("x,temperature=nan", "temperature to be a positive finite number, got 'nan'"),
            ("x,temperature=warm", "temperature to be a positive finite number, got 'warm'; write temperature=0.9"),
            ("x,top_k=0", "top_k to be a whole number of at least 1, got '0'; write top_k=40"),
            ("x,top_k=2.5", "top_k to be a whole number of at least 1, got '2.5'"),
            ("x,top_p=1.5", "top_p to be a number above 0 and at most 1, got '1.5'"),
            ("x,round=int3", "round to be one of int4, int8, .*, got 'int3'"),
            ("x,round=int4/0", "a group such as int4/32"),
            ("x,round=float16/32", "one scale an output or none: write round=float16"),
            ("x,round=int4,quantization=4bit", "either round or quantization"),
        ],
    )
    def test_wrong_options(self, text, message):
        with pytest.raises(ValueError, match=message):
            ModelSpec.parse(text)


class TestCandidate:
    @pytest.mark.parametrize(
        ("p", "text", "wanted"),
        [
            ("org/p", "temperature=0.9", "org/p,temperature=0.9"),
            ("org/p@v1,dtype=float64,round=int8", "round=int4, top_k=3", "org/p@v1,dtype=float64,round=int4,top_k=3"),
            ("org/p,peft=./a", "peft=./b", "org/p,peft=./b"),
            ("org/p", "org/q,temperature=0.9", "org/q,temperature=0.9"),
            ("org/p", "./lr=0.1", "./lr=0.1"),
            ("org/p", "runs/lr=0.1/last", "runs/lr=0.1/last"),
            ("klkit:docs-lora", "peft=./b", "klkit:docs,peft=./b"),
            ("klkit:docs-lora", "temperature=0.9", "klkit:docs-lora,temperature=0.9"),
        ],
    )
    def test_options_alone_go_to_p(self, p, text, wanted):
        assert candidate_spec(p, text) == wanted
        assert candidate_spec(p, wanted) == wanted

    def test_a_folder_called_like_an_option(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "temperature=0.9").mkdir()
        assert candidate_spec("org/p", "temperature=0.9") == "temperature=0.9"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("temprature=0.9", "expected one of the options .* got 'temprature'; did you mean temperature"),
            ("colour=red", "got 'colour'"),
            ("temperature=0.9,org/q", "of the form NAME=VALUE, each once, .* got 'org/q'"),
            ("temperature=0.9,temperature=0.8", "each once"),
            ("temperature=", "of the form NAME=VALUE"),
        ],
    )
    def test_what_is_no_option(self, text, message):
        with pytest.raises(ValueError, match=message):
            candidate_spec("org/p", text)

    def test_defaults(self):
        defaults = {"device": "cuda", "dtype": "float16"}
        assert spec_with("x,device=cpu", defaults).device == "cpu"
        assert spec_with("x", defaults) == ModelSpec.parse("x,device=cuda,dtype=float16")
        assert spec_with("x,device_map=auto", defaults) == ModelSpec.parse("x,device_map=auto,dtype=float16")


class TestLoad:
    def test_a_folder_without_network_or_noise(self, base, monkeypatch, capfd):
        def refuse(*_):
            raise AssertionError("a local folder asked for the network")

        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        monkeypatch.setattr(socket.socket, "connect", refuse)
        logging = transformers.utils.logging
        before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        model = load(base)
        assert capfd.readouterr() == ("", "")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
        assert (model.name, model.dtype, model.notes) == (base, torch.float32, ())
        wanted = torch.log_softmax(build("gpt2")(torch.tensor([[9, 8, 200, 31, 4]])).logits[0], -1)
        assert torch.allclose(log_probs(model)[3:], wanted, atol=1e-5)

    def test_options_arrive(self, base):
        model = load(f"{base},dtype=float64,attn=eager", ends=[3, 5], name="mine")
        assert (model.name, model.dtype, model.vocabulary.ends) == ("mine", torch.float64, (3, 5))
        assert model.model.config._attn_implementation == "eager"
        assert load(base, dtype="bfloat16").dtype == torch.bfloat16

    def test_read_outs_are_mapped_in_the_order_of_decoders(self, base):
        text = f"{base},top_p=0.9,top_k=30,temperature=1.5"
        model = load(text)
        assert (model.name, model.base.base.base.name) == (text, text)
        plain = load(base)
        assert torch.equal(log_probs(model), log_probs(top_p(top_k(temperature(plain, 1.5), 30), 0.9)))
        assert load(base, temperature=0.5, name="cold").name == "cold"
        assert torch.equal(log_probs(load(base, temperature=0.5)), log_probs(temperature(plain, 0.5)))
        with pytest.raises(
            ValueError, match=r"without a map of its read-out, got top_k=30, top_p=0\.9 .*leave them out"
        ):
            load_network(f"{base},top_k=30,top_p=0.9")
        assert load_network(f"{base},round=int4").digest == load(f"{base},round=int4").digest != plain.digest

    def test_tokenizer_elsewhere(self, tmp_path, base):
        build("gpt2").save_pretrained(tmp_path / "bare")
        assert load(f"{tmp_path}/bare,tokenizer={base}").context("the film").tolist()
        # transformers itself makes up an empty tokenizer here.
        with pytest.raises(ValueError, match=r"expected a tokenizer with ordinary tokens.* tokenizer=FOLDER"):
            load(f"{tmp_path}/bare")

    @pytest.mark.parametrize("path", ["./nothing/here", "/nothing/here", "a/b/c"])
    def test_no_such_folder(self, path):
        with pytest.raises(FileNotFoundError, match=r"expected a folder with a checkpoint.* which is not there"):
            load(path)

    def test_a_file(self, base):
        with pytest.raises(FileNotFoundError, match="which is a file"):
            load(f"{base}/config.json")

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config\.json, got .*, which holds nothing"):
            load(str(tmp_path))

    def test_an_id_that_neither_hub_nor_cache_provides(self):
        with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE=1.*hf download nobody/nothing"):
            load("nobody/nothing")

    def test_an_unknown_packaged_name(self):
        with pytest.raises(ValueError, match="expected one of the packaged models"):
            load("klkit:nothing")

    def test_missing_weights_are_not_made_up(self, tmp_path, base):
        from safetensors.torch import load_file, save_file

        shutil.copytree(base, tmp_path / "holes")
        file = tmp_path / "holes" / "model.safetensors"
        weights = load_file(file)
        kept = {name: w for name, w in weights.items() if "h.1.mlp.c_fc.bias" not in name}
        assert len(kept) == len(weights) - 1
        save_file(kept, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"expected all weights of GPT2LMHeadModel.*h\.1\.mlp\.c_fc\.bias"):
            load(f"{tmp_path}/holes")

    def test_unused_weights_are_noted(self, tmp_path, base):
        from safetensors.torch import load_file, save_file

        shutil.copytree(base, tmp_path / "more")
        file = tmp_path / "more" / "model.safetensors"
        save_file({**load_file(file), "extra.head": torch.zeros(2)}, file, metadata={"format": "pt"})
        assert "extra.head" in load(f"{tmp_path}/more").notes[0]

    def test_pickles_only_when_asked_for(self, tmp_path, base):
        shutil.copytree(base, tmp_path / "pickled")
        (tmp_path / "pickled" / "model.safetensors").unlink()
        torch.save(build("gpt2").state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
        with pytest.raises(ValueError, match="add safetensors=false"):
            load(f"{tmp_path}/pickled")
        assert torch.equal(log_probs(load(f"{tmp_path}/pickled,safetensors=false")), log_probs(load(base)))

    def test_code_is_not_run_unless_asked(self, tmp_path, base):
        shutil.copytree(base, tmp_path / "coded")
        file = tmp_path / "coded" / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
        with pytest.raises(ValueError, match="brings its own code"):
            load(f"{tmp_path}/coded")

    def test_no_causal_language_model(self, tmp_path):
        transformers.T5Config(d_model=8).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="expected a causal language model that transformers can read"):
            load(str(tmp_path))

    def test_missing_libraries_and_devices(self, base, monkeypatch):
        import importlib.util

        find = importlib.util.find_spec
        absent = {"bitsandbytes", "accelerate", "peft"}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else find(name, *a))
        for option, library in [("quantization=8bit", "bitsandbytes"), ("device_map=auto", "accelerate")]:
            with pytest.raises(ImportError, match=f"expected the library {library}"):
                load(f"{base},{option}")
        with pytest.raises(ImportError, match="expected the peft library"):
            load(f"{base},peft={base}")
        with pytest.raises(ValueError, match="expected a device such as cpu"):
            load(f"{base},device=toaster")


class TestPair:
    def test_one_spec_is_one_model(self, base):
        p, q = load_pair(base, f"{base},device=cpu")
        assert p is q

    def test_other_settings_are_other_models(self, base):
        p, q = load_pair(base, f"{base},dtype=float64")
        assert (p.dtype, q.dtype) == (torch.float32, torch.float64)

    def test_adapters_share_their_base(self, base, adapters):
        for one, two in [(base, f"{base},peft={adapters[0]}"), tuple(f"{base},peft={a}" for a in adapters)]:
            p, q = load_pair(one, two)
            weights = [m.model.transformer.h[0].attn.c_attn.base_layer.weight.data_ptr() for m in (p, q)]
            assert weights[0] == weights[1]
            assert (p.name, q.name) == (one, two)
            for model, spec in ((q, two), (p, one), (q, two)):
                network = transformers.AutoModelForCausalLM.from_pretrained(base)
                if "peft=" in spec:
                    network = PeftModel.from_pretrained(network, spec.split("peft=")[1]).merge_and_unload()
                for i in range(2):
                    logits = network(STRINGS.tokens[i : i + 1, : int(STRINGS.stop[i])]).logits[0]
                    wanted = torch.log_softmax(logits, -1)[int(STRINGS.start[i]) - 1 : int(STRINGS.stop[i]) - 1]
                    got = torch.split(log_probs(model), STRINGS.lengths.tolist())[i]
                    assert torch.allclose(got, wanted, atol=5e-5)
            assert float((log_probs(p) - log_probs(q)).abs().max()) > 0.1
            assert torch.equal(log_probs(p), log_probs(load(one)))
            assert torch.equal(log_probs(q), log_probs(load(two)))

    def test_states_that_share_weights_decode_in_turns(self, base, adapters):
        p, q = load_pair(f"{base},peft={adapters[0]}", base)
        wanted = [torch.split(m.encode(STRINGS), STRINGS.lengths.tolist())[1] for m in (p, q)]
        states = [m.begin([STRINGS.context(1)]) for m in (p, q)]
        for t in range(4):
            for i, model in enumerate((p, q)):
                assert torch.allclose(states[i][1][0], wanted[i][t], atol=1e-4)
                states[i] = model.advance(states[i][0], STRINGS.completion(1)[t : t + 1])

    def test_an_adapted_head_is_switched_too(self, tmp_path):
        base = str(folder("llama"))
        tuned = adapter(tmp_path / "head", base, target_modules=["lm_head"])
        p, q = load_pair(base, f"{base},peft={tuned}")
        h = p.encode(STRINGS)
        assert torch.equal(h, q.encode(STRINGS))
        assert torch.equal(p.readout(h), log_probs(load(base)))
        assert torch.equal(q.readout(h), log_probs(load(f"{base},peft={tuned}")))
        assert float((p.readout(h) - q.readout(h)).abs().max()) > 0.1

    def test_trained_biases_are_not_shared(self, tmp_path, base):
        tuned = adapter(tmp_path / "biased", base, bias="all")
        p, q = load_pair(base, f"{base},peft={tuned}")
        assert p.model.transformer.wte.weight.data_ptr() != q.model.transformer.wte.weight.data_ptr()
        assert torch.equal(log_probs(p), log_probs(load(base)))

    def test_an_adapter_folder_stands_for_the_adapter_on_its_base(self, base, adapters):
        p, q = load_pair(base, adapters[1])
        assert torch.equal(log_probs(q), log_probs(load(f"{base},peft={adapters[1]}")))
        assert p.model.transformer.wte.weight.data_ptr() == q.model.transformer.wte.weight.data_ptr()

    def test_a_tokenizer_beside_the_adapter_is_its_own(self, tmp_path, base):
        tuned = adapter(tmp_path / "chat", base, words=True)
        file = tmp_path / "chat" / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "hello"}))
        p, q = load_pair(base, f"{base},peft={tuned}")
        assert (p.tokenizer.chat_template, q.tokenizer.chat_template) == (None, "hello")


class TestAdapterErrors:
    def test_no_adapter_there(self, base, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"expected a folder with adapter_config\.json"):
            load(f"{base},peft={base}")
        with pytest.raises(FileNotFoundError, match="hf download nobody/nothing"):
            load(f"{base},peft=nobody/nothing")

    def test_of_another_architecture(self, adapters):
        with pytest.raises(ValueError, match="expected an adapter that fits"):
            load(f"{folder('llama')},peft={adapters[0]}")

    def test_prompt_tuning(self, tmp_path, base):
        network = transformers.AutoModelForCausalLM.from_pretrained(base)
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        get_peft_model(network, config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="prompt-based adapters are not supported"):
            load(f"{base},peft={tmp_path}")
