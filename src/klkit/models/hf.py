"""Any causal language model of transformers as a :class:`klkit.models.base.LanguageModel`.

Given strings are read right-padded, all at once. Strings being drawn are read left-padded, through
the network's own cache, with positions that count from each row's first token. That the cache agrees
with teacher forcing on a ragged batch is verified when a model is wrapped; where it does not, every
token is predicted from a fresh reading of the whole string instead: slower, and right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from klkit.divergences.linear import Head
from klkit.models import tokenization
from klkit.models.base import Vocabulary
from klkit.models.digest import weights_digest
from klkit.models.split import SplitNetwork, close
from klkit.numerics import log_softmax
from klkit.sequences import Content, Sequences

WINDOW_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
PROBE_LENGTH = 7
PASS = 256
"""Padded tokens that are worth another pass through the network."""


@dataclass(slots=True)
class DecodingState:
    """What a batch of unfinished strings has read: a cache, or the tokens themselves.

    Attributes:
        length: tokens each row has read, ``(b,)``.
        width: columns of the left-padded block that the cache covers.
        cache: the network's own cache, or None where it is not used.
        tokens: all tokens read, right-padded, ``(b, l)``, only where they are read again at every step.
    """

    length: Tensor
    width: int
    cache: Any
    tokens: Tensor | None


class Released:
    """Stands where a network was that has been let go of, and answers everything with an error."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, _: str) -> Any:
        raise ValueError(f"expected a model that is loaded, got {self._name}, which was released; load it again")

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Refuse."""
        return self.network


def by_length(lengths: Int[Tensor, " n"]) -> list[Int[Tensor, " _k"]]:
    """Strings in as many groups of like lengths as reading them without much padding pays for, the longest first.

    A pass costs the padded tokens it reads, and as much again as ``PASS`` tokens.

    Example:
        >>> by_length(torch.tensor([900, 10, 880, 12]))
        [tensor([0, 2]), tensor([3, 1])]
    """
    order = lengths.argsort(descending=True, stable=True)
    longest = lengths[order].tolist()
    groups, most = [len(order)], longest[0] * len(order) + PASS
    for count in (2, 3, 4, 6, 8):
        sizes = [len(part) for part in torch.tensor_split(order, min(count, len(order)))]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        cost = sum(longest[start] * size + PASS for start, size in zip(starts, sizes, strict=True))
        if cost < most:
            groups, most = sizes, cost
    return list(torch.split(order, groups))


class HuggingFaceModel:
    """A causal language model of transformers, with its tokenizer.

    Args:
        model: the network; it is put in evaluation mode.
        tokenizer: its tokenizer.
        name: what reports call it; by default the name it was loaded under.
        ends: ids of the tokens that end a response; by default those that generation stops at.
        activate: called before every pass, for models that share weights (adapters).
        weights: gives the weights that are this model's, for one that shares its network; by default all of it.

    Attributes:
        vocabulary: token strings by id, and end tokens.
        window: longest context plus completion, or None.
        width: values in a trunk vector.
        dtype: precision of weights and arithmetic.
        notes: what a reader of the numbers should know about how this model is run.
        inert: whether it has an adapter that changes nothing.

    Raises:
        ValueError: no end token is declared anywhere, an end token is out of range, the tokenizer is
            empty, or the network returns NaN or looks at later tokens on a short probe.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        ends: Sequence[int] | None = None,
        activate: Callable[[], None] | None = None,
        weights: Callable[[], Mapping[str, Any]] | None = None,
    ):
        self.model = model
        self._weights = weights or model.state_dict
        self.tokenizer = tokenizer
        self.name = name or str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self.dtype: torch.dtype = model.dtype
        self.notes: tuple[str, ...] = ()
        self.inert = False
        self.window = window_of(model.config.get_text_config(decoder=True))
        probe = self._probe()
        self._network = SplitNetwork(model, probe, self.name, activate)
        self.width = self._network.width
        size = self._network.size
        tokens = tokenization.token_strings(tokenizer, size)
        self.vocabulary = Vocabulary(tokens, tokenization.end_tokens(model, tokenizer, size, ends))
        if self._network.whole:
            self._note(f"the logits of {self.name} are not a known function of its output head's input; kept whole")
        self._cached = True
        self._cached = self._cache_agrees(probe[0])
        if not self._cached:
            self._note(f"the cache of {self.name} fails on ragged batches; contexts are read anew at every token")

    # Prompts

    def context(self, prompt: Content | None) -> Int[Tensor, " c"]:
        """Token ids read before the response: text with its usual opening tokens, or a filled-in template.

        Raises:
            ValueError: the context does not fit the window, ids are out of range, or a conversation
                is given to a tokenizer without a chat template.
        """
        ids = tokenization.context_ids(self.tokenizer, prompt, self.vocabulary)
        if self.window is not None and len(ids) > self.window:
            raise ValueError(
                f"expected a prompt of at most {self.window} tokens, the window of {self.name}, got {len(ids)} tokens; "
                f"shorten the prompt or leave it out"
            )
        return ids

    @cached_property
    def digest(self) -> str:
        """What tells these weights from others: a hash of all their values (:mod:`klkit.models.digest`)."""
        return weights_digest(self.weights())

    def weights(self) -> Mapping[str, Any]:
        """The weights of this model by name, an adapter's included, as they lie in memory."""
        return self._weights()

    def release(self) -> None:
        """Let go of the network, whoever still holds this model: from now on it refuses to work."""
        gone: Any = Released(self.name)
        self.model = self._network = self._weights = gone

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token as readable text; bytes that are no complete character are escaped."""
        return [self._readable(int(i)) for i in tokens]

    @cached_property
    def _readable(self) -> Callable[[int], str]:
        return tokenization.reader(self.tokenizer, self.vocabulary)

    # Given strings

    def encode(self, x: Sequences) -> Float[Tensor, "m d"]:
        """Trunk vectors of every decision of the strings ``x``, right-padded, strings of like lengths together.

        Raises:
            ValueError: a string does not fit the window.
        """
        if not x.decisions:
            return torch.zeros(0, self.width, dtype=self.dtype, device=self._network.device)
        self._check_window(int(x.stop.max()))
        row, column = x.predictors()
        # The last token of a string predicts nothing that is scored, so it is not read.
        width = x.stop - 1
        passes = []
        for strings in by_length(width):
            hidden = self._read(x.tokens[strings, : int(width[strings].max())])
            local = torch.full((len(x),), -1).index_put_((strings,), torch.arange(len(strings)))[row]
            with torch.inference_mode():
                here = local[local >= 0].to(hidden.device), column[local >= 0].to(hidden.device)
                passes.append((local >= 0, hidden[here]))
        if len(passes) == 1:
            return passes[0][1]
        with torch.inference_mode():
            found = passes[0][1].new_empty(len(row), passes[0][1].shape[1])
            for inside, hidden in passes:
                found[inside.to(hidden.device)] = hidden
        return found

    def trunk(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """What enters the head at every column of right-padded ``tokens``; differentiable unless gradients are off."""
        # Padding on the right needs no mask, since the network is causal; a mask could even leave
        # padded rows without anything to attend to, and their NaN would spread.
        return self._network.trunk(tokens, torch.ones_like(tokens))[0]

    def readout(self, h: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        """Log-probabilities of the next token, at least in fp32.

        Raises:
            ValueError: a logit is NaN.
        """
        with torch.no_grad():
            return log_softmax(self._network.logits(h))

    def head(self) -> Head | None:
        """The output head where it is a plain linear layer, scale and cap included; None behind an adapter."""
        return self._network.head()

    def embedding(self) -> Float[Tensor, "v e"] | None:
        """Input embeddings in single precision, one row a token; None if the model has none to show."""
        module: Any = self.model.get_input_embeddings()
        weight, size = getattr(module, "weight", None), self.vocabulary.size
        if isinstance(weight, Tensor) and weight.is_meta:  # it lies on disk, and comes when rows are asked for
            with torch.no_grad():
                weight = module(torch.arange(len(weight), device=self._network.device))
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2 or len(weight) < size:
            return None
        return weight.detach()[:size].float()

    # Strings being drawn

    def begin(self, contexts: Sequence[Int[Tensor, " _c"]]) -> tuple[DecodingState, Float[Tensor, "b d"]]:
        """Read contexts of any lengths in one pass.

        Raises:
            ValueError: there is no context, one is empty, or one does not fit the window.
        """
        length = torch.tensor([len(c) for c in contexts], dtype=torch.long)
        if not len(length) or not int(length.min()):
            raise ValueError(
                f"expected at least one context, each of at least one token, got lengths {length.tolist()}; "
                f"use model.context(None) for the empty prompt"
            )
        width = int(length.max())
        self._check_window(width)
        tokens = torch.zeros(len(contexts), width, dtype=torch.long)
        for i, context in enumerate(contexts):
            tokens[i, slice(width - len(context), width) if self._cached else slice(len(context))] = context
        if self._cached:
            state = DecodingState(length, width, None, None)
            return state, self._step(state, tokens)
        return DecodingState(length, width, None, tokens), self._last(tokens, length)

    def advance(self, state: DecodingState, tokens: Int[Tensor, " b"]) -> tuple[DecodingState, Float[Tensor, "b d"]]:
        """Append one token to every row; ``state`` must not be used again.

        Raises:
            ValueError: a row would outgrow the window.
        """
        tokens, length = tokens.cpu(), state.length + 1
        self._check_window(int(length.max()))
        if state.tokens is None:
            state = DecodingState(length, state.width + 1, state.cache, None)
            return state, self._step(state, tokens[:, None])
        longer = torch.nn.functional.pad(state.tokens, (0, max(0, int(length.max()) - state.tokens.shape[1])))
        longer[torch.arange(len(length)), state.length] = tokens
        return DecodingState(length, longer.shape[1], None, longer), self._last(longer, length)

    def select(self, state: DecodingState, rows: Int[Tensor, " k"]) -> DecodingState:
        """The state of the given rows only; ``state`` must not be used again."""
        rows = rows.cpu()
        if state.tokens is not None:
            return DecodingState(state.length[rows], state.width, None, state.tokens[rows])
        with torch.inference_mode():
            # Defined by every kind of cache layer, recurrent ones included, and an index_select in all of them.
            state.cache.reorder_cache(rows.to(self._network.device))
        return DecodingState(state.length[rows], state.width, state.cache, None)

    def _step(self, state: DecodingState, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Read left-padded ``tokens`` after what the cache holds."""
        mask = (torch.arange(state.width) >= state.width - state.length[:, None]).long()
        with torch.inference_mode():
            hidden, state.cache = self._network.trunk(tokens, mask, cache=state.cache, use_cache=True)
            return hidden[:, -1]

    def _last(self, tokens: Int[Tensor, "b l"], length: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Read right-padded ``tokens`` from the beginning; the trunk vector of each row's last one."""
        hidden = self._read(tokens[:, : int(length.max())])
        with torch.inference_mode():
            return hidden[torch.arange(len(length), device=hidden.device), (length - 1).to(hidden.device)]

    def _read(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        with torch.inference_mode():
            return self.trunk(tokens)

    # Checks

    def _cache_agrees(self, probe: Int[Tensor, " l"]) -> bool:
        """Whether ragged decoding through the cache, with rows changing places, is teacher forcing."""
        first, second = probe, probe[2:]
        x = Sequences.pack([first[:3], second[:1]], [first[3:], second[1:]])
        wanted = torch.split(self.encode(x), x.lengths.tolist())
        try:
            state, h = self.begin([first[:3], second[:1]])
            seen = [h]
            for t in range(len(first) - 4):
                if t == 1:
                    state = self.select(state, torch.tensor([1, 0]))
                turned = t >= 1
                pair = torch.stack((first[3 + t], second[1 + t]))
                state, h = self.advance(state, pair.flip(0) if turned else pair)
                seen.append(h.flip(0) if turned else h)
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, NotImplementedError):
            return False
        return all(close(torch.stack([h[i] for h in seen]), wanted[i][: len(seen)], 512) for i in range(2))

    def _probe(self) -> Int[Tensor, "1 l"]:
        """A short row of ordinary token ids, spread over the vocabulary."""
        special = set(self.tokenizer.all_special_ids)
        rows = min(len(self.tokenizer), cast(Tensor, self.model.get_input_embeddings().weight).shape[0])
        plain = [i for i in range(rows) if i not in special] or list(range(rows))
        length = min(PROBE_LENGTH, self.window or PROBE_LENGTH)
        return torch.tensor([[plain[(i * 7919 + 13) % len(plain)] for i in range(length)]])

    def _check_window(self, length: int) -> None:
        if self.window is not None and length > self.window:
            raise ValueError(
                f"expected at most {self.window} tokens, prompt and response together, the window of {self.name}, "
                f"got {length}; shorten the prompts or lower max_tokens"
            )

    def _note(self, note: str) -> None:
        self.notes = (*self.notes, note)


def window_of(config: Any) -> int | None:
    """The longest context plus completion that a network of this configuration can read, or None."""
    values = (getattr(config, key, None) for key in WINDOW_KEYS)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
