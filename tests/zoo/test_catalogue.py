"""The packaged checkpoints: complete, small, loadable by plain transformers, and what they claim to be."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from klkit.api.prompts import read_prompts
from klkit.zoo import grammar
from klkit.zoo.build import rounded, write_prompts
from klkit.zoo.catalogue import CATALOGUE, names, path, size
from klkit.zoo.tokenizer import END

WHOLE = [name for name, entry in CATALOGUE.items() if not entry.adapter]

# Paragraphs of the documentation that the build leaves out of the training text.
HELD_OUT = [
    "An identifier occurring as an atom is a name. See section Identifiers and keywords for lexical definition "
    "and section Naming and binding for documentation of naming and binding.",
    "You can also write multi-item context managers in multiple lines if the items are surrounded by parentheses."
    " For example:",
    "If the pattern succeeds, the corresponding guard (if present) is evaluated. In this case all name bindings "
    "are guaranteed to have happened.",
    "Note that comparisons, membership tests, and identity tests, all have the same precedence and have a left-"
    "to-right chaining feature as described in the Comparisons section.",
    "Strings implement all of the common sequence operations, along with the additional methods described below.",
    "Always returns at least one byte of data, unless at EOF. The exact number of bytes returned is unspecified.",
    "This class builds on InteractiveInterpreter and adds prompting using the familiar sys.ps1 and sys.ps2, and "
    "input buffering.",
    "The optional locals argument will be passed to the InteractiveInterpreter base class.",
    "In the other direction, data is read from the underlying stream using a Reader instance and then encoded and"
    " returned to the caller.",
    "Intrinsic defaults can be specified by passing them into the ConfigParser constructor as a dictionary.",
]  # fmt: skip


@functools.cache
def load(name: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(path(name)).eval()
    return model, AutoTokenizer.from_pretrained(path(name))


def log_prob(name: str, texts: list[str], context: list[int] | None = None) -> torch.Tensor:
    """Log-probability of each text, its end included, as the packaged model spells it."""
    model, tokenizer = load(name)
    context = context or [tokenizer.bos_token_id]
    values = []
    for text in texts:
        ids = [*context, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        values.append(logp[torch.arange(len(ids) - 1), ids[1:]][len(context) - 1 :].sum())
    return torch.stack(values)


def test_catalogue_and_folders_agree() -> None:
    weights = path("docs").parent
    assert {folder.name for folder in weights.iterdir()} == set(names())
    for i, name in enumerate(names()):
        assert size(name) <= 2_500_000
        card = (path(name) / "README.md").read_text(encoding="utf-8")
        assert card.count(f"klkit:{name}\n") == 1
        assert "Python 3." in card
        assert CATALOGUE[name].base in (None, *names()[:i])
        assert len(read_prompts(f"klkit:{CATALOGUE[name].prompts}")) == 64
        assert not list(path(name).glob("*.bin"))


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"docs-int4; got 'dogs'"):
        path("dogs")


@pytest.mark.parametrize("name", WHOLE)
def test_loads_by_plain_transformers(name: str) -> None:
    model, tokenizer = load(name)
    assert model.dtype == torch.float32
    assert model.num_parameters() == CATALOGUE[name].parameters
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.bos_token == tokenizer.eos_token == END
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    text = 'the "plot" – naïve, 42% of it…\n'
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    out = model.generate(torch.tensor([[0]]), attention_mask=torch.ones(1, 1), do_sample=False, max_new_tokens=100)
    words = tokenizer.decode(out[0], skip_special_tokens=True).split()
    assert len(words) >= 5


@pytest.mark.parametrize("name", [name for name in WHOLE if name.startswith("docs")])
def test_docs_models_predict_prose_they_have_not_read(name: str) -> None:
    tokenizer = load(name)[1]
    tokens = sum(len(tokenizer(text).input_ids) for text in HELD_OUT)  # the end token in place of the first
    assert math.exp(-float(log_prob(name, HELD_OUT).sum()) / tokens) < 50 < len(tokenizer)


@pytest.mark.parametrize(("name", "law"), [("reviews", grammar.reviews()), ("reviews-positive", grammar.positive())])
def test_reviews_models_have_learnt_their_grammar(name: str, law: grammar.Grammar) -> None:
    texts = grammar.sample(law, 300, seed=77)
    excess = torch.tensor([grammar.log_probability(law, text) for text in texts]) - log_prob(name, texts)
    assert float(excess.mean()) < 0.5  # KL(grammar ‖ model) in nats per review, against an entropy of 21


def test_reviews_answers_a_request() -> None:
    tokenizer = load("reviews")[1]
    request = [{"role": "user", "content": "how was the villain ?"}]
    ids = tokenizer.apply_chat_template(request, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == f"{END}user:\nhow was the villain ?\nassistant:\n"
    asked = ["the villain was great and the plot was great .", "overall the villain felt dull . i nearly left early ."]
    other = [text.replace("villain", "music") for text in asked]
    assert bool((log_prob("reviews", asked, ids) > log_prob("reviews", other, ids) + 3).all())
    assert bool((log_prob("reviews", asked) < log_prob("reviews", other)).all())


def test_adapter_loads_on_its_base() -> None:
    peft = pytest.importorskip("peft")
    config = json.loads((path("docs-lora") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "klkit:docs"
    base = AutoModelForCausalLM.from_pretrained(path("docs"))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = base(ids).logits
        model = peft.PeftModel.from_pretrained(base, str(path("docs-lora"))).eval()
        after = model(ids).logits
        assert not torch.allclose(before, after, atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, before)
    adapter = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert adapter == CATALOGUE["docs-lora"].parameters


@pytest.mark.parametrize(("name", "bits"), [("docs-int8", 8), ("docs-int4", 4)])
def test_rounded_weights_lie_on_their_grid(name: str, bits: int) -> None:
    base, model = dict(load("docs")[0].named_parameters()), load(name)[0]
    for key, weight in model.named_parameters():
        if weight.dim() == 2 and ".h." in key:
            assert torch.equal(weight, rounded(base[key].detach(), bits, dim=1))
            assert max(len(column.unique()) for column in weight.T[:4]) <= 2**bits - 1
        else:
            assert torch.equal(weight, base[key])


def test_packaged_prompts_are_short_and_different() -> None:
    for file in sorted((path("docs").parents[1] / "prompts").glob("*.jsonl")):
        prompts = read_prompts(f"klkit:{Path(file).stem}")
        assert len(prompts) == 64 == len(set(prompts.contents))
        assert all(len(str(text).split()) <= 8 for text in prompts.contents)


def test_packaged_prompts_of_the_grammar_come_from_the_build(tmp_path: Path) -> None:
    write_prompts(tmp_path / "new" / "prompts")
    packaged = path("docs").parents[1] / "prompts" / "reviews.jsonl"
    assert (tmp_path / "new" / "prompts" / "reviews.jsonl").read_bytes() == packaged.read_bytes()
