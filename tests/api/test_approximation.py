"""The canonical-tokenisation number against what it is said to be, term by term over all strings."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import enumeration
import tiny
from klkit.api.approximate import approximate, draw_texts, read_strings
from klkit.api.approximation import MEANING, Texts, approximation
from klkit.api.plan import Plan
from klkit.api.settings import Settings
from klkit.api.verbs import estimate
from klkit.models.automaton import Automaton, automaton, coin, memoryless
from klkit.models.base import LanguageModel
from klkit.models.byte_level import byte_level
from klkit.models.canonical import Canonical, canonical, log_texts
from klkit.models.spec import load
from klkit.models.token_bytes import token_bytes
from klkit.results import NATS_PER_BIT
from klkit.sequences import Prompts, Sequences

WORDS_P, WORDS_Q = ("a", "b", "ab", "ba"), ("b", "aab", "a", "ab", "é")


def dyadic(steps: int = 2) -> Automaton:
    """Strings of at most ``steps`` tokens whose probabilities are multiples of a power of two."""
    table = torch.tensor([[1, 2, 2, 1, 2], [2, 1, 1, 2, 2]], dtype=torch.float64) / 8
    last = torch.tensor([[0, 0, 0, 0, 1]], dtype=torch.float64)
    successors = torch.arange(1, steps + 1)[:, None].expand(steps, 4)
    return automaton(
        torch.cat([table[:steps], last]), torch.cat([successors, successors[:1]]), symbols=WORDS_P, name="dyadic"
    )


def spread() -> Automaton:
    """A model of other words, which gives every text of a and b many tokenisations."""
    return automaton(
        torch.tensor([[0.1, 0.15, 0.2, 0.2, 0.1, 0.25]], dtype=torch.float64),
        torch.zeros(1, 5, dtype=torch.long),
        symbols=WORDS_Q,
        name="spread",
    )


def longest_first(model: LanguageModel) -> Canonical:
    """A tokenizer of an automaton: the longest word that fits, from the left."""
    words = {word: i for i, word in enumerate(model.vocabulary.tokens[:-1])}

    def write(text: str) -> list[int] | None:
        found = []
        while text:
            fitting = [word for word in words if text.startswith(word)]
            if not fitting:
                return None
            word = max(fitting, key=len)
            found.append(words[word])
            text = text[len(word) :]
        return found

    return write


def by_enumeration(p: LanguageModel, q: LanguageModel) -> tuple[Texts, np.ndarray]:
    """Every string of ``p`` once, and its probability."""
    every = enumeration.strings(p, 8)
    assert bool(every.x.finished.all())
    texts = read_strings(
        every.x,
        log_texts(p, every.x).numpy(),
        p.vocabulary.ends,
        token_bytes(p),
        q,
        [q.context(None)] * len(every.x),
        (longest_first(p), longest_first(q)),
    )
    np.testing.assert_allclose(texts.logp, every.logp.numpy(), rtol=1e-13)
    return texts, every.probability.numpy()


def repeated(texts: Texts, probability: np.ndarray, denominator: int) -> Texts:
    """A sample in which every string is exactly as frequent as it is probable."""
    counts = probability * denominator
    np.testing.assert_allclose(counts, counts.round(), atol=1e-9)
    rows = np.repeat(np.arange(len(counts)), counts.round().astype(int))
    columns = {name: getattr(texts, name)[rows] for name in Texts.__dataclass_fields__}
    return Texts(**columns | {"cluster": np.arange(len(rows))})


def text_of(p: LanguageModel, completion: list[int]) -> str:
    return "".join(p.vocabulary.tokens[i] for i in completion[:-1])


def ways(text: str, words: tuple[str, ...]) -> list[list[int]]:
    if not text:
        return [[]]
    fitting = [(i, word) for i, word in enumerate(words) if text.startswith(word)]
    return [[i, *more] for i, word in fitting for more in ways(text[len(word) :], words)]


def text_logq(q: Automaton, text: str) -> float:
    """The probability of a text under the memoryless ``q``: all its tokenisations."""
    row = q.log_probabilities[0].exp().tolist()
    return math.log(math.fsum(math.prod([row[i] for i in way]) * row[-1] for way in ways(text, WORDS_Q)))


def test_the_number_is_the_divergence_of_texts_but_for_two_errors_of_opposite_sign() -> None:
    p, q = dyadic(), spread()
    texts, probability = by_enumeration(p, q)
    every = enumeration.strings(p, 8).x
    spellings = [text_of(p, every.completion(i).tolist()) for i in range(len(every))]
    law: dict[str, float] = defaultdict(float)
    for text, mass in zip(spellings, probability, strict=True):
        law[text] += mass
    kl = math.fsum(mass * (math.log(mass) - text_logq(q, text)) for text, mass in law.items())
    entropy = -math.fsum(m * math.log(m / law[t]) for t, m in zip(spellings, probability, strict=True))
    pairs = zip(spellings, probability, texts.logq, strict=True)
    lost = math.fsum(mass * (text_logq(q, text) - logq) for text, mass, logq in pairs)
    sample = repeated(texts, probability, 64)
    found = approximation(sample, p="p", q="q", max_tokens=3)
    assert found.per_response.value == pytest.approx(kl - entropy + lost, rel=1e-12)
    assert entropy > 0.03
    assert lost > 0.03
    assert found.per_byte.value == pytest.approx((kl - entropy + lost) / (probability @ texts.sizes), rel=1e-12)
    assert found.bits_p.value == pytest.approx(-(probability @ texts.logp) / math.log(2) / (probability @ texts.sizes))
    assert found.bits_q.value == pytest.approx(-(probability @ texts.logq) / math.log(2) / (probability @ texts.sizes))
    assert found.per_byte.value == pytest.approx((found.bits_q.value - found.bits_p.value) * NATS_PER_BIT)
    assert found.invalid == found.unwritten == found.cut == 0.0


def test_canonical_samples_bound_the_divergence_of_the_canonicalised_model_from_above() -> None:
    p, q = dyadic(), spread()
    texts, probability = by_enumeration(p, q)
    every = enumeration.strings(p, 8).x
    write = longest_first(p)
    own = np.array(
        [
            write(text_of(p, every.completion(i).tolist())) == every.completion(i).tolist()[:-1]
            for i in range(len(every))
        ]
    )
    assert (texts.canonical == own).all()
    assert 0.05 < 1 - probability[own].sum() < 0.5
    share = probability[own].sum()
    law = {text_of(p, every.completion(i).tolist()): probability[i] / share for i in np.flatnonzero(own).tolist()}
    assert len(law) == own.sum()  # one tokenisation a text
    kl = math.fsum(mass * (math.log(mass) - text_logq(q, text)) for text, mass in law.items())
    exact = math.fsum(
        probability[i] / share * (math.log(probability[i] / share) - texts.logq[i])
        for i in np.flatnonzero(own).tolist()
    )
    found = approximation(repeated(texts, probability, 64), p="p", q="q", max_tokens=3)
    assert found.upper_bound.value == pytest.approx(exact, rel=1e-12)
    assert found.upper_bound.value > kl + 0.01
    assert found.noncanonical == pytest.approx(1 - share)


def test_without_tokenisations_to_choose_from_the_number_is_the_divergence() -> None:
    p, q = memoryless([0.6, 0.4], end=0.5), memoryless([0.2, 0.8], end=0.25)
    x = enumeration.strings(p, 6)
    texts = read_strings(
        x.x,
        log_texts(p, x.x).numpy(),
        p.vocabulary.ends,
        token_bytes(p),
        q,
        [q.context(None)] * len(x.x),
        (longest_first(p), longest_first(q)),
    )
    wanted = enumeration.per_string(x.x, enumeration.scores(p, x.x)[0] - enumeration.scores(q, x.x)[0])
    np.testing.assert_allclose(texts.logp - texts.logq, wanted.numpy(), rtol=1e-12)
    assert texts.canonical.all()


def test_the_error_of_the_bound_covers_the_spread_of_the_bound() -> None:
    """Its delta method against the spread over many samples of 60."""
    texts, probability = by_enumeration(dyadic(), spread())
    generator = np.random.default_rng(0)
    found = []
    for _ in range(400):
        rows = generator.choice(len(probability), size=60, p=probability)
        columns = {name: getattr(texts, name)[rows] for name in Texts.__dataclass_fields__}
        found.append(approximation(Texts(**columns | {"cluster": np.arange(60)}), p="p", q="q", max_tokens=3))
    for name in ("upper_bound", "per_response", "per_byte"):
        values = np.array([getattr(one, name).value for one in found])
        errors = np.array([getattr(one, name).stderr for one in found])
        assert 0.85 < values.std() / errors.mean() < 1.15


def some(n: int, **columns: object) -> Texts:
    logs, yes = np.full(n, -2.0), np.ones(n, dtype=bool)
    given = {"logp": logs, "logq": logs - 1, "sizes": np.full(n, 4), "cluster": np.arange(n), "valid": yes}
    return Texts(**{**given, "written": yes, "canonical": yes, "finished": yes, **columns})


def test_what_is_left_out_is_said() -> None:
    off = np.array([True, False, False, False])
    logq = np.array([np.nan, -4.0, -4.0, np.nan])
    texts = some(4, valid=~off, written=np.array([False, True, True, False]), logq=logq, canonical=~off, finished=~off)
    found = approximation(texts, p="p", q="q", max_tokens=9)
    assert (found.invalid, found.unwritten, found.cut, found.noncanonical) == (0.25, 0.25, 0.25, 0.25)
    assert found.per_response.value == 2.0
    assert found.upper_bound.value == pytest.approx(2.0 + math.log(2))  # half of all samples are canonical and kept
    said = found.lines
    assert "25.0% whose bytes are no valid UTF-8, 25.0% that q's tokenizer changes" in said["left out"]
    assert "25.0% at 9 tokens" in said["cut"]
    none = approximation(some(4, canonical=np.zeros(4, dtype=bool)), p="p", q="q", max_tokens=9)
    assert math.isnan(none.upper_bound.value)
    assert none.lines["bound"].startswith("none")
    with pytest.raises(ValueError, match="got none among 4 responses of one"):
        approximation(some(4, valid=np.zeros(4, dtype=bool)), p="one", q="q", max_tokens=9)


def test_infinite_stays_infinite() -> None:
    found = approximation(some(3, logq=np.array([-3.0, -np.inf, -3.0])), p="p", q="q", max_tokens=9)
    assert found.per_response.value == found.per_byte.value == found.upper_bound.value == math.inf
    assert math.isnan(found.per_response.stderr)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["approximate"]["per_response"]["value"] == "inf"


def test_a_result_prints_and_goes_into_json() -> None:
    found = approximation(some(4), p="one", q="two", max_tokens=9, unit="bits")
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["schema"] == "klkit.approximation/1"
    assert record["approximate"]["per_response"]["value"] == pytest.approx(1 / math.log(2))
    assert set(record["approximate"]["per_response"]) == {"value", "sampling_stderr"}  # no interval: it would be a lie
    assert "sampling error ±" in str(found)
    assert "interval" not in str(found)
    assert str(found).startswith("Approximately 1.443 bits per response, 0.3607 per byte")
    assert record["lines"]["it is"] == MEANING
    with pytest.raises(AttributeError):
        found.n = 3


# Networks


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A tokenizer of the same size with other merges."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([tiny.TEXT[::-1]], vocab_size=320, min_frequency=1, special_tokens=[end])
    where = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token=end, eos_token=end, unk_token=end
    ).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def pair(words) -> tuple[LanguageModel, LanguageModel]:
    return load(str(tiny.folder("llama"))), load(f"{tiny.folder('gpt2', seed=1)},tokenizer={words}")


def test_texts_of_networks_against_their_byte_level_laws(pair) -> None:
    """What either error is, string by string, from the sum over all tokenisations."""
    p, q = pair
    writers = canonical(p), canonical(q)
    x = Sequences.pack(
        [p.context(None)] * 3, [torch.tensor([*writers[0](text), 0]) for text in ("a", "the actors", "on it was")]
    )
    logp = log_texts(p, x).numpy()
    texts = read_strings(x, logp, p.vocabulary.ends, token_bytes(p), q, [q.context(None)] * 3, writers)
    assert texts.canonical.all()
    assert texts.sizes.tolist() == [1, 10, 9]
    given = Sequences.pack(
        [torch.tensor([256])] * 3, [torch.tensor([*text, 256]) for text in (b"a", b"the actors", b"on it was")]
    )
    beyond: list[float] = []
    for model, logs in ((p, texts.logp), (q, texts.logq)):
        whole = enumeration.per_string(given, enumeration.scores(byte_level(model), given)[0]).numpy()
        assert (logs <= whole + 1e-4).all()
        assert logs[0] == pytest.approx(whole[0], abs=1e-4)  # one byte has one tokenisation
        beyond += (whole - logs).tolist()
    assert max(beyond) > 0.01


def test_drawn_texts_do_not_depend_on_batches(pair) -> None:
    p, q = pair
    plan = Plan([p.context(None)], [p.context(None)], 12, 6, 3)
    writers = canonical(p), canonical(q)
    one, two = (draw_texts(p, q, plan, [q.context(None)], writers, size) for size in (12, 5))
    for name in Texts.__dataclass_fields__:
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=1e-4)
    assert len(draw_texts(p, q, plan, [q.context(None)], writers, 5, most=7).logp) == 7
    assert not one.canonical.all()  # random weights do not care for merges


def test_the_verb() -> None:
    p, q = load("klkit:docs"), load("klkit:reviews")
    found = estimate(p, q, ["the film", "a plot"], approximate=True, samples=8, max_tokens=8, temperature=0.7)
    assert (found.n, found.clusters, found.max_tokens) == (16, 2, 8)
    assert "temperature 0.7" in " ".join(found.notes)
    assert found.settings["approximate"] is True
    assert found.provenance["models"]["q"]["vocabulary_size"] == q.vocabulary.size
    again = estimate(p, q, ["the film", "a plot"], approximate=True, samples=8, max_tokens=8, temperature=0.7)
    assert str(again) == str(found)
    other = estimate(p, q, ["the film", "a plot"], approximate=True, samples=8, max_tokens=8)
    assert other.per_response.value != found.per_response.value


def test_what_has_no_effect_is_refused(pair) -> None:
    p, q = pair
    given = {"method": "mc", "rtol": 0.1, "floor": "none", "divergence": "reverse_kl", "bytes": True, "beam": 2}
    for name, value in {**given, "shared_only": True, "token_js": True, "text": "x.txt", "sampler": "vllm"}.items():
        with pytest.raises(ValueError, match=f"{name}=.*approximate=True"):
            Settings(p="a", q="b", approximate=True, **{name: value})
    with pytest.raises(ValueError, match="got out, but approximate=True keeps nothing"):
        estimate(p, q, approximate=True, out="somewhere")
    with pytest.raises(ValueError, match="exact divergence exists; leave approximate"):
        estimate(p, p, approximate=True)
    with pytest.raises(ValueError, match="exact divergence exists"):
        estimate(coin(end=0.5), coin(end=0.25), approximate=True)
    with pytest.raises(ValueError, match="model with a tokenizer, got"):
        estimate(memoryless([0.5, 0.5], end=0.5), automaton_of("xy"), approximate=True)


def automaton_of(symbols: str) -> Automaton:
    n = len(symbols)
    table = torch.full((1, n + 1), 1 / (n + 1), dtype=torch.float64)
    return automaton(table, torch.zeros(1, n, dtype=torch.long), symbols=list(symbols), name=symbols)


def test_texts_longer_than_q_can_read_are_refused() -> None:
    p, q = load("klkit:docs"), load("klkit:reviews")
    with pytest.raises(ValueError, match=r"window of 128 tokens, got one of .* lower max_tokens, to about"):
        approximate(p, q, Settings(p="p", q="q", samples=8, max_tokens=150), Prompts(("the film",)))


@pytest.mark.parametrize(("first", "second"), [("docs", "reviews"), ("reviews", "docs")])
def test_per_byte_is_the_difference_of_the_bits(first: str, second: str) -> None:
    found = estimate(f"klkit:{first}", f"klkit:{second}", approximate=True, samples=6, max_tokens=12)
    difference = (found.bits_q.value - found.bits_p.value) * NATS_PER_BIT
    assert found.per_byte.value == pytest.approx(difference, rel=1e-9)
    assert found.bits_q.value > found.bits_p.value
