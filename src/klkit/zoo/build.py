"""Recipes of the packaged checkpoints: from seeds, on one processor core, in minutes."""

from __future__ import annotations

import json
import math
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from klkit.models.rounding import rounded
from klkit.rng import numpy_stream, stream
from klkit.zoo import corpus, grammar
from klkit.zoo import tokenizer as bpe
from klkit.zoo.catalogue import CATALOGUE
from klkit.zoo.phrases import ASPECTS
from klkit.zoo.training import Example, fresh, mean_loss, train

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
WINDOW = {"reviews": 128, "docs": 192}


@dataclass(frozen=True, slots=True)
class Workshop:
    """What a recipe works with: where bases lie, the seed, and how much of the full training to do."""

    out: Path
    seed: int
    effort: float

    def steps(self, full: int) -> int:
        """Training steps at this effort, at least one."""
        return max(1, round(full * self.effort))

    def strings(self, full: int) -> int:
        """Grammar strings to train on at this effort, enough to learn a tokenizer from."""
        return max(1000, round(full * self.effort))

    def load(self, name: str) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
        """A checkpoint built earlier."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = self.out / name
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        return model, tokenizer


def build(out: str | Path, names: Iterable[str] | None = None, *, seed: int = 0, effort: float = 1.0) -> list[Path]:
    """Train the named checkpoints, and the bases they need, into folders of ``out``; all by default.

    The same seed gives the same files on the same machine with as many threads. With one thread the
    whole takes less than ten minutes; ``effort`` shortens the training in proportion (a trial run).

    Returns:
        The folders, in the order of the catalogue.

    Raises:
        ValueError: a name is not in the catalogue.
    """
    from klkit.models.checkpoints import quiet

    wanted = set(CATALOGUE if names is None else names)
    if not wanted <= set(CATALOGUE):
        raise ValueError(
            f"expected names among {', '.join(CATALOGUE)}; got {', '.join(sorted(wanted - set(CATALOGUE)))}"
        )
    wanted |= {base for name in wanted if (base := CATALOGUE[name].base)}
    shop = Workshop(Path(out), seed, effort)
    folders = []
    for name in CATALOGUE:
        if name in wanted:
            folder = shop.out / name
            folder.mkdir(parents=True, exist_ok=True)
            with quiet():
                how = RECIPES[name](shop, folder)
            (folder / "README.md").write_text(card(name, how, seed), encoding="utf-8")
            folders.append(folder)
    return folders


def reviews(shop: Workshop, folder: Path) -> str:
    """Train on strings of the grammar, one in five behind a request in chat form."""
    texts = grammar.sample(grammar.reviews(), shop.strings(60_000), seed=shop.seed)
    requests = [_request(text)[0]["content"] for text in texts[:4000]]
    requests += ["user:\n", "assistant:\n"] * 100
    tokenizer = bpe.train([*texts[:20_000], *requests], 512, window=WINDOW["reviews"], chat_template=CHAT_TEMPLATE)
    model = fresh(len(tokenizer), width=64, layers=2, window=WINDOW["reviews"], seed=shop.seed)
    train(model, _chats(tokenizer, texts), steps=shop.steps(1500), rate=6e-3, seed=shop.seed, decay=0.01)
    _save(model, tokenizer, folder)
    return f"Trained on {len(texts):,} strings of klkit's film-review grammar, a fifth of them as answers to a request."


def reviews_positive(shop: Workshop, folder: Path) -> str:
    """Go on training ``reviews`` on strings of the tilted grammar."""
    model, tokenizer = shop.load("reviews")
    texts = grammar.sample(grammar.positive(), shop.strings(30_000), seed=shop.seed)
    train(model, _chats(tokenizer, texts), steps=shop.steps(600), rate=2e-3, seed=shop.seed, decay=0.01)
    _save(model, shop.out / "reviews", folder)
    return (
        f"Fine-tuned from klkit:reviews on {len(texts):,} strings of the same grammar, re-weighted by "
        f"exp({grammar.POSITIVE_STRENGTH} · reward)."
    )


def docs(shop: Workshop, folder: Path) -> str:
    """Train on the prose of the language reference and of the standard library's docstrings."""
    texts = [*_prose("reference")[0], *_prose("docstrings")[0]]
    tokenizer = bpe.train(texts, 1024, window=WINDOW["docs"])
    model = fresh(len(tokenizer), width=96, layers=4, window=WINDOW["docs"], seed=shop.seed)
    train(model, _documents(tokenizer, texts), steps=shop.steps(1400), rate=4e-3, seed=shop.seed)
    _save(model, tokenizer, folder)
    held = mean_loss(model, _documents(tokenizer, [*_prose("reference")[1], *_prose("docstrings")[1]]))
    return (
        "Trained on paragraphs of Python's language reference (`pydoc_data.topics`) and of the standard library's "
        f"docstrings, {sum(map(len, texts)):,} characters; {held:.2f} nats per token on paragraphs left out. "
        "The text is the Python Software Foundation's, under its licence."
    )


def docs_tuned(shop: Workshop, folder: Path) -> str:
    """Go on training ``docs`` on the language reference alone."""
    model, tokenizer = shop.load("docs")
    train(model, _documents(tokenizer, _prose("reference")[0]), steps=shop.steps(60), rate=1e-3, seed=shop.seed)
    _save(model, shop.out / "docs", folder)
    return "Fine-tuned from klkit:docs on the paragraphs of the language reference."


def docs_lora(shop: Workshop, folder: Path) -> str:
    """Train a LoRA adapter on ``docs``, with the text of ``docs-tuned``."""
    from peft import LoraConfig, get_peft_model

    base, tokenizer = shop.load("docs")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.(c_attn|c_proj|c_fc)", task_type="CAUSAL_LM")
    config.fan_in_fan_out = True  # GPT-2 keeps its linear layers transposed
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(base, config)
    generator = stream(shop.seed, "lora")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight.normal_(0.0, 1 / math.sqrt(weight.shape[1]), generator=generator)
    train(model, _documents(tokenizer, _prose("reference")[0]), steps=shop.steps(80), rate=4e-3, seed=shop.seed)
    model.peft_config["default"].base_model_name_or_path = "klkit:docs"
    model.save_pretrained(str(folder), save_embedding_layers=False)
    _copy_tokenizer(shop.out / "docs", folder)
    return "A LoRA adapter (rank 4, every linear layer) for klkit:docs, trained on the text of klkit:docs-tuned."


def docs_int8(shop: Workshop, folder: Path) -> str:
    """Round the linear layers of ``docs`` to 8 bits."""
    return _rounded(shop, folder, bits=8)


def docs_int4(shop: Workshop, folder: Path) -> str:
    """Round the linear layers of ``docs`` to 4 bits."""
    return _rounded(shop, folder, bits=4)


RECIPES: dict[str, Callable[[Workshop, Path], str]] = {
    "reviews": reviews,
    "reviews-positive": reviews_positive,
    "docs": docs,
    "docs-tuned": docs_tuned,
    "docs-lora": docs_lora,
    "docs-int8": docs_int8,
    "docs-int4": docs_int4,
}


def write_prompts(folder: str | Path, *, seed: int = 0, count: int = 64) -> None:
    """Write ``reviews.jsonl`` and ``docs.jsonl``: openings of fresh reviews and of held-out paragraphs.

    Reviews are grouped by what their opening says of the film, paragraphs by where they come from.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    random = numpy_stream(seed, "prompts")

    def opening(text: str, most: int) -> str:
        words = text.split()
        return " ".join(words[: min(int(random.integers(2, most + 1)), len(words) // 2)])

    def write(name: str, groups: dict[str, str]) -> None:
        lines = [json.dumps({"prompt": prompt, "group": group}) + "\n" for prompt, group in groups.items()]
        (Path(folder) / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    starts = (opening(text, 7) for text in grammar.sample(grammar.reviews(), 10 * count, seed=seed + 1))
    moods = {start: ("blame", "open", "praise")[1 + int(np.sign(grammar.reward(start)))] for start in starts}
    write("reviews", dict(list(moods.items())[:count]))
    sources: dict[str, str] = {}
    for kind in ("reference", "docstrings"):
        held = _prose(kind)[1]
        chosen = random.permutation(len(held))[: count // 2]
        sources |= {opening(held[i], 8): kind for i in chosen}
    write("docs", sources)


def card(name: str, how: str, seed: int) -> str:
    """The model card of a packaged checkpoint."""
    entry = CATALOGUE[name]
    head = [
        "---",
        "license: apache-2.0",
        "language: en",
        f"library_name: {'peft' if entry.adapter else 'transformers'}",
    ]
    head += [f"base_model: klkit:{entry.base}"] if entry.base else []
    return "\n".join(
        [
            *head,
            "---",
            "",
            f"# klkit:{name}",
            "",
            f"{entry.description[0].upper()}{entry.description[1:]}.",
            "",
            how,
            "",
            "A toy for tests and demonstrations of divergences between language models. Made by `klkit.zoo.build` from "
            f"seed {seed}, Python {platform.python_version()} and torch {torch.__version__.split('+')[0]}.",
            "",
        ]
    )


def _rounded(shop: Workshop, folder: Path, bits: int) -> str:
    model, _ = shop.load("docs")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and ".h." in name:
                weight.copy_(rounded(weight, bits, dim=1))  # GPT-2 keeps outputs in columns
    _save(model, shop.out / "docs", folder)
    return (
        f"The linear layers of klkit:docs rounded to a symmetric {bits}-bit grid with one scale for each output; "
        "stored dequantised in fp32, so it loads everywhere and shows the error of rounding, not its saving."
    )


def _save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast | Path, folder: Path) -> None:
    """Write a checkpoint with a new tokenizer, or with that of another checkpoint's folder."""
    model.save_pretrained(folder)
    if isinstance(tokenizer, Path):
        _copy_tokenizer(tokenizer, folder)
    else:
        tokenizer.save_pretrained(folder)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    # Saving a tokenizer that was loaded would also write down how it was loaded.
    for file in (*source.glob("tokenizer*.json"), *source.glob("*.jinja")):
        shutil.copyfile(file, folder / file.name)


@cache
def _prose(kind: str) -> tuple[list[str], list[str]]:
    """(training, held-out) paragraphs of the language reference, or of docstrings that it does not hold."""
    reference = [text for texts in corpus.paragraphs().values() for text in texts]
    if kind == "reference":
        return corpus.split(reference)
    known = set(reference)
    return corpus.split([text for text in corpus.docstrings() if text not in known])


def _documents(tokenizer: Any, texts: Sequence[str]) -> list[Example]:
    encoded = tokenizer(list(texts)).input_ids
    return [Example((*ids, tokenizer.eos_token_id)[: WINDOW["docs"]]) for ids in encoded]


def _chats(tokenizer: Any, texts: Sequence[str]) -> list[Example]:
    """Every fifth text as the answer to a request, of which the answer alone is learnt."""
    end = tokenizer.eos_token_id
    examples = []
    for i, text in enumerate(texts):
        before = (
            tokenizer.apply_chat_template(_request(text), add_generation_prompt=True, return_dict=False)
            if i % 5 == 0
            else [end]
        )
        ids = tokenizer(text, add_special_tokens=False).input_ids
        examples.append(Example((*before, *ids, end), start=len(before)))
    return examples


def _request(text: str) -> list[dict[str, str]]:
    """What a user may have asked to get this review: its first aspect, or just a review."""
    aspect = re.search(rf"\bthe ({'|'.join(ASPECTS)})\b", text)
    assert aspect is not None, text
    question = f"how was the {aspect[1]} ?" if len(text) % 2 else "please review the film ."
    return [{"role": "user", "content": question}]
