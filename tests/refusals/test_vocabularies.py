"""Two models over other tokens: bridged and said where that is harmless, refused before anything is drawn elsewhere."""

import copy
import math

import pytest
import torch
from tests.tiny import build, tokenizer

import klkit
from klkit.models.automaton import Automaton, memoryless
from klkit.models.base import Vocabulary, VocabularyMismatch
from klkit.models.hf import HuggingFaceModel
from klkit.models.spec import locate

FEW = {"samples": 40, "max_tokens": 40, "floor": "none"}
P = memoryless([0.5, 0.5], end=0.25, name="p")
Q = memoryless([0.4, 0.6], end=0.25, name="q")


def wider(model, share, token=None, name=None):
    """The model with one more row of probability ``share``: a padding row, or the token ``token``."""
    mass = torch.tensor([[share]], dtype=torch.float64)
    return Automaton(
        log_probabilities=torch.cat([model.log_probabilities + torch.log1p(-mass), mass.log()], 1),
        transitions=torch.zeros(1, model.vocabulary.size + 1, dtype=torch.long),
        vocabulary=Vocabulary((*model.vocabulary.tokens, token), model.vocabulary.ends),
        name=name or model.name,
    )


def renamed(model, tokens, ends=None):
    """The model with other strings for its ids."""
    return Automaton(
        model.log_probabilities, model.transitions, Vocabulary(tuple(tokens), ends or model.vocabulary.ends), name="q"
    )


def test_padding_rows_that_carry_nothing_are_left_out_and_their_mass_is_printed():
    result = klkit.estimate(P, wider(Q, 1e-9), **FEW)
    assert (
        "1 rows from 3 on are defined by no tokenizer: left out of both softmaxes (they carry at most 0.0e+00 of p and "
        "1.0e-09 of q)"
    ) in result.notes
    assert result.headline.value == pytest.approx(klkit.estimate(P, Q, **FEW).headline.value, rel=1e-12)


def test_padding_rows_that_carry_mass_are_kept_and_that_is_said():
    result = klkit.estimate(P, wider(Q, 0.1), **FEW)
    assert (
        "1 rows from 3 on are defined by no tokenizer: kept (they carry at most 0.0e+00 of p and 1.0e-01 of q); rows "
        "that one model lacks have probability zero there"
    ) in result.notes
    assert result.headline.value > klkit.estimate(P, Q, **FEW).headline.value


def test_tokens_of_q_alone_cost_what_q_spends_on_them():
    result = klkit.estimate(P, wider(P, 0.1, "<think>", "q"), **FEW)
    per_token = next(e for e in result.estimates if e.estimand == "R")
    assert per_token.value == pytest.approx(-math.log(0.9), rel=1e-12)
    assert any(
        note.startswith("1 tokens from 3 on, such as '<think>', exist in q only: probability zero under p; KL(p‖q)")
        and note.endswith("the other direction is infinite")
        for note in result.notes
    )
    assert klkit.estimate(P, wider(P, 0.1, "<think>", "q"), divergence="reverse_kl", **FEW).headline.value == math.inf


def test_tokens_of_p_alone_are_infinite_with_the_conditional_quantity_on_offer():
    p = wider(P, 0.1, "<think>")
    result = klkit.estimate(p, Q, **FEW)
    assert result.headline.value == math.inf
    assert any(
        "exist in p only: KL(p‖q) is infinite wherever p gives them mass; shared_only=True conditions on the shared "
        "tokens instead" in note
        for note in result.notes
    )
    assert (
        "to which p gives 0.1 on average, most often '<think>'"
        in (result.audit["checks"]["infinite_decisions"]["advice"])
    )
    shared = klkit.estimate(p, Q, shared_only=True, method="rb", **FEW)
    assert shared.headline.value == pytest.approx(klkit.estimate(P, Q, method="rb", **FEW).headline.value, rel=1e-9)
    assert "conditional on the 3 tokens that both models have: not the divergence of the models" in shared.notes


def test_permuted_strings_of_the_same_number_are_refused_by_id():
    a, b, end = P.vocabulary.tokens
    with pytest.raises(VocabularyMismatch) as error:
        klkit.estimate(P, renamed(Q, (b, a, end)), observe=lambda state: pytest.fail("something was drawn"), **FEW)
    assert str(error.value).startswith(
        "expected two models over the same tokens, got 2 ids with different strings (the same strings in another "
        "order): id 0 is 'a' in p and 'b' in q; id 1 is 'b' in p and 'a' in q;"
    )
    assert "bytes=True, --bytes on the command line" in str(error.value)


def test_other_tokenizers_are_refused_by_estimate_before_anything_is_drawn(run, tmp_path):
    code, out, err = run("estimate", "klkit:docs", "klkit:reviews")
    assert (code, out) == (2, "")
    assert "id 257 is 'Ġt' in klkit:docs and 'th' in klkit:reviews" in err
    assert not list(tmp_path.iterdir())


def test_other_tokenizers_are_refused_by_compare_before_anything_is_loaded(run, tmp_path, monkeypatch):
    import klkit.models.family as family

    monkeypatch.setattr(family, "read_network", lambda spec: pytest.fail(f"{spec.path} was loaded"))
    code, out, err = run("compare", "klkit:docs", "klkit:docs-int8", "klkit:reviews")
    assert (code, out) == (2, "")
    assert "got klkit:reviews with other strings for 253 ids: id 257 is 'Ġt' in klkit:docs and 'th' there" in err
    assert "klkit estimate with --bytes" in err
    assert not list(tmp_path.iterdir())


def test_other_end_tokens_are_said():
    q = renamed(Q, Q.vocabulary.tokens, ends=(2, 1))
    notes = klkit.estimate(P, q, **FEW).notes
    assert "end tokens differ ('<end>' for p, '<end>', 'b' for q): responses end at those of p" in notes


def test_other_chat_templates_are_said():
    models = []
    for opening, seed in (("USER ", 0), ("Q: ", 1)):
        words = copy.deepcopy(tokenizer())
        words.chat_template = opening + "{{ messages[0].content }}"
        models.append(HuggingFaceModel(build("gpt2", seed=seed), words, name=opening))
    prompts = ["the film", [{"role": "user", "content": "good?"}]]
    result = klkit.estimate(*models, prompts, samples=2, max_tokens=4, floor="none")
    assert (
        "the models read different contexts for 1 of 2 prompts (each its own template): the divergence is between "
        "their responses"
    ) in result.notes


def test_the_packaged_models_of_one_family_share_their_tokens():
    # The refusals above would be worth nothing if they refused these as well.
    from klkit.models.checkpoints import read_tokenizer
    from klkit.models.spec import ModelSpec

    one, two = (read_tokenizer(ModelSpec.parse(f"klkit:{name}")).get_vocab() for name in ("docs", "docs-int8"))
    assert one == two
    assert locate("klkit:docs") != locate("klkit:reviews")
