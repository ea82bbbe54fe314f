"""One reference and its candidates: what is shared, what is freed, and that neither changes a number."""

import gc
import weakref

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tests.models.test_spec import STRINGS, adapter, log_probs
from tests.tiny import build, folder

from klkit.models import family
from klkit.models.checkpoints import quiet
from klkit.models.family import ALONE, READ_OUT, SAME, SHARED, open_family
from klkit.models.spec import load, load_pair
from klkit.models.wrap import innermost, temperature, top_k, top_p


@pytest.fixture(scope="module")
def base():
    return str(folder("gpt2"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, base):
    root = tmp_path_factory.mktemp("family")
    # Names that differ in a dot only are two adapters.
    return [adapter(root / name, base, seed=i) for i, name in enumerate(("tuned.0", "tuned_0", "tuned.2"))]


def storages_alive():
    """All parameters that are in memory, each storage once."""
    gc.collect()
    return {p.data_ptr(): p for p in gc.get_objects() if type(p) is torch.nn.Parameter}


@pytest.fixture
def parameters_alive():
    """Counts the numbers in all parameters that are in memory, but for what other tests have left there."""
    before = storages_alive()  # and stays alive, so that nothing new takes the place of it
    return lambda: sum(p.numel() for place, p in storages_alive().items() if place not in before)


class TestReadOut:
    def test_of_p_is_p_read_out_otherwise(self, base):
        p, load_candidate = open_family(base, ["temperature=0.5", "top_k=3,temperature=2", f"{base},top_p=0.9"])
        wanted = [temperature(p, 0.5), top_k(temperature(p, 2.0), 3), top_p(p, 0.9)]
        for i, law in enumerate(wanted):
            candidate = load_candidate(i)
            with candidate as q:
                assert candidate.how == READ_OUT
                assert innermost(q) is p
                assert torch.equal(log_probs(q), log_probs(law))
        assert [load_candidate(i).model.name for i in range(3)] == [
            "temperature=0.5",
            "top_k=3,temperature=2",
            f"{base},top_p=0.9",
        ]
        assert log_probs(p).shape == (8, 320)  # still there after its candidates

    def test_of_a_transformed_p(self, base):
        p, load_candidate = open_family(f"{base},temperature=0.5", ["temperature=2", base, f"{base},temperature=0.5"])
        assert (p.name, p.base.name) == (f"{base},temperature=0.5", f"{base},temperature=0.5")
        assert innermost(load_candidate(0).model) is innermost(p)
        plain = load_candidate(1)
        assert (plain.how, plain.model.name) == (READ_OUT, base)
        assert torch.equal(log_probs(plain.model), log_probs(load(base)))
        assert load_candidate(2).model is p
        assert load_candidate(2).how == SAME

    def test_with_an_adapter_below(self, base, adapters):
        p, load_candidate = open_family(base, [f"peft={adapters[0]},temperature=0.5"])
        with load_candidate(0) as q:
            assert torch.equal(log_probs(q), log_probs(temperature(load(f"{base},peft={adapters[0]}"), 0.5)))
            assert innermost(q).model is p.model

    def test_pairs_share_as_families_do(self, base):
        p, q = load_pair(base, f"{base},temperature=0.5")
        assert innermost(q) is p
        assert torch.equal(log_probs(q), log_probs(load(f"{base},temperature=0.5")))


class TestAdapters:
    def test_come_and_go(self, base, adapters, parameters_alive):
        alone = [log_probs(load(f"{base},peft={a}")) for a in adapters]
        p, load_candidate = open_family(base, [f"peft={a}" for a in adapters])
        wanted, digest = log_probs(p), p.digest
        one = sum(x.numel() for x in p.model.parameters())
        assert parameters_alive() == one
        sizes, digests = [], []
        for i in (0, 1, 2, 0):
            candidate = load_candidate(i)
            with candidate as q:
                assert candidate.how == SHARED
                assert q.model is p.model
                for _ in range(2):  # whoever passes switches
                    assert torch.equal(log_probs(q), alone[i])
                    assert torch.equal(log_probs(p), wanted)
                sizes.append(parameters_alive())
                digests.append(q.digest)
            assert parameters_alive() == one
            assert torch.equal(log_probs(p), wanted)
        rank, layers = 2, 2
        added = layers * rank * ((32 + 96) + (32 + 128))  # c_attn and c_fc
        assert sizes == [one + added] * 4
        assert digests[0] == digests[3] == load(f"{base},peft={adapters[0]}").digest
        assert len({*digests, digest}) == 4
        assert load(base).digest == digest
        # The network is as it was read.
        assert set(dict(p.model.named_parameters())) == set(dict(load(base).model.named_parameters()))

    def test_p_with_an_adapter(self, base, adapters):
        p, load_candidate = open_family(f"{base},peft={adapters[0]}", [f"peft={adapters[1]}", base])
        wanted = log_probs(load(f"{base},peft={adapters[0]}"))
        for i, spec in enumerate([f"{base},peft={adapters[1]}", base]):
            candidate = load_candidate(i)
            with candidate as q:
                assert candidate.how == SHARED
                assert torch.equal(log_probs(q), log_probs(load(spec)))
                assert torch.equal(log_probs(p), wanted)
                assert q.digest == load(spec).digest
            assert torch.equal(log_probs(p), wanted)

    def test_two_at_a_time(self, base, adapters):
        p, load_candidate = open_family(base, [f"peft={a}" for a in adapters])
        one, two = load_candidate(0), load_candidate(1)
        wanted = log_probs(two.model)
        one.release()
        one.release()
        assert torch.equal(log_probs(two.model), wanted)
        two.release()
        assert torch.equal(log_probs(p), log_probs(load(base)))

    def test_released_ones_refuse(self, base, adapters):
        _, load_candidate = open_family(base, [f"peft={adapters[0]}"])
        candidate = load_candidate(0)
        h = candidate.model.encode(STRINGS)
        candidate.release()
        for use in (
            lambda q: q.encode(STRINGS),
            lambda q: q.readout(h),
            lambda q: q.begin([STRINGS.context(0)]),
            lambda q: q.digest,
            lambda q: q.embedding(),
        ):
            with pytest.raises(ValueError, match=r"expected a model that is loaded.* released; load it again"):
                use(candidate.model)

    def test_that_alter_the_base_are_loaded_by_themselves(self, tmp_path, base, adapters):
        biased = adapter(tmp_path / "biased", base, bias="all", seed=5)
        p, load_candidate = open_family(base, [f"peft={biased}", f"peft={adapters[0]}"])
        wanted = log_probs(load(base))
        candidate = load_candidate(0)
        with candidate as q:
            assert candidate.how == ALONE
            assert torch.equal(log_probs(p), wanted)
            assert torch.equal(log_probs(q), log_probs(load(f"{base},peft={biased}")))
        other = load_candidate(1)
        assert other.how == SHARED
        assert torch.equal(log_probs(other.model), log_probs(load(f"{base},peft={adapters[0]}")))
        # As p, such a one keeps its altered network to itself.
        p, load_candidate = open_family(f"{base},peft={biased}", [base, f"peft={adapters[0]}"])
        assert torch.equal(log_probs(p), log_probs(load(f"{base},peft={biased}")))
        assert [load_candidate(i).how for i in range(2)] == [ALONE, ALONE]
        assert torch.equal(log_probs(load_candidate(0).model), wanted)

    def test_of_another_kind_than_p_s(self, tmp_path, base, adapters):
        with quiet():
            config = IA3Config(
                target_modules=["c_attn"], feedforward_modules=[], task_type="CAUSAL_LM", fan_in_fan_out=True
            )
            wrapped = get_peft_model(build("gpt2"), config)
            for name, weight in wrapped.named_parameters():
                if "ia3" in name:
                    weight.data.normal_(1.0, 0.3, generator=torch.Generator().manual_seed(0))
            wrapped.save_pretrained(tmp_path)
        for p_spec, how in ((base, SHARED), (f"{base},peft={adapters[0]}", ALONE)):
            p, load_candidate = open_family(p_spec, [f"peft={tmp_path}"])
            candidate = load_candidate(0)
            with candidate as q:
                assert candidate.how == how
                assert float((log_probs(q) - log_probs(p)).abs().max()) > 0.01
                assert torch.allclose(log_probs(q), log_probs(load(f"{base},peft={tmp_path}")), atol=1e-5)

    def test_with_a_head_of_its_own(self, tmp_path):
        base = str(folder("llama"))
        own = adapter(tmp_path / "head", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
        p, load_candidate = open_family(base, [f"peft={own}"])
        wanted = log_probs(p)
        with load_candidate(0) as q:
            assert torch.equal(log_probs(q), log_probs(load(f"{base},peft={own}")))
            assert torch.equal(log_probs(p), wanted)
            assert float((log_probs(q) - wanted).abs().max()) > 0.1
        assert torch.equal(log_probs(p), wanted)

    def test_that_changes_nothing_says_so(self, tmp_path, base, adapters):
        with quiet():  # as initialised: B is zero
            get_peft_model(
                build("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
            ).save_pretrained(tmp_path)
        p, load_candidate = open_family(base, [f"peft={tmp_path}", f"peft={adapters[0]}"])
        with load_candidate(0) as q:
            assert q.inert
            assert q.notes == (
                f"the adapter {tmp_path} changes nothing: its B matrices are zero, as they are initialised",
            )
            assert torch.equal(log_probs(q), log_probs(p))
        with load_candidate(1) as q:
            assert not q.inert


class TestByThemselves:
    def test_memory_is_p_and_one_candidate(self, base, parameters_alive):
        other = str(folder("gpt2", seed=1))
        specs = ["dtype=float64", "round=int4", other, f"{other},temperature=0.5"]
        p, load_candidate = open_family(base, specs)
        one = parameters_alive()
        for i, spec in enumerate(specs):
            candidate = load_candidate(i)
            with candidate as q:
                assert candidate.how == ALONE
                assert q.name == spec
                gone = weakref.ref(innermost(q).model), weakref.ref(innermost(q).model.lm_head.weight)
                assert parameters_alive() == 2 * one
            assert [ref() for ref in gone] == [None, None]  # though q is still a name for it
            assert parameters_alive() == one
        assert torch.equal(log_probs(p), log_probs(load(base)))

    def test_rounded_weights_and_adapters_on_them(self, base, adapters):
        p, load_candidate = open_family(
            f"{base},round=int4", [f"peft={adapters[0]}", base, f"{base},peft={adapters[0]}"]
        )
        assert [load_candidate(i).how for i in range(3)] == [SHARED, ALONE, ALONE]
        with load_candidate(0) as q:
            assert torch.equal(log_probs(q), log_probs(load(f"{base},round=int4,peft={adapters[0]}")))
            assert q.model is p.model

    def test_other_ends_need_no_other_network(self, base):
        p, load_candidate = open_family(base, ["ends=5"])
        with load_candidate(0) as q:
            assert (q.model is p.model, q.vocabulary.ends) == (True, (5,))


def test_every_spec_is_read_before_anything_is_loaded(base, monkeypatch):
    monkeypatch.setattr(family, "Family", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="did you mean temperature"):
        open_family(base, [base, "temprature=2"])


def test_defaults_are_for_what_specs_do_not_say(base):
    p, load_candidate = open_family(base, ["dtype=float32", f"{base},temperature=2"], dtype="float64")
    assert p.dtype == torch.float64
    assert load_candidate(0).model.dtype == torch.float32
    assert innermost(load_candidate(1).model) is p


def test_packaged_models():
    p, load_candidate = open_family("klkit:docs", ["klkit:docs-lora", "klkit:docs-int4", "round=int4"])
    assert [load_candidate(i).how for i in range(3)] == [SHARED, ALONE, ALONE]
    with load_candidate(1) as one, load_candidate(2) as two:
        assert torch.equal(log_probs(one), log_probs(two))
        assert float((log_probs(one) - log_probs(p)).abs().max()) > 0.01
