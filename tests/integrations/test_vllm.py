"""Sampling through a vLLM engine, with a stand-in that keeps the contract of LLM.generate."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from klkit.estimators import summarise
from klkit.estimators.exact import exact
from klkit.estimators.statistics import score
from klkit.integrations import vllm
from klkit.models.automaton import Automaton, coin, random_automaton
from klkit.models.base import LanguageModel
from klkit.rng import stream


@dataclass
class SamplingParams:
    """The fields of vLLM's class that decide which law is sampled, with its defaults."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True


class Engine:
    """What ``LLM.generate`` does with a list of token prompts and a list of parameters: an output each, in order."""

    def __init__(self, model: LanguageModel, change: Callable[[Any], None] = lambda output: None) -> None:
        self.model, self.change, self.asked = model, change, []

    def generate(self, prompts: list[dict], sampling_params: list[SamplingParams], *, use_tqdm: bool, **options: Any):
        assert len(prompts) == len(sampling_params)
        self.asked.append((sampling_params, use_tqdm, options))
        return [self.answer(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def answer(self, prompt: list[int], wanted: SamplingParams) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(wanted.seed)
        state, hidden = self.model.begin([torch.tensor(prompt)])
        tokens, logprobs = [], []
        reason = "length"
        while len(tokens) < wanted.max_tokens:
            logp = self.model.readout(hidden)[0]
            tokens.append(int(torch.multinomial(logp.exp(), 1, generator=generator)))
            logprobs.append({tokens[-1]: SimpleNamespace(logprob=float(logp[tokens[-1]]), rank=1)})
            if tokens[-1] in wanted.stop_token_ids:
                reason = "stop"
                break
            state, hidden = self.model.advance(state, torch.tensor(tokens[-1:]))
        completion = SimpleNamespace(
            token_ids=tokens, logprobs=logprobs if wanted.logprobs is not None else None, finish_reason=reason
        )
        output = SimpleNamespace(prompt_token_ids=prompt, outputs=[completion])
        self.change(output)
        return output


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.SamplingParams = SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)


def pair() -> tuple[Automaton, Automaton]:
    return tuple(random_automaton(3, 4, generator=stream(i, "vllm")) for i in range(2))


def contexts(model: LanguageModel, n: int) -> list[torch.Tensor]:
    return [model.context(None)] * n


def test_estimates_from_an_engine_are_of_the_divergence():
    p, q = pair()
    x = vllm.sample(Engine(p), p, contexts(p, 600), max_tokens=400, seed=0, prompt=[0] * 600)
    assert x.sampler_logp is None
    assert bool(x.finished.all())
    estimate = summarise("mc", score(p, q, x))
    assert abs(estimate.value - exact(p, q).value) < 4 * estimate.stderr


def test_weights_undo_what_the_engine_does_differently():
    p, q, served = coin(end=0.5), coin(end=0.25), coin(end=0.4)
    x = vllm.sample(Engine(served), p, contexts(p, 2000), max_tokens=400, seed=0, prompt=[0] * 2000, weighted=True)
    statistics = score(p, q, x)
    torch.testing.assert_close(x.sampler_logp, score(served, q, x).rows.logp.double())
    estimate = summarise("rb", statistics)
    assert abs(estimate.value - exact(p, q).value) < 4 * estimate.stderr
    same = vllm.sample(Engine(p), p, contexts(p, 50), max_tokens=400, seed=0, prompt=[0] * 50, weighted=True)
    assert torch.equal(score(p, q, same).importance_ratio(), torch.zeros(same.decisions, dtype=torch.float64))


def test_sampling_is_plain_and_every_string_has_its_seed():
    p = pair()[0]
    engine = Engine(p)
    x = vllm.sample(engine, p, contexts(p, 6), max_tokens=5, seed=0, prompt=[0, 0, 0, 1, 1, 1], lora_request="adapter")
    ((asked, use_tqdm, options),) = engine.asked
    assert (use_tqdm, options) == (False, {"lora_request": "adapter"})
    assert len({s.seed for s in asked}) == 6
    for s in asked:
        assert (s.temperature, s.top_p, s.top_k, s.min_p, s.n) == (1.0, 1.0, -1, 0.0, 1)
        assert (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) == (1.0, 0.0, 0.0)
        assert (s.stop, s.stop_token_ids, s.ignore_eos) == ([], sorted(p.vocabulary.ends), True)
        assert (s.min_tokens, s.max_tokens, s.detokenize, s.logprobs) == (0, 5, False, None)
    assert (x.prompt.tolist(), x.cluster.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1])
    other = vllm.sample(Engine(p), p, contexts(p, 2), max_tokens=5, seed=0, prompt=[1, 0], replicate=[2, 0])
    assert [other.completion(i).tolist() for i in (0, 1)] == [x.completion(i).tolist() for i in (5, 0)]


def test_strings_cut_at_the_limit_are_not_finished():
    p = pair()[0]
    x = vllm.sample(Engine(p), p, contexts(p, 40), max_tokens=3, seed=0)
    last = x.tokens[torch.arange(40), x.stop - 1]
    assert x.finished.tolist() == [int(token) in p.vocabulary.ends for token in last]
    assert 0 < int(x.finished.sum()) < 40
    assert bool((x.lengths[~x.finished] == 3).all())


def drop_the_end(output: Any) -> None:
    output.outputs[0].token_ids = output.outputs[0].token_ids[:-1]


def go_on(output: Any) -> None:
    output.outputs[0].token_ids = [coin(end=0.5).vocabulary.ends[0], *output.outputs[0].token_ids]


def invent(output: Any) -> None:
    output.outputs[0].token_ids = [7]


def begin_anew(output: Any) -> None:
    output.prompt_token_ids = [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_the_end, "end tokens or to have 30 tokens"),
        (go_on, "stop at the first"),
        (invent, "expected tokens of the 2 that"),
        (begin_anew, "must not add tokens"),
    ],
)
def test_strings_that_the_model_cannot_give_are_refused(change, message):
    p = coin(end=0.5)
    with pytest.raises(ValueError, match=message):
        vllm.sample(Engine(p, change), p, contexts(p, 8), max_tokens=30, seed=0)


def test_missing_outputs_are_noticed():
    p = coin(end=0.5)
    engine = Engine(p)
    engine.generate = lambda *_, **__: []
    with pytest.raises(ValueError, match="each of 3 contexts, got 0"):
        vllm.sample(engine, p, contexts(p, 3), max_tokens=4, seed=0)


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    p = coin(end=0.5)
    with pytest.raises(ImportError, match="pip install vllm"):
        vllm.sample(Engine(p), p, contexts(p, 1), max_tokens=4, seed=0)
