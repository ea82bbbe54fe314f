"""Between text and token ids: vocabularies, end tokens, contexts and readable pieces of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from klkit.models.base import Vocabulary
from klkit.sequences import Content


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that a tokenizer declares special: roles, padding, ends; those that were added to it as such among them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def token_strings(tokenizer: Any, size: int) -> tuple[str | None, ...]:
    """The string of each of ``size`` ids; None where the tokenizer defines none (rows of padding).

    Raises:
        ValueError: the tokenizer has special tokens only, as one made up for a folder without its files.
    """
    vocabulary = tokenizer.get_vocab()
    if not set(vocabulary) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(
            f"expected a tokenizer with ordinary tokens, got {type(tokenizer).__name__} with {len(vocabulary)} special "
            f"ones only; its files are missing from the checkpoint: name them with tokenizer=FOLDER"
        )
    strings: list[str | None] = [None] * size
    for token, i in sorted(vocabulary.items()):
        if i < size:
            strings[i] = token
    return tuple(strings)


def end_tokens(model: Any, tokenizer: Any, size: int, ends: Sequence[int] | None = None) -> tuple[int, ...]:
    """Ids that generation stops at: as given, else declared by generation settings, configuration or tokenizer.

    Raises:
        ValueError: nothing declares an end token, or one lies outside the vocabulary.
    """
    sources = (
        ends,
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(model.config.get_text_config(decoder=True), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    declared = next((s for s in sources if s is not None and s != []), None)
    if declared is None:
        raise ValueError(
            "expected a model that declares an end token, got none in its generation settings, its configuration or "
            "its tokenizer; name the ids that end a response: 'MODEL,ends=ID' on the command line, "
            "load(spec, ends=[ID]) in Python"
        )
    found = tuple(sorted({declared} if isinstance(declared, int) else {int(i) for i in declared}))
    if not found or found[0] < 0 or found[-1] >= size:
        raise ValueError(
            f"expected end tokens between 0 and {size - 1}, got {list(found)}; "
            f"name them: 'MODEL,ends=ID' on the command line, load(spec, ends=[ID]) in Python"
        )
    return found


def context_ids(tokenizer: Any, prompt: Content | None, vocabulary: Vocabulary) -> Int[Tensor, " c"]:
    """Token ids a model reads before it responds to text, a conversation, given ids, or nothing.

    Raises:
        ValueError: ids out of range, or a conversation without a chat template.
    """
    if isinstance(prompt, Tensor):
        ids = prompt.reshape(-1).long().cpu()
    elif prompt is None or prompt == "":
        ids = torch.empty(0, dtype=torch.long)
    elif isinstance(prompt, str):
        ids = torch.tensor(_without_end(tokenizer, prompt), dtype=torch.long)
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "expected a tokenizer with a chat template for a conversation, got one without; "
                "pass plain text, or load the chat version of the model"
            )
        filled = tokenizer.apply_chat_template(
            [dict(message) for message in prompt], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        ids = torch.tensor(filled["input_ids"], dtype=torch.long)
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary.size):
        raise ValueError(
            f"expected token ids between 0 and {vocabulary.size - 1}, got {int(ids.min())} to {int(ids.max())}; "
            f"these ids belong to another tokenizer"
        )
    if len(ids):
        return ids
    bos = tokenizer.bos_token_id
    return torch.tensor([vocabulary.ends[0] if bos is None else bos], dtype=torch.long)


def _without_end(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a text with what the tokenizer puts before it, but not what it puts behind it."""
    full: list[int] = tokenizer(prompt)["input_ids"]
    plain: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for behind in range(len(full) - len(plain) + 1):
        stop = len(full) - behind
        if full[stop - len(plain) : stop] == plain:
            return full[:stop]
    return full


def reader(tokenizer: Any, vocabulary: Vocabulary) -> Callable[[int], str]:
    """A function from a token id to text that a person can read.

    Byte-level tokens are decoded byte by byte, and bytes that are no complete character are
    escaped; the word mark of sentence-piece tokens becomes a space.
    """
    byte_level = tokenizer.convert_tokens_to_string(["Ġ"]) == " "
    special = set(tokenizer.get_added_vocab().values())

    def read(i: int) -> str:
        token = vocabulary.tokens[i]
        if token is None:
            return f"[{i}]"
        if i in special:
            return token
        if byte_level and all(c in BYTE_OF for c in token):
            return bytes(BYTE_OF[c] for c in token).decode("utf-8", errors="backslashreplace")
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)]).decode("utf-8", errors="backslashreplace")
        return token.replace("▁", " ")

    return read


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level vocabularies (Radford et al., 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


BYTE_OF = _byte_alphabet()
