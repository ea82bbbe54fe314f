"""A cache says what its teacher says: exactly, as a bound, or on average, whatever it is asked for in what order."""

import itertools

import pytest
import torch
from tests.tiny import folder

from klkit.caches import recording as kinds
from klkit.caches.build import build, size_of
from klkit.caches.cache import TeacherCache
from klkit.caches.recording import KINDS, Recording, law, record
from klkit.caches.sizes import cache_size
from klkit.divergences.kl import kl
from klkit.divergences.linear import Head
from klkit.divergences.partial import Hidden, Hybrid, Logits, Sampled, TopK
from klkit.models.automaton import memoryless
from klkit.models.base import log_probs, read_rows
from klkit.models.spec import load
from klkit.objectives.distill import distillation_loss
from klkit.objectives.distill_losses import LOSSES, token_loss
from klkit.rng import stream
from klkit.sequences import Sequences

FIELDS = {
    "hidden": ("hidden",),
    "top-k": ("tokens", "logp", "rest"),
    "sampled": ("tokens", "share"),
    "hybrid": ("tokens", "logp", "rest", "draws", "logp_draws", "whole"),
}

TOKEN = torch.tensor([0])


def strings(count=7, *, vocabulary=300, seed=0, longest=9):
    """Ragged strings of ordinary tokens; one of them has no response."""
    random = stream(seed, "cache", "strings")

    def ids(length):
        return torch.randint(1, vocabulary, (length,), generator=random)

    return Sequences.pack(
        [ids(1 + i % 3) for i in range(count)], [ids(0 if i == 2 else 1 + i % longest) for i in range(count)]
    )


@pytest.fixture(scope="module")
def teacher():
    return load(str(folder("llama")))


@pytest.fixture(scope="module")
def student():
    return load(str(folder("llama", seed=1, hidden_size=16)))


@pytest.fixture(scope="module")
def hidden_cache(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "hidden"
    return build(path, teacher, strings(), batch=3, shard_bytes=1000).cache


@pytest.mark.parametrize("key", [key for key in LOSSES if key != "cross_entropy"])
def test_every_loss_is_the_same_from_logits_and_from_a_cache_of_hidden_states(teacher, student, hidden_cache, key):
    x = strings()
    assert len(hidden_cache.manifest.parts) > 1
    logp = torch.cat(list(log_probs(teacher, x)))
    h = student.encode(x).clone()
    found = []
    for law_of_teacher in (Logits(logp), hidden_cache.rows(range(7), x)):
        ours = h.clone().requires_grad_()
        loss = distillation_loss(law_of_teacher, Hidden(ours, student.head().detach()), x.targets(), key).loss
        loss.backward()
        found.append((loss.detach(), ours.grad))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6 * float(found[0][1].abs().max()) + 1e-7)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite", "bloom"])
def test_caps_factors_and_tied_heads_come_back(kind, tmp_path):
    model, x = load(str(folder(kind))), strings()
    law_of_teacher = build(tmp_path / "c", model, x).cache.rows(range(7))
    torch.testing.assert_close(
        law_of_teacher.rows(slice(None)).log_softmax(-1), torch.cat(list(log_probs(model, x))), rtol=1e-5, atol=1e-5
    )


def test_half_precision_vectors_are_kept_in_half_precision(tmp_path):
    model, x = load(str(folder("llama")), dtype="bfloat16"), strings()
    cache = build(tmp_path / "c", model, x, batch=100).cache
    found = cache.rows(range(7))
    assert found.hidden.dtype == found.head.weight.dtype == torch.bfloat16
    assert torch.equal(found.hidden, model.encode(x))


def test_rows_come_in_the_order_asked_for(hidden_cache, teacher):
    order = [5, 0, 2, 6, 5]
    found = hidden_cache.rows(order)
    whole = torch.split(hidden_cache.rows(range(7)).hidden, strings().lengths.tolist())
    assert torch.equal(found.hidden, torch.cat([whole[i] for i in order]))
    assert torch.equal(hidden_cache.strings(order).targets(), strings().select(order).targets())
    assert len(hidden_cache.rows([])) == len(hidden_cache.rows([2])) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_decisions_give_a_loss_of_zero_with_a_graph(kind, teacher, tmp_path):
    cache = build(tmp_path / "c", teacher, strings(), Recording(kind, k=4, draws=4)).cache
    z = torch.zeros(0, cache.manifest.size, requires_grad=True)
    found = cache.rows([2])
    found = found.sampled() if isinstance(found, Hybrid) else found
    loss = distillation_loss(found, Logits(z), None, "forward_kl").loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert z.grad.shape == z.shape


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_shards_change_nothing(kind, teacher, tmp_path):
    recording = Recording(kind, k=5, draws=20)
    settings = itertools.product((1, 3, 100), (200, 1 << 20))
    found = [
        build(tmp_path / f"{batch}-{size}", teacher, strings(), recording, batch=batch, shard_bytes=size).cache.rows(
            range(7)
        )
        for batch, size in settings
    ]
    for other in found[1:]:
        for name in FIELDS[kind]:
            torch.testing.assert_close(getattr(other, name), getattr(found[0], name), rtol=1e-4, atol=1e-5)


def test_a_model_in_double_precision_is_batch_independent_to_the_bit(tmp_path):
    model = load(str(folder("llama")), dtype="float64")
    recording = Recording("top-k", k=5)
    one, other = (
        build(tmp_path / str(batch), model, strings(), recording, batch=batch).cache.rows(range(7)) for batch in (1, 7)
    )
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.logp, other.logp)


def test_top_k_holds_exact_log_probabilities_and_the_rest(teacher, tmp_path):
    x = strings()
    built = build(tmp_path / "c", teacher, x, Recording("top-k", k=6, temperature=2.0)).cache
    found = built.rows(range(7))
    logp = (torch.cat(list(log_probs(teacher, x))) / 2.0).log_softmax(-1)
    assert found.temperature == 2.0
    torch.testing.assert_close(found.logp, logp.topk(6).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.logp, logp.gather(-1, found.tokens), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.logp.exp().sum(-1) + found.rest.exp(), torch.ones(len(found)))
    coverage = built.manifest.coverage
    mass = logp.exp().topk(6).values.sum(-1)
    assert coverage["mean_mass"] == pytest.approx(float(mass.mean()), rel=1e-5)
    assert coverage["heads_covered"] == pytest.approx(float((mass >= 0.5).float().mean()))
    assert coverage["mean_entropy"] == pytest.approx(float(-(logp.exp() * logp).sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize("key", [key for key in LOSSES if key != "cross_entropy" and token_loss(key).merging_lowers])
def test_a_top_k_cache_gives_a_lower_bound_at_every_decision(key, teacher, student, tmp_path):
    x = strings()
    logp = torch.cat(list(log_probs(teacher, x)))
    ours = Logits(torch.cat(list(log_probs(student, x))))
    whole = distillation_loss(Logits(logp), ours, None, key).divergence
    last = torch.zeros_like(whole)
    for k in (1, 4, 32, teacher.vocabulary.size):
        found = build(tmp_path / f"{key}{k}", teacher, x, Recording("top-k", k=k)).cache.rows(range(7))
        bound = distillation_loss(found, ours, None, key).divergence
        assert bool((bound <= whole + 1e-5 * whole.abs() + 1e-6).all())
        assert bool((bound >= last - 1e-5).all())
        last = bound
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)


def test_draws_are_unbiased_for_the_gradient_of_the_forward_kl_by_enumeration():
    """The mean over all sequences of draws, each with its probability, is the gradient itself."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    z = torch.tensor([[0.1, -0.4, 0.7]], dtype=torch.float64, requires_grad=True)
    kl(p.log()[None], z.log_softmax(-1)).sum().backward()
    wanted, total = z.grad.clone(), torch.zeros_like(z.grad)
    for draws in itertools.product(range(3), repeat=3):
        ids = sorted(set(draws))
        tensors = {
            "ids": torch.tensor(ids, dtype=torch.int32),
            "counts": torch.tensor([draws.count(i) for i in ids], dtype=torch.int16),
            "unique": torch.tensor([len(ids)], dtype=torch.int16),
        }
        z.grad = None
        distillation_loss(law("sampled", tensors, head=None, temperature=1.0), Logits(z), None).loss.backward()
        total += p[list(draws)].prod() * z.grad
    torch.testing.assert_close(total, wanted, rtol=1e-6, atol=1e-7)


def test_draws_have_the_law_they_are_drawn_from():
    """The same numbers as the inverse of the distribution function gives, and their frequencies."""
    model = memoryless([0.6, 0.0, 0.4], end=0.25)
    hidden = model.begin([model.context(None)])[1]
    p, one = model.readout(hidden).exp()[0], Sequences.pack([model.context(None)], [torch.tensor([0])])
    count = 20_000
    kept, coverage = record(model, hidden, Recording("sampled", draws=count), one, size=4, examples=torch.tensor([0]))
    found = law("sampled", kept, head=None, temperature=1.0)
    share = torch.zeros(4).index_add_(0, found.tokens[0], found.share[0]).double()
    z = (share - p) / (p * (1 - p) / count).sqrt().clamp(min=1e-12)
    assert float(z[p > 0].abs().max()) < 4
    assert float(share[p == 0].sum()) == 0
    assert coverage.different == int((p > 0).sum())
    uniform = torch.rand(count, dtype=torch.float64, generator=stream(0, "teacher", 0))
    first = int((uniform < p.double().cumsum(0)[0]).sum())
    assert int(kept["counts"][0]) == first


@pytest.mark.parametrize("kind", ["top-k", "sampled", "hybrid"])
def test_rows_read_out_a_few_at_a_time_are_the_same(kind, teacher, tmp_path, monkeypatch):
    one = build(tmp_path / "one", teacher, strings(), Recording(kind)).cache.rows(range(7))
    monkeypatch.setattr(kinds, "read_rows", lambda model, hidden: read_rows(model, hidden, rows=2))
    few = build(tmp_path / "few", teacher, strings(), Recording(kind)).cache.rows(range(7))
    assert torch.equal(one.tokens, few.tokens)


def test_sampled_caches_serve_the_forward_kl_and_nothing_else(teacher, student, tmp_path):
    x = strings()
    found = build(tmp_path / "c", teacher, x, Recording("sampled", draws=16)).cache.rows(range(7), x)
    assert isinstance(found, Sampled)
    torch.testing.assert_close(found.share.sum(-1), torch.ones(len(found)))
    ours = Logits(torch.cat(list(log_probs(student, x))))
    assert distillation_loss(found, ours, x.targets(), "forward_kl").exactness == "unbiased gradient"
    for key in LOSSES:
        if not token_loss(key).linear_in_p:
            with pytest.raises(ValueError, match="not linear"):
                distillation_loss(found, ours, x.targets(), key)


def test_padding_rows_without_mass_are_left_out_and_others_are_kept(tmp_path):
    """A table of 512 rows over a tokenizer of 320: no token beyond the last one named is ever in a law."""
    light = load(str(folder("llama", vocab_size=512)))
    named = len(light.tokenizer)
    x = strings()
    heavy = build(tmp_path / "heavy", light, x, Recording("top-k", k=400)).cache
    assert heavy.manifest.size == 512
    assert heavy.manifest.coverage["largest_unused_mass"] > 1e-3
    with pytest.raises(ValueError, match="gives mass to ids that the student lacks"):
        heavy.rows(range(7), size=named)
    bare = build(tmp_path / "hidden", light, x).cache
    cut = bare.rows(range(7), size=named)
    whole = torch.cat(list(log_probs(light, x)))
    torch.testing.assert_close(
        cut.rows(slice(None)).log_softmax(-1), whole[:, :named].log_softmax(-1), rtol=1e-4, atol=1e-5
    )
    assert isinstance(bare.rows([0]), Hidden)
    assert bare.rows([0]).size == 512


def test_rows_of_no_mass_leave_every_law(tmp_path):
    model = load(str(folder("llama", vocab_size=512)))
    named, x = len(model.tokenizer), strings()
    readout = type(model).readout

    def without(h):
        logits = readout(model, h)
        logits[:, named:] = -60.0
        return logits.log_softmax(-1)

    model.readout = without
    for recording in (Recording("top-k", k=64), Recording("sampled"), Recording("hybrid", k=9, draws=3)):
        cache = build(tmp_path / recording.kind, model, x, recording).cache
        assert cache.manifest.size == named
        assert cache.manifest.coverage["largest_unused_mass"] < 1e-20
        found = cache.rows(range(7), size=named)
        assert int(found.tokens.max()) < named
    assert isinstance(build(tmp_path / "top-k", model, x, Recording("top-k")).cache.rows([0]), TopK)


def test_a_hidden_cache_is_far_smaller_than_half_precision_logits():
    size = cache_size(
        Recording(),
        decisions=10**6,
        examples=2_000,
        tokens=1_500_000,
        width=2048,
        vocabulary=128_000,
        dtype=torch.bfloat16,
    )
    assert size.decision == 4096
    assert size.logits == 256 * 10**9
    assert size.laws * 62 < size.logits
    assert size.saving > 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_said_before_is_the_size_written(kind, teacher, tmp_path):
    x = strings(60)
    recording = Recording(kind, k=8, draws=8)
    said = size_of(teacher, x, recording)
    cache = build(tmp_path / "c", teacher, x, recording).cache
    overhead = 2000  # names, shapes and offsets of a file's tensors
    assert cache.manifest.bytes <= said.total + 2 * overhead
    if kind != "sampled":
        assert cache.manifest.bytes >= said.total - overhead


def test_a_cache_is_a_head_with_its_vectors(hidden_cache, teacher):
    found, own = hidden_cache.rows([0]).head, teacher.head()
    assert isinstance(found, Head)
    assert torch.equal(found.weight, own.weight[: own.tokens])
    assert isinstance(TeacherCache.open(hidden_cache.path).rows([1]), Hidden)


# Known tokens and draws from the others


def test_a_hybrid_cache_holds_the_law_as_the_teacher_has_it(teacher, tmp_path):
    x = strings()
    found = build(tmp_path / "c", teacher, x, Recording("hybrid", k=6, draws=5)).cache.rows(range(7), x)
    logp = torch.cat(list(log_probs(teacher, x)))
    assert isinstance(found, Hybrid)
    torch.testing.assert_close(found.logp, logp.gather(1, found.tokens))
    torch.testing.assert_close(found.logp, logp.topk(6).values)
    torch.testing.assert_close(found.rest, logp.scatter(1, found.tokens, -torch.inf).logsumexp(1))
    torch.testing.assert_close(found.logp_draws, logp.gather(1, found.draws))
    assert not bool((found.draws[:, :, None] == found.tokens[:, None, :]).any())
    assert bool(found.whole.all())
    wide, scalars, end = logp.double(), found.scalars, list(teacher.vocabulary.ends)
    entropy = -(wide.exp() * wide).sum(1)
    ending = wide.exp()[:, end].sum(1)
    wanted = {
        "logp": wide.gather(1, x.targets()[:, None])[:, 0],
        "entropy": entropy,
        "variance": (wide.exp() * (wide + entropy[:, None]).square()).sum(1),
        "coin": torch.stack([ending.log(), (1 - ending).log()], 1),
    }
    for name, values in wanted.items():
        torch.testing.assert_close(getattr(scalars, name).double(), values, rtol=1e-5, atol=1e-6)


def test_draws_from_the_tail_have_its_law_and_come_from_the_stream_of_the_example():
    model = memoryless([0.5, 0.2, 0.0, 0.1, 0.2], end=0.25)
    hidden, one = model.begin([model.context(None)])[1], Sequences.pack([model.context(None)], [torch.tensor([5])])
    count, p = 20_000, model.readout(hidden).exp()[0]
    recording = Recording("hybrid", k=2, draws=count, seed=3)
    kept, coverage = record(model, hidden, recording, one, size=6, examples=torch.tensor([8]))
    found = law("hybrid", kept, head=None, temperature=1.0, size=6)
    assert sorted(found.tokens[0].tolist()) == [0, 5]
    assert not bool(found.whole)
    tail = p.index_fill(0, found.tokens[0], 0.0) / float(found.rest.exp())
    share = found.draws[0].bincount(minlength=6) / count
    z = (share - tail) / (tail * (1 - tail) / count).sqrt().clamp(min=1e-12)
    assert float(z[tail > 0].abs().max()) < 4
    assert float(share[tail == 0].sum()) == 0
    assert coverage.mass == pytest.approx(float(found.logp.exp().sum()))
    uniform = torch.rand(count, dtype=torch.float64, generator=stream(3, "teacher", 8))
    assert float(share[1]) == pytest.approx(float((uniform < tail[1]).double().mean()))


def test_nothing_is_drawn_where_nothing_is_left(teacher, tmp_path):
    found = build(tmp_path / "c", teacher, strings(), Recording("hybrid", k=320, draws=3)).cache.rows(range(7))
    assert bool((found.rest == -torch.inf).all())
    assert bool((found.logp_draws == -torch.inf).all())
    assert float(found.sampled().share[:, 320:].sum()) == 0
    model, x = memoryless([0.5, 0.5, 0.0], end=0.5), Sequences.pack([torch.tensor([3])], [torch.tensor([0, 3])])
    found = build(tmp_path / "m", model, x, Recording("hybrid", k=3, draws=2)).cache.rows([0])
    assert bool((found.rest == -torch.inf).all())
    assert not bool(found.whole.any())


def test_a_tail_of_hardly_any_mass_is_drawn_from_like_any_other():
    """Its probabilities are 0 in single precision, their ratios are not."""
    logits = torch.tensor([[0.0, -150.0, -151.0, -1000.0]])
    kept, _ = kinds._both(logits.log_softmax(1), 1, torch.linspace(0, 1, 101)[None, :100].double(), TOKEN, (0,))
    drawn = kept["draws"][0].bincount(minlength=4) / 100
    assert drawn.tolist() == pytest.approx([0, 0.74, 0.26, 0])
    assert float(kept["rest"]) == pytest.approx(-150 + 0.3133, abs=1e-3)
    assert bool(kept["whole"])


def test_a_hybrid_cache_of_256_tokens_and_16_draws_takes_2201_bytes_a_decision():
    facts = {"decisions": 100_000, "examples": 200, "tokens": 100_000, "width": 2048, "vocabulary": 128_000}
    size = cache_size(Recording("hybrid", k=256, draws=16), **facts, dtype=torch.bfloat16)
    assert size.decision == 8 * 256 + 8 * 16 + 25
    assert size.saving > 110
    assert cache_size(Recording(), **facts, dtype=torch.bfloat16).saving > 20
