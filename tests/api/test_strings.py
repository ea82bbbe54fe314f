"""One batch of a run: what is noted while the logits are there."""

import torch

from klkit.api.strings import MostProbable, Plan, one_batch
from klkit.divergences import backends
from klkit.models.automaton import random_automaton
from klkit.rng import stream


def batch(symbols: int, strings: int):
    p, q = (random_automaton(3, symbols, generator=stream(i, "strings")) for i in range(2))
    plan = Plan([p.context(None)], [q.context(None)], strings, 20, seed=0)
    found = one_batch(p, q, plan, 0, strings, features=None, mixture=False, rescore=False, floor=False)
    return p, q, found


def test_the_most_probable_tokens_are_those_of_the_read_outs():
    for symbols, count in ((8, 5), (2, 3)):
        p, q, found = batch(symbols, 30)
        x = found.statistics.x.select(torch.arange(24))
        assert found.details.string.tolist() == list(range(24))
        for model, tokens, logp in (
            (p, found.details.tokens_p, found.details.logp_p),
            (q, found.details.tokens_q, found.details.logp_q),
        ):
            best = model.readout(model.encode(x)).topk(count)
            assert torch.equal(tokens, best.indices)
            torch.testing.assert_close(logp, best.values)


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
    p, _, found = batch(8, 40)
    assert asked == [found.statistics.x.decisions * p.vocabulary.size]
