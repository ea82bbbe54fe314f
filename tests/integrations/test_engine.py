"""``klkit estimate --sampler vllm``, with the stand-in for the engine."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tests.integrations.test_vllm import Engine, SamplingParams, contexts

import klkit
from klkit.estimators.audit import MISMATCH, audit, mismatch
from klkit.estimators.exact import exact
from klkit.estimators.statistics import score
from klkit.integrations import engine, vllm
from klkit.models.automaton import coin, random_automaton
from klkit.models.spec import load, locate
from klkit.rng import stream
from klkit.sampling.importance import from_policy

PAIR = ("klkit:docs-tuned", "klkit:docs")
SMALL = ["--samples", "40", "--max-tokens", "8", "--batch-size", "8"]


class LLM(Engine):
    """Opened by a model's options, as vLLM's class is."""

    opened: list["LLM"]
    shift = 0.0

    def __init__(self, **options):
        super().__init__(load(options["model"]), self.shifted)
        self.options = options
        LLM.opened.append(self)

    def shifted(self, output):
        for entry in output.outputs[0].logprobs:
            for found in entry.values():
                found.logprob += self.shift

    @property
    def strings(self):
        return sum(len(parameters) for parameters, _, _ in self.asked)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    module = ModuleType("vllm")
    module.SamplingParams, module.LLM = SamplingParams, LLM
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(LLM, "opened", [], raising=False)


def test_a_run_from_an_engine_says_how_far_the_engine_is_from_the_model(run):
    code, out, err = run("estimate", *PAIR, *SMALL, "--sampler", "vllm,max_model_len=64", "--out", "run", "--json", "-")
    assert code == 0, err
    (opened,) = LLM.opened
    assert opened.options == {
        "model": locate(PAIR[0]),
        "dtype": "float32",
        "gpu_memory_utilization": 0.4,
        "trust_remote_code": False,
        "max_model_len": 64,
    }
    assert opened.strings == 40
    result = json.loads(out)
    check = result["audit"]["checks"]["engine_mismatch"]
    assert check["verdict"] == "pass"
    assert 0 <= float(check["value"]) < 1e-9
    assert result["companions"]["engine"]["kl_engine_p"]["value"] == check["value"]
    assert result["companions"]["engine"]["largest_gap"] < 1e-4
    assert result["companions"]["engine"]["share_outside_tenth"] == 0
    assert "engine" in result["audit"]["exempt"]
    assert "other shapes" in result["floor"]["kind"]
    assert "KL(engine‖p)" in result["lines"]["engine"]
    own = klkit.estimate(*PAIR, samples=40, max_tokens=8)
    error = (result["headline"]["stderr"] ** 2 + own.headline.stderr**2) ** 0.5
    assert abs(result["headline"]["value"] - own.headline.value) < 4 * error


def test_an_engine_that_serves_something_else_is_found_out(run, monkeypatch):
    monkeypatch.setattr(LLM, "shift", 0.4)
    code, _, err = run("estimate", *PAIR, *SMALL, "--sampler", "vllm", "--out", "run")
    assert code == 1
    assert "self-audit failed" in err
    check = json.loads(Path("run/result.json").read_text())["audit"]["checks"]["engine_mismatch"]
    assert check["verdict"] == "fail"
    # A shift is the same at every token, so its k3 is exact, and all tokens are outside a tenth.
    assert float(check["value"]) == pytest.approx(0.4 - 1 + 2.718281828**-0.4, rel=1e-4)
    assert "100.00% of the tokens" in check["advice"]
    assert "at most 0.4" in check["advice"]


def test_a_reverse_run_is_served_its_q(run):
    code, _, err = run("estimate", *PAIR, *SMALL, "--divergence", "reverse_kl", "--sampler", "vllm", "--out", "run")
    assert code == 0, err
    assert LLM.opened[0].options["model"] == locate(PAIR[1])
    assert "KL(engine‖q)" in json.loads(Path("run/result.json").read_text())["lines"]["engine"]


def test_stored_strings_are_not_drawn_again(run, monkeypatch):
    from klkit.report.record import RunFolder

    command = ["estimate", *PAIR, *SMALL, "--sampler", "vllm"]
    run(*command, "--out", "whole")
    append, left = RunFolder.append, [3]

    def cut_off(self, *arguments):
        append(self, *arguments)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", cut_off)
        assert run(*command, "--out", "parts")[0] == 130
    code, _, err = run(*command, "--out", "parts", "--resume")
    assert code == 0, err
    assert [opened.strings for opened in LLM.opened] == [40, 40, 16]
    whole, parts = (json.loads(Path(name, "result.json").read_text()) for name in ("whole", "parts"))
    assert parts["headline"] == whole["headline"]


def test_without_vllm_nothing_is_loaded_and_the_message_says_what_to_do(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("klkit.api.prepare.load_pair", lambda *_: pytest.fail("models were loaded"))
    code, out, err = run("estimate", *PAIR, "--sampler", "vllm", "--out", "run")
    assert (code, out) == (2, "")
    assert err == (
        "klkit: expected vLLM for --sampler vllm, got an environment without it; pip install vllm, or leave --sampler "
        "out to draw with klkit itself\n"
    )
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*PAIR, "--sampler", "sglang"], "klkit, vllm"),
        ([*PAIR, "--sampler", "vllm,seed"], "NAME=VALUE"),
        ([*PAIR, "--sampler", "vllm", "--temperature", "0.7"], "temperature=0.7"),
        ([*PAIR, "--sampler", "vllm", "--shared-only"], "shared_only"),
        ([*PAIR, "--sampler", "vllm", "--divergence", "js"], "divergence='js'"),
        ([*PAIR, "--sampler", "vllm", "--text", "text.txt"], "sampler='vllm'"),
        (["klkit:docs,quantization=4bit", "klkit:docs", "--sampler", "vllm"], "quantised already"),
        (["klkit:docs,peft=absent", "klkit:docs", "--sampler", "vllm"], "LoRA adapter"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(run, arguments, expected):
    code, _, err = run("estimate", *arguments)
    assert code == 2
    assert expected in err


def test_an_engine_starts_its_own_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        engine.sampler(PAIR[0])


def test_an_adapter_is_served_with_its_model(monkeypatch):
    module = ModuleType("vllm.lora.request")
    module.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", module)
    spec = "klkit:docs,peft=klkit:docs-lora"
    p = load(spec)
    x = engine.sampler(spec)(p, contexts(p, 3), max_tokens=4, seed=0)
    assert len(x) == 3
    (opened,) = LLM.opened
    assert opened.options["enable_lora"]
    assert opened.options["max_lora_rank"] in engine.LORA_RANKS
    ((_, _, options),) = opened.asked
    assert options["lora_request"].path == locate("klkit:docs-lora")


def test_a_sampler_and_its_setting_come_together():
    p = coin(end=0.5)
    with pytest.raises(ValueError, match="without a sampler"):
        klkit.estimate(p, p, samples=4, sampler="vllm")
    with pytest.raises(ValueError, match="and a sampler"):
        klkit.estimate(p, p, samples=4, draw=lambda *_, **__: None)

    def unweighted(model, contexts, **names):
        return vllm.sample(Engine(model), model, contexts, **names)

    with pytest.raises(ValueError, match="sampler_logp"):
        klkit.estimate(p, coin(end=0.25), samples=4, max_tokens=4, sampler="vllm", draw=unweighted)


def test_the_mismatch_is_an_estimate_of_the_divergence_of_the_laws():
    """The engine's law against the model's, per token: known exactly for automata."""
    p, served = (random_automaton(3, 4, generator=stream(i, "engine")) for i in range(2))
    x = vllm.sample(Engine(served), p, contexts(p, 600), max_tokens=400, seed=0, prompt=[0] * 600, weighted=True)
    strings = score(p, p, x).strings()
    value, error = mismatch(strings)
    truth = exact(served, p).value / float(strings.lengths.double().mean())
    assert abs(value - truth) < 4 * error
    assert error < 0.2 * truth
    same = score(p, p, vllm.sample(Engine(p), p, contexts(p, 20), max_tokens=400, seed=0, weighted=True))
    assert mismatch(same.strings())[0] < 1e-24


@pytest.mark.parametrize("precision", MISMATCH)
def test_verdicts_follow_the_precision(precision):
    p = coin(end=0.5)
    x = vllm.sample(Engine(p), p, contexts(p, 200), max_tokens=60, seed=0, prompt=[0] * 200, weighted=True)
    for (usual, most), scale, verdict in (
        (MISMATCH[precision], 0.5, "pass"),
        (MISMATCH[precision], 2.0, "warn"),
        (MISMATCH[precision], None, "fail"),
    ):
        gap = (2 * (usual * scale if scale else 2 * most)) ** 0.5  # KL is half a small gap's square
        moved = type(x)(**{f: getattr(x, f) for f in x.__slots__} | {"sampler_logp": x.sampler_logp - gap})
        found = audit(score(p, coin(end=0.25), moved), engine=True, precision=precision)
        assert found["engine_mismatch"].verdict == verdict
    own = audit(score(p, coin(end=0.25), x), precision=precision)
    assert "engine_mismatch" not in own.to_dict()["checks"]  # an older policy is no engine
    assert torch.isfinite(x.sampler_logp).all()


def test_strings_may_be_named_by_whoever_draws_them():
    def nameless(mu, contexts, *, max_tokens, seed, **_):
        return from_policy(mu, contexts, max_tokens=max_tokens, seed=seed)

    p, q = coin(end=0.5), coin(end=0.25)
    result = klkit.estimate(p, q, samples=40, max_tokens=12, sampler="vllm", draw=nameless)
    assert result.headline.n == 40
    assert result.headline.interval().lower < exact(p, q, max_tokens=12).value < result.headline.interval().upper
