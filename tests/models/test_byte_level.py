"""The law over bytes against the sum over all token strings, term by term."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch

import enumeration
import tiny
from klkit import rng
from klkit.estimators.statistics import collect, score
from klkit.models.automaton import Automaton, automaton, memoryless
from klkit.models.base import LanguageModel, Vocabulary
from klkit.models.byte_level import BYTES, byte_level
from klkit.models.laws import check_laws
from klkit.models.spec import load
from klkit.models.token_bytes import token_bytes
from klkit.models.wrap import extend, temperature
from klkit.sequences import Sequences

SYMBOLS = ("a", "b", "ab", "ba", "aab", "é")


def ladder(seed: int, symbols: tuple[str, ...] = SYMBOLS, *, steps: int = 3) -> Automaton:
    """Strings of at most ``steps`` tokens; what comes next depends on how many came, and on the last one."""
    n = len(symbols)
    generator = rng.stream(seed, "ladder")
    states = 1 + steps * n
    table = torch.randn(states, n + 1, generator=generator, dtype=torch.float64).softmax(-1)
    table[1 + (steps - 1) * n :] = torch.tensor([0.0] * n + [1.0])
    successors = torch.zeros(states, n, dtype=torch.long)
    for state in range(1 + (steps - 1) * n):
        level = 0 if state == 0 else 1 + (state - 1) // n
        successors[state] = 1 + level * n + torch.arange(n)
    return automaton(table, successors, symbols=symbols, name=f"ladder-{seed}")


def text_law(model: LanguageModel, max_tokens: int) -> dict[bytes, float]:
    """The probability of every text, summed over the token strings that spell it."""
    found: dict[bytes, list[float]] = defaultdict(list)
    every = enumeration.strings(model, max_tokens)
    assert bool(every.x.finished.all())
    for i, logp in enumerate(every.logp.tolist()):
        names = [model.vocabulary.tokens[token] for token in every.x.completion(i).tolist()[:-1]]
        found["".join(names).encode()].append(math.exp(logp))
    return {text: math.fsum(parts) for text, parts in found.items()}


def ended(texts) -> Sequences:
    completions = [torch.tensor([*text, 256]) for text in texts]
    return Sequences.pack([torch.tensor([256])] * len(completions), completions)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_text_and_every_conditional(seed: int) -> None:
    model = ladder(seed)
    law = text_law(model, 4)
    p = byte_level(model)
    x = ended(law)
    logp, rows = enumeration.scores(p, x)
    torch.testing.assert_close(
        enumeration.per_string(x, logp).exp(), torch.tensor(list(law.values()), dtype=torch.float64), rtol=1e-12, atol=0
    )
    place = 0
    for text in law:
        for stop in range(len(text) + 1):
            prefix = text[:stop]
            mass = math.fsum(value for other, value in law.items() if other.startswith(prefix))
            wanted = torch.zeros(257, dtype=torch.float64)
            wanted[256] = law.get(prefix, 0.0) / mass
            for other, value in law.items():
                if other.startswith(prefix) and len(other) > stop:
                    wanted[other[stop]] += value / mass
            torch.testing.assert_close(rows[place].exp(), wanted, rtol=1e-12, atol=1e-15)
            place += 1


def test_the_sum_over_tokenisations_is_more_than_the_best_one() -> None:
    # "ab" is a, b or ab; no one of the two has all of it.
    model = memoryless([0.25, 0.25, 0.5], end=0.5)
    model = automaton(model.log_probabilities.exp(), model.transitions[:, :-1], symbols=("a", "b", "ab"))
    logp, _ = enumeration.scores(byte_level(model), ended([b"ab"]))
    assert float(logp.sum().exp()) == pytest.approx(0.125 * 0.125 * 0.5 + 0.25 * 0.5)


def test_rao_blackwell_over_bytes_has_the_divergence_of_the_texts_as_its_mean() -> None:
    a, b = ladder(0), ladder(1, ("b", "a", "aab", "bé", "é", "ab", "ba"), steps=4)
    p, q = byte_level(a), byte_level(b)
    texts = enumeration.strings(p, 40)
    law_p, law_q = text_law(a, 4), text_law(b, 5)
    wanted = math.fsum(value * math.log(value / law_q[text]) for text, value in law_p.items())
    statistics = score(p, q, texts.x)
    assert texts.mean(statistics.per_string(statistics.rows.kl)) == pytest.approx(wanted, rel=1e-11)
    assert texts.mean(statistics.per_string(statistics.log_ratio)) == pytest.approx(wanted, rel=1e-11)
    assert wanted > 0.1


def test_texts_are_no_further_apart_than_tokens() -> None:
    p, q = ladder(0), ladder(1)
    law_p, law_q = text_law(p, 4), text_law(q, 4)
    texts = math.fsum(value * math.log(value / law_q[text]) for text, value in law_p.items())
    tokens = enumeration.strings(p, 4)
    statistics = score(p, q, tokens.x)
    assert texts < tokens.mean(statistics.per_string(statistics.rows.kl)) - 0.01


def test_single_bytes_as_tokens_change_nothing() -> None:
    p, q = ladder(0, ("a", "b", "c")), ladder(1, ("a", "b", "c"))
    tokens, texts = enumeration.strings(p, 4), enumeration.strings(byte_level(p), 4)
    by_tokens, by_bytes = score(p, q, tokens.x), score(byte_level(p), byte_level(q), texts.x)
    torch.testing.assert_close(by_bytes.rows.kl, by_tokens.rows.kl, rtol=1e-12, atol=1e-13)


def chunked(chunk: float, *, end: float = 0.2) -> Automaton:
    """Independent letters, of which some pairs ``ab`` are written as one token: the law of the texts is the same."""
    a, b = 0.6 * (1 - end), 0.4 * (1 - end)
    pair = chunk * a * b
    table = torch.tensor(
        [[a - pair, b, pair, end], [a * a / (a - pair), (a * b - pair) / (a - pair), 0.0, a * end / (a - pair)]],
        dtype=torch.float64,
    )
    # Behind an "a" of its own a "b" is rarer: some of the pairs have been written already.
    return automaton(table, torch.tensor([[1, 0, 0], [0, 0, 0]]), symbols=("a", "b", "ab"), name=f"chunk-{chunk}")


def test_tokenisations_of_one_law_of_texts_are_the_same_model() -> None:
    letters = memoryless([0.6, 0.4], end=0.2)
    one, two, three = (byte_level(model) for model in (letters, chunked(0.3), chunked(0.8)))
    x = enumeration.strings(one, 6).x
    for p, q in itertools.permutations([one, two, three], 2):
        statistics = score(p, q, x)
        assert float(statistics.rows.kl.abs().max()) < 1e-13
        assert float(statistics.log_ratio.abs().max()) < 1e-12
    assert float(score(chunked(0.3), chunked(0.8), enumeration.strings(chunked(0.3), 6).x).rows.kl.sum()) > 0.1


def test_vocabularies_are_one() -> None:
    p, q = byte_level(ladder(0)), byte_level(memoryless([1.0], end=0.5))
    assert p.vocabulary == q.vocabulary == BYTES
    assert p.vocabulary.fingerprint == q.vocabulary.fingerprint
    assert len(set(BYTES.tokens)) == 257
    assert p.pieces([97, 10, 0xC3, 256]) == ["a", "\n", "\\xc3", "<end>"]


def test_what_is_read_out_may_be_written_to() -> None:
    p, q = byte_level(ladder(0)), byte_level(ladder(1))
    x = enumeration.strings(p, 3).x
    hidden = p.encode(x)
    before = hidden.clone()
    collect(p, hidden, q, q.encode(x), x)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("model", [ladder(0), chunked(0.5), temperature(chunked(0.5), 2.0)], ids=lambda m: m.name)
def test_laws_hold_for_automata(model: LanguageModel) -> None:
    check_laws(byte_level(model), ["a ab", None], max_tokens=6, strings=9)


@pytest.fixture(scope="module")
def pair() -> tuple[LanguageModel, LanguageModel]:
    return load(str(tiny.folder("llama"))), load(str(tiny.folder("gpt2", seed=1, vocabulary=384)))


def test_laws_hold_for_networks(pair) -> None:
    for model in pair:
        check_laws(byte_level(model), [None, "the film"], max_tokens=4)


def test_a_wide_beam_is_exact_and_a_narrow_one_says_what_it_dropped(pair) -> None:
    texts = [b"the critics", b"a plot", b"zq\xff", b"superb", b""]
    for model in pair:
        exact, wide, narrow = (byte_level(model, beam=beam) for beam in (None, 10_000, 2))
        x = ended(texts)
        reference = exact.encode(x)
        torch.testing.assert_close(wide.encode(x), reference)
        assert exact.ledger.discarded == wide.ledger.discarded == 0.0
        rows = narrow.encode(x)
        assert narrow.ledger.discarded_most > narrow.ledger.discarded / narrow.ledger.decisions > 1e-6
        assert narrow.ledger.laws < exact.ledger.laws
        assert bool(rows.isfinite().all())  # every byte is a token, so none is impossible
        assert float(rows.exp().sum(-1).sub(1).abs().max()) < 1e-5
        assert not torch.allclose(rows, reference, atol=1e-3)
        assert "approximate" in narrow.notes[-2]
        assert "approximate" not in exact.notes[-2]


def cuts(text: bytes, table: dict[bytes, list[int]]) -> list[list[int]]:
    """Every sequence of tokens that spells the text."""
    if not text:
        return [[]]
    heads = [(text[:n], text[n:]) for n in range(1, len(text) + 1)]
    return [[i, *more] for head, tail in heads for i in table.get(head, []) for more in cuts(tail, table)]


def test_the_network_law_is_the_sum_over_tokenisations(pair) -> None:
    """Every way to cut a text into tokens, scored by the model itself."""
    text = b"the actors"
    for model in pair:
        table: dict[bytes, list[int]] = defaultdict(list)
        for i, spelt in enumerate(token_bytes(model)):
            if spelt:
                table[spelt].append(i)

        ways = cuts(text, table)
        assert len(ways) > 8
        end = list(model.vocabulary.ends)
        x = Sequences.pack([model.context(None)] * len(ways), [torch.tensor(way + end) for way in ways])
        logp, _ = enumeration.scores(model, x)
        # No token without text has a row here but the end itself, so nothing is left out.
        wanted = enumeration.per_string(x, logp).logsumexp(0)
        p = byte_level(model)
        found, _ = enumeration.scores(p, ended([text]))
        assert float(found.sum()) == pytest.approx(float(wanted), abs=1e-4)
        assert p.ledger.excluded_most < 1e-6


def test_tokens_without_text_are_left_out_at_every_choice_of_a_token() -> None:
    # The third token stands for nothing: given the other two and the end, the law is that of the smaller table.
    table = torch.tensor([[0.2, 0.1, 0.5, 0.2]], dtype=torch.float64)
    base = Automaton(table.log(), torch.zeros(1, 4, dtype=torch.long), Vocabulary(("a", "b", None, "<end>"), (3,)))
    p = byte_level(base)
    row = p.begin([p.context(None)])[1].exp()[0]
    assert row[[97, 98, 256]].tolist() == pytest.approx([0.4, 0.2, 0.4])
    assert p.ledger.excluded_most == pytest.approx(0.5)
    assert "1 of 4 tokens" in p.notes[-1]
    silent = Automaton(
        torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).log(),
        torch.zeros(1, 3, dtype=torch.long),
        Vocabulary(("a", None, "<end>"), (2,)),
        tight=False,
    )
    with pytest.raises(ValueError, match="no law over texts"):
        byte_level(silent).begin([torch.tensor([256])])


def test_what_q_excludes_stays_infinite() -> None:
    p, q = byte_level(memoryless([0.5, 0.5], end=0.5)), byte_level(memoryless([1.0], end=0.5))
    statistics = score(p, q, ended([b"ab", b"ba", b"a"]))
    ratio = statistics.per_string(statistics.log_ratio)
    assert ratio.isinf().tolist() == [True, True, False]
    assert bool(statistics.rows.kl[statistics.x.row() == 2].isinf().all())


def test_contexts(pair) -> None:
    p = byte_level(pair[0])
    assert p.context(None).tolist() == p.context("").tolist() == [256]
    assert p.context("né").tolist() == [256, *"né".encode(), 256]
    assert p.context(torch.tensor([104, 105])).tolist() == [256, 104, 105, 256]
    # Bytes behind the prompt's mark belong to the response, whose tokenisations are summed.
    prompt = p.context("the fil")
    state, row = p.begin([prompt])
    state, row = p.advance(state, torch.tensor([ord("m")]))
    torch.testing.assert_close(p.begin([torch.cat([prompt, torch.tensor([ord("m")])])])[1], row)
    assert not torch.allclose(p.begin([p.context("the film")])[1], row, atol=1e-3)
    for bad in ([97], [256, 97, 256, 97, 256], [97, 256], [256, 300]):
        with pytest.raises(ValueError, match="begins with the end symbol"):
            p.begin([torch.tensor(bad)])
    with pytest.raises(ValueError, match="UTF-8"):
        p.begin([torch.tensor([256, 255, 256])])
    with pytest.raises(ValueError, match="no next decision"):
        p.advance(p.begin([prompt])[0], torch.tensor([256]))
    with pytest.raises(ValueError, match="chat template"):
        p.context([{"role": "user", "content": "hello"}])


def test_conversations_are_read_in_their_template() -> None:
    model = load("klkit:reviews")
    p = byte_level(model, beam=4)
    messages = [{"role": "user", "content": "Review the film."}]
    context = p.context(messages)
    text = bytes(context[1:-1].tolist()).decode()
    assert "Review the film." in text
    assert text != "Review the film."
    law = model.readout(model.begin([model.context(messages)])[1])[0]
    row = p.begin([context])[1][0]
    assert float(row[256]) == pytest.approx(float(law[model.vocabulary.ends[0]]), abs=1e-4)
    # The same text as plain text may be other tokens; the object cannot know which is meant.
    if model.context(text).tolist() != model.context(messages).tolist():
        with pytest.raises(ValueError, match="other tokens"):
            p.context(text)


def test_too_many_tokenisations_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("klkit.models.byte_level.MOST", 20)
    p = byte_level(extend(chunked(0.5), 6))
    with pytest.raises(ValueError, match="pass a beam"):
        p.encode(ended([b"ab" * 8]))
    byte_level(chunked(0.5), beam=4).encode(ended([b"ab" * 8]))
    with pytest.raises(ValueError, match="at least 1"):
        byte_level(chunked(0.5), beam=0)
