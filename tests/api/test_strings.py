"""What is noted of a batch while its logits are there."""

import torch

from klkit.api.batches import MostProbable
from klkit.divergences import backends
from klkit.estimators.statistics import collect
from klkit.models.automaton import random_automaton
from klkit.rng import stream
from klkit.sampling.ancestral import sample


def drawn(symbols: int, strings: int):
    p, q = (random_automaton(3, symbols, generator=stream(i, "strings")) for i in range(2))
    return p, q, sample(p, [p.context(None)] * strings, max_tokens=20, seed=0).sequences


def test_the_most_probable_tokens_are_those_of_the_read_outs():
    for symbols, count in ((8, 5), (2, 3)):
        p, q, x = drawn(symbols, 30)
        shown = torch.arange(24)
        best = MostProbable(torch.isin(x.row(), shown), count)
        collect(p, p.encode(x), q, q.encode(x), x, watch=best)
        found, few = best.details(shown), x.select(shown)
        assert found.string.tolist() == shown.tolist()
        for model, tokens, logp in ((p, found.tokens_p, found.logp_p), (q, found.tokens_q, found.logp_q)):
            expected = model.readout(model.encode(few)).topk(count)
            assert torch.equal(tokens, expected.indices)
            torch.testing.assert_close(logp, expected.values)


def test_rows_are_noted_where_they_are_wanted():
    logits = torch.randn(6, 9, generator=stream(0, "logits"))
    wanted = torch.tensor([True, False, True, True, False, False])
    noted = MostProbable(wanted, 2)
    for part in torch.split(logits, [2, 1, 1, 2]):
        noted(part, -part)
    found = noted.details(torch.tensor([3]))
    assert torch.equal(found.tokens_p, logits[wanted].topk(2).indices)
    torch.testing.assert_close(found.logp_q, (-logits[wanted]).log_softmax(1).topk(2).values)
    assert MostProbable(torch.zeros(0, dtype=torch.bool), 3).details(torch.arange(0)).logp_p.shape == (0, 3)


def test_kernels_are_chosen_for_a_batch_not_for_a_chunk(monkeypatch):
    asked: list[int] = []

    def choose(positions: int, *_: object) -> str:
        asked.append(positions)
        return "eager"

    monkeypatch.setattr(backends, "choose", choose)
    p, q, x = drawn(8, 40)
    collect(p, p.encode(x), q, q.encode(x), x)
    assert asked == [x.decisions * p.vocabulary.size]
