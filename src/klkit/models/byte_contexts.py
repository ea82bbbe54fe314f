"""Contexts of byte-level models: where the prompt's bytes end, and which tokens stood for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from klkit.models.base import LanguageModel
from klkit.models.hypotheses import END
from klkit.models.token_bytes import drops_first_space, tokenizer_of
from klkit.sequences import Content

Tokens = tuple[int, ...]


class Contexts:
    """Prompts as bytes between two end symbols, and the tokens that the token-level model reads for each.

    Args:
        model: the token-level model.

    Example:
        >>> from klkit.models.automaton import coin
        >>> contexts = Contexts(coin(end=0.5))
        >>> contexts.ids("aa").tolist(), contexts.split([256, 97, 97, 256, 97])
        ([256, 97, 97, 256], (b'aa', b'a'))
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._known: dict[bytes, Tokens] = {}

    def ids(self, prompt: Content | None) -> Int[Tensor, " c"]:
        """What a byte-level model reads for a prompt; see :meth:`klkit.models.byte_level.ByteLevel.context`."""
        if isinstance(prompt, Tensor):
            symbols = prompt.tolist() or [END]
            symbols = symbols if symbols[0] == END else [END, *symbols, END]
            self.split(symbols)
            return torch.tensor(symbols, dtype=torch.long)
        if prompt is None or prompt == "":
            return torch.tensor([END])
        text = prompt if isinstance(prompt, str) else self._filled(prompt)
        spelt, tokens = text.encode(), tuple(self.model.context(prompt).tolist())
        if self._known.setdefault(spelt, tokens) != tokens:
            raise ValueError(
                f"expected prompts that differ in their texts, got a text and a conversation that both read "
                f"{text[:60]!r} but are other tokens; give only one of them"
            )
        return torch.tensor([END, *spelt, END])

    def split(self, symbols: Sequence[int]) -> tuple[bytes, bytes]:
        """The bytes of the prompt and those of the response in a context.

        Raises:
            ValueError: it does not begin with the end symbol, has more than two of them, or ids that are no bytes.
        """
        marks = [i for i, symbol in enumerate(symbols) if symbol == END]
        if not marks or marks[0] != 0 or len(marks) > 2 or not all(0 <= symbol <= END for symbol in symbols):
            raise ValueError(
                f"expected a context of bytes that begins with the end symbol {END}, and another one after the prompt "
                f"if there is one, got {list(symbols[:8])}…; contexts come from the byte-level model's context(prompt)"
            )
        return bytes(symbols[1 : marks[-1]]), bytes(symbols[marks[-1] + 1 :])

    def tokens(self, prompt: bytes) -> Tokens:
        """What the token-level model reads for a prompt: as it was told, or as its tokenizer reads the text.

        Raises:
            ValueError: bytes that are no text, or no prompt where the tokenizer needs one.
        """
        if not prompt:
            if drops_first_space(self.model):
                raise ValueError(
                    f"expected a prompt for {self.model.name}, got an empty one: its tokenizer takes the first space "
                    f"of a text away, so the bytes of a first token are not known; give prompts"
                )
            return tuple(self.model.context(None).tolist())
        if prompt not in self._known:
            try:
                text = prompt.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"expected a prompt in UTF-8, got bytes that are none: {error}; give the prompt as text"
                ) from error
            self._known[prompt] = tuple(self.model.context(text).tolist())
        return self._known[prompt]

    def _filled(self, messages: Content) -> str:
        """The text of a conversation in the model's template."""
        tokenizer = tokenizer_of(self.model)
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"expected a model with a chat template for a conversation, got {self.model.name} without; pass plain "
                f"text, or load the chat version of the model"
            )
        filled = [dict(message) for message in cast(Any, messages)]
        return str(tokenizer.apply_chat_template(filled, add_generation_prompt=True, tokenize=False))
