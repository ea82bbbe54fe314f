"""Numerical floors: each is what it says, and a run can be held against any of them."""

import shutil
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from tests.tiny import build, folder

import klkit
from klkit.api.floor import floors
from klkit.api.prepare import alike
from klkit.models.automaton import coin
from klkit.models.checkpoints import quiet
from klkit.models.family import open_family
from klkit.models.spec import load_pair

OPTIONS = {"samples": 4, "max_tokens": 8}


@pytest.fixture(scope="module")
def base():
    return str(folder("llama"))


class TestFloors:
    def test_precision_is_what_decides(self, base):
        found = {
            dtype: {floor.kind: floor for floor in floors(base, dtype=dtype, **OPTIONS)}
            for dtype in ("auto", "bfloat16", "float64")
        }
        assert [list(kinds) for kinds in found.values()] == [["decoding", "batch shape", "noise", "dtype"]] * 3
        for kind in ("decoding", "noise"):
            single, half, double = (found[dtype][kind].value for dtype in ("auto", "bfloat16", "float64"))
            assert 0 <= double < 1e-20 < single < 1e-8, kind
            assert kind == "decoding" or half > 1e-5  # two passes in bf16 may agree to the bit, noise may not
        assert found["auto"]["batch shape"].value < 1e-8
        assert [found[d]["dtype"].meaning for d in found] == [
            "float32 against bfloat16",
            "float32 against bfloat16",
            "float64 against float32",
        ]
        assert found["auto"]["dtype"].value > 1e6 * found["auto"]["noise"].value
        # Noise of rounding size is a model of rounding: the same order of magnitude.
        assert 1 / 30 < found["bfloat16"]["noise"].value / found["bfloat16"]["dtype"].value < 30

    def test_rates_and_errors(self, base):
        for floor in floors(base, dtype="bfloat16", samples=3, max_tokens=1):
            assert floor.n == 3
            assert floor.per_token == pytest.approx(floor.value)  # one decision a string
            assert floor.per_token_stderr == pytest.approx(floor.stderr)
        one, other = (list(floors(base, seed=seed, **OPTIONS)) for seed in (0, 1))
        assert one == list(floors(base, **OPTIONS))
        assert one != other
        assert one[0].to_dict()["kind"] == "decoding"

    def test_prompts(self, base, tmp_path):
        (tmp_path / "few.txt").write_text("the film\na dull story\nthe cast was\n")
        found = list(floors(base, str(tmp_path / "few.txt"), samples=5, max_tokens=6))
        assert {floor.n for floor in found} == {5}
        with pytest.raises(ValueError, match="at least 1 for samples, got 0"):
            list(floors(base, samples=0))


class TestOfARun:
    def test_noise(self, base):
        result = klkit.estimate(base, f"{base},temperature=0.9", floor="noise", samples=40, max_tokens=8)
        assert result.floor["kind"] == "the model with rounding-size noise after every layer against the model as run"
        assert result.floor["n"] == 8
        assert 0 < float(result.floor["value"]) < 1e-8
        assert result.audit["passed"]
        reverse = klkit.estimate(
            base, f"{base},temperature=0.9", floor="noise", samples=40, max_tokens=8, divergence="reverse_kl"
        )
        assert 0 < float(reverse.floor["value"]) < 1e-8

    def test_dtype(self, base):
        result = klkit.estimate(base, f"{base},dtype=bfloat16", floor="dtype", samples=40, max_tokens=8)
        assert (result.floor["kind"], result.floor["n"]) == ("the model in fp32 against the model as run", 8)
        assert float(result.floor["value"]) < 1e-12

    def test_noise_needs_a_network(self):
        with pytest.raises(ValueError, match="expected a network with decoder layers"):
            klkit.estimate(coin(end=0.5), coin(end=0.4), floor="noise")


class TestExactlyZero:
    """Where two models with different names give the same numbers, the advice says what is known of the reason."""

    def advice(self, p, q, **options):
        result = klkit.estimate(p, q, samples=20, max_tokens=8, **options)
        check = result.audit["checks"]["no_difference_share"]
        assert check["verdict"] == "warn"
        assert result.lines["warning"] or check["advice"] in result.lines.values()
        assert result.headline.value == pytest.approx(0, abs=1e-9)
        return check["advice"]

    def test_a_copy_under_another_name(self, base, tmp_path):
        shutil.copytree(base, tmp_path / "copy")
        said = self.advice(base, str(tmp_path / "copy"))
        assert "the same weights, value for value" in said
        assert "one model under two names" in said
        assert "Are these the same weights" not in said

    def test_a_read_out_that_changes_nothing(self, base):
        assert "the same weights" in self.advice(base, f"{base},temperature=1")

    def test_a_fresh_adapter(self, base, tmp_path):
        with quiet():
            get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
        said = self.advice(base, f"{base},peft={tmp_path}")
        assert "The adapter of q changes nothing: its B matrices are all zero" in said
        said = self.advice(f"{base},peft={tmp_path}", base)
        assert "The adapter of p changes nothing" in said
        # A reverse run draws from q, and its advice still goes by the run's names.
        said = self.advice(base, f"{base},peft={tmp_path}", divergence="reverse_kl")
        assert "The adapter of q changes nothing" in said

    def test_different_weights_without_effect(self, base, tmp_path):
        from safetensors.torch import load_file, save_file

        shutil.copytree(base, tmp_path / "other")
        file = tmp_path / "other" / "model.safetensors"
        weights = load_file(file)
        last = max(i for i, name in enumerate(load_pair(base, base)[0].vocabulary.tokens) if name)
        # A token that is never read has an input vector that nothing depends on.
        weights["model.embed_tokens.weight"][last] += 1
        save_file(weights, file, metadata={"format": "pt"})
        p, q = load_pair(base, str(tmp_path / "other"))
        assert p.digest != q.digest
        said = self.advice(p, q)
        assert said.startswith("No decision differs by more than rounding. The weights of the two sides are different")
        assert p.digest in said
        assert q.digest in said

    def test_a_real_difference_is_not_questioned(self, base):
        p, load_candidate = open_family(base, ["round=int4"])
        with load_candidate(0) as q:
            check = klkit.estimate(p, q, samples=20, max_tokens=8).audit["checks"]["no_difference_share"]
            assert check["verdict"] == "pass"

    def test_automata_are_known_by_their_tables(self):
        assert alike(coin(end=0.5), coin(end=0.5)).startswith("Both sides have the same weights")
        assert alike(coin(end=0.5), coin(end=0.25)).startswith("The weights of the two sides are different")

    def test_models_without_weights(self):
        assert alike(*(SimpleNamespace(name=name, pieces=list) for name in "pq")) == ""
