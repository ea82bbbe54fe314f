"""Prompts with responses: read from the files people have, and laid out as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from klkit.sequences import Content, Message, Sequences
from klkit.train.records import SUFFIXES, records, resolve

if TYPE_CHECKING:
    from klkit.models.hf import HuggingFaceModel

MESSAGES, TEXT = "messages", "text"


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and how it was answered.

    Attributes:
        prompt: text, a conversation, token ids, or None for the empty prompt.
        response: the answer, without an end token; empty where there is none.
    """

    prompt: Content | None
    response: str

    @property
    def empty(self) -> bool:
        """Whether there is no response."""
        return not self.response.strip()


def read_examples(source: str | Path, *, prompt: str = "prompt", response: str = "response") -> list[Example]:
    """Read examples, one a record of a jsonl, json, csv, tsv or parquet file, or one a line of a txt file.

    A record has the field ``response``, and before it ``prompt`` (text or a conversation; absent or empty for none);
    or ``messages``, a conversation whose last turn is the assistant's and is the response; or ``text``, a document
    without a prompt. A record with a prompt alone is an example without a response. A line of a txt file is a
    document.

    Args:
        source: a file, or ``klkit:NAME`` for packaged prompts.
        prompt: field that holds the prompts.
        response: field that holds the responses.

    Raises:
        ValueError: a broken line (its number is named), a record with none of the fields, no example at all.
        FileNotFoundError: no such file.
    """
    path = resolve(str(source))
    plain = path.suffix.lower() not in SUFFIXES[1:]
    found = [
        Example(None, record[TEXT]) if plain else _example(record, prompt, response, path, number)
        for number, record in records(path, TEXT)
    ]
    if not found:
        raise ValueError(f"expected at least one example in {path}, got none; the file is empty")
    return found


def without_empty(examples: Sequence[Example]) -> tuple[list[Example], int]:
    """The examples with a response, and how many have none.

    Example:
        >>> without_empty([Example("a", "b"), Example("c", " ")])
        ([Example(prompt='a', response='b')], 1)
    """
    kept = [example for example in examples if not example.empty]
    return kept, len(examples) - len(kept)


def encode_examples(
    model: HuggingFaceModel, examples: Sequence[Example], max_tokens: int, *, window: int | None = None
) -> Sequences:
    """Each example as the context that ``model`` reads and a completion: the response, then the end token.

    A response longer than ``max_tokens``, the end token included, is cut there and is not ``finished``. Text after a
    text prompt is tokenised together with it where that leaves the prompt's own tokens as they are.

    Args:
        max_tokens: longest completion.
        window: longest context and completion together; by default the model's.

    Raises:
        ValueError: a response is empty, or an example outgrows the window.
    """
    empty = [i for i, example in enumerate(examples) if example.empty]
    if empty:
        raise ValueError(
            f"expected a response in every example, got {len(empty)} without one, the first of them example "
            f"{empty[0] + 1}; mend or remove {'it' if len(empty) == 1 else 'them'}, leave them out with --skip-empty, "
            f"or have the teacher answer with --text teacher"
        )
    contexts = [model.context(example.prompt) for example in examples]
    end = torch.tensor([end_token(model)])
    completions, finished = [], []
    for example, context in zip(examples, contexts, strict=True):
        whole = torch.cat([_response_ids(model, example, context), end])
        completions.append(whole[:max_tokens])
        finished.append(len(whole) <= max_tokens)
    x = Sequences.pack(contexts, completions, finished=finished)
    require_room(x, model.window if window is None else window, model.name)
    return x


def require_room(x: Sequences, window: int | None, name: str) -> None:
    """Refuse strings that a model cannot read.

    Raises:
        ValueError: one is longer than the window.
    """
    if window is None or not len(x) or int(x.stop.max()) <= window:
        return
    wide = (x.stop > window).nonzero()[:, 0].tolist()
    longest = max(wide, key=lambda i: int(x.stop[i]))
    start, length = int(x.start[longest]), int(x.lengths[longest])
    room = window - int(x.start[wide].max())
    todo = f"lower --max-tokens to {room}" if room > 0 else "shorten the prompts"
    raise ValueError(
        f"expected examples of at most {window} tokens, prompt and response together, which is what {name} reads, got "
        f"{len(wide)} that are longer: example {longest + 1} has a prompt of {start} and a response of {length} "
        f"tokens; {todo}, or leave long examples out"
    )


def end_token(model: HuggingFaceModel) -> int:
    """The token that ends a response in training: the tokenizer's, if the model stops at it, else the first it does."""
    ends = model.vocabulary.ends
    own = getattr(model.tokenizer, "eos_token_id", None)
    return int(own) if own in ends else ends[0]


def _response_ids(model: HuggingFaceModel, example: Example, context: Int[Tensor, " c"]) -> Int[Tensor, " t"]:
    """Ids of the response as they follow the prompt."""
    tokenise: Any = model.tokenizer
    if isinstance(example.prompt, str) and example.prompt:
        together = tokenise(example.prompt + example.response, add_special_tokens=False)["input_ids"]
        own = tokenise(example.prompt, add_special_tokens=False)["input_ids"]
        # What the tokenizer itself puts before a text is in the context and not here.
        if together[: len(own)] == own and context.tolist()[-len(own) :] == own and len(together) > len(own):
            return torch.tensor(together[len(own) :], dtype=torch.long)
    return torch.tensor(tokenise(example.response, add_special_tokens=False)["input_ids"], dtype=torch.long)


def _example(record: Any, prompt: str, response: str, path: Path, number: int) -> Example:
    """An example from a record of any of the known kinds."""
    fields: Mapping[str, Any] = record if isinstance(record, dict) else {}
    conversation = fields.get(MESSAGES)
    if response not in fields and prompt not in fields and _is_conversation(conversation):
        turns = cast(Sequence[Message], conversation)
        if turns[-1]["role"] != "assistant" or not isinstance(turns[-1]["content"], str):
            raise ValueError(
                f"expected a conversation that ends with the assistant's text in line {number} of {path}, got one "
                f"that ends with {turns[-1]['role']!r}; add the answer, or leave the record out"
            )
        return Example(turns[:-1] or None, str(turns[-1]["content"]))
    if response not in fields and prompt not in fields and isinstance(fields.get(TEXT), str):
        return Example(None, fields[TEXT])
    asked, answer = fields.get(prompt), fields.get(response, "")
    fits = asked is None or isinstance(asked, str) or _is_conversation(asked)
    if (response in fields or prompt in fields) and fits and (answer is None or isinstance(answer, str)):
        return Example(asked or None, answer or "")
    named = ", ".join(map(repr, fields)) or str(record)[:60]
    raise ValueError(
        f"expected the fields {prompt!r} and {response!r}, a conversation in {MESSAGES!r}, or {TEXT!r} in line "
        f"{number} of {path}, got {named}; name the right ones with --prompt-column and --response-column"
    )


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and "role" in turn and "content" in turn for turn in value)
    )
