"""A byte-level BPE tokenizer trained on a corpus, in the form that hub models ship."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END = "<|end|>"
"""The one special token: it starts every context and ends every response."""


def train(texts: Iterable[str], size: int, *, window: int, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Learn at most ``size`` tokens from ``texts``: 256 bytes, the end token (id 0) and merges.

    Every byte is a token, so any text can be read; encoding puts the end token in front, as the
    start of a context. Texts beyond ``window`` tokens draw a warning from the tokenizer.

    Raises:
        ValueError: ``size`` leaves no room for the bytes and the end token.

    Example:
        >>> tokenizer = train(["to be or not to be"] * 9, 260, window=64)
        >>> tokenizer.decode(tokenizer("to be").input_ids)
        '<|end|>to be'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if size < 257:
        raise ValueError(f"expected room for 256 bytes and the end token, got size={size}; pass at least 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return finished(tokenizer, window, chat_template=chat_template)


def finished(tokenizer: Tokenizer, window: int, **options: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer as a hub model's, which puts the end token in front and has it for every special role."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=window,
        clean_up_tokenization_spaces=False,
        **options,
    )
