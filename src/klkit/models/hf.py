"""Any causal language model of transformers, split into a trunk and a read-out.

The trunk vector of a decision is whatever enters the output head, caught on its way there during a
real forward pass; the head then runs on a few rows at a time. Architectures treat logits in their own
ways after the head (a cap, a scale), so the split is *verified* when a model is wrapped: if the
read-out of the caught vectors is not what the model itself returns, the logits become the trunk
vectors. The key-value cache is verified in the same way, and replaced by recomputation if it fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from klkit.models import tokenization
from klkit.models.base import Vocabulary
from klkit.numerics import log_softmax
from klkit.sequences import Content, Sequences

# Factors and divisors that architectures apply to the output of the head, by configuration key.
LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
LOGIT_DIVISORS = ("logits_scaling",)
WINDOW_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
PROBE_LENGTH = 7


@dataclass(slots=True)
class DecodingState:
    """What a batch of unfinished strings has read: a cache, or the tokens themselves.

    Attributes:
        length: tokens each row has read, ``(b,)``.
        width: columns of the left-padded block that the cache covers.
        cache: the model's own cache, or None where it is recomputed.
        tokens: all tokens read, right-padded, ``(b, l)``, only where they are read again at every step.
    """

    length: Tensor
    width: int
    cache: Any
    tokens: Tensor | None


class HuggingFaceModel:
    """A causal language model of transformers as a :class:`klkit.models.base.LanguageModel`.

    Args:
        model: the network; it is put in evaluation mode.
        tokenizer: its tokenizer.
        name: what reports call it; by default the name it was loaded under.
        ends: ids of the tokens that end a response; by default those that generation stops at.
        activate: called before every pass, for models that share weights (adapters).

    Attributes:
        notes: what a reader of the numbers should know about how this model is run.

    Raises:
        ValueError: no end token is declared anywhere, an end token is out of range, or the
            model returns NaN on a short probe.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        ends: Sequence[int] | None = None,
        activate: Callable[[], None] | None = None,
    ):
        self.model = cast(Any, model)
        self.model.eval()
        self.tokenizer = tokenizer
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.dtype: torch.dtype = model.dtype
        self.notes: tuple[str, ...] = ()
        self._activate = activate
        accepts = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepts
        self._cache_name = "past_key_values" if "past_key_values" in accepts else "cache_params"
        config = model.config.get_text_config(decoder=True)
        self.window = _first_int(config, WINDOW_KEYS)
        self._factor, self._cap = _after_head(config)
        self._head: nn.Module | None = self.model.get_output_embeddings()
        self._cached = True
        size, self.width = self._verify_split()
        tokens = tokenization.token_strings(tokenizer, size)
        self.vocabulary = Vocabulary(tokens, tokenization.end_tokens(model, tokenizer, size, ends))
        self._verify_cache()

    # ------------------------------------------------------------------------------------ prompts

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

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token as readable text; bytes that are no complete character are escaped."""
        return [self._readable(int(i)) for i in tokens]

    @cached_property
    def _readable(self) -> Callable[[int], str]:
        return tokenization.reader(self.tokenizer, self.vocabulary)

    # ---------------------------------------------------------------------------- teacher forcing

    def encode(self, x: Sequences) -> Float[Tensor, "m d"]:
        """Trunk vectors of every decision of the strings ``x``, from one right-padded pass.

        Raises:
            ValueError: a string does not fit the window.
        """
        if not x.decisions:
            return torch.zeros(0, self.width, dtype=self.dtype)
        self._check_window(int(x.stop.max()))
        # The last token of a string predicts nothing that is scored, so it is not read. Padding on the
        # right needs no mask, since the model is causal, and a mask would leave rows with nothing to see.
        tokens = x.tokens[:, : int(x.stop.max()) - 1]
        with torch.inference_mode():
            hidden, _ = self._trunk(tokens, torch.ones_like(tokens))
            row, column = x.predictors()
            return hidden[row.to(hidden.device), column.to(hidden.device)]

    def readout(self, h: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        """Log-probabilities of the next token: head, the architecture's cap or scale, log-softmax.

        Raises:
            ValueError: a logit is NaN.
        """
        with torch.no_grad():
            return log_softmax(h if self._head is None else self._logits(h))

    def embedding(self) -> Float[Tensor, "v e"] | None:
        """Input embeddings in single precision, one row a token; None if the model has none to show."""
        weight = getattr(self.model.get_input_embeddings(), "weight", None)
        size = self.vocabulary.size
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2 or len(weight) < size:
            return None
        return weight.detach()[:size].float()

    # ----------------------------------------------------------------------------------- decoding

    def begin(self, contexts: Sequence[Int[Tensor, " _c"]]) -> tuple[DecodingState, Float[Tensor, "b d"]]:
        """Read contexts of any lengths in one pass, left-padded; positions count from each row's start.

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
        return DecodingState(length, width, None, tokens), self._reread(tokens, length)

    def advance(self, state: DecodingState, tokens: Int[Tensor, " b"]) -> tuple[DecodingState, Float[Tensor, "b d"]]:
        """Append one token to every row; ``state`` is updated and must not be used again.

        Raises:
            ValueError: a row would outgrow the window.
        """
        tokens = tokens.cpu()
        self._check_window(int(state.length.max()) + 1)
        length = state.length + 1
        if state.tokens is None:
            state = DecodingState(length, state.width + 1, state.cache, None)
            return state, self._step(state, tokens[:, None])
        wider = torch.nn.functional.pad(state.tokens, (0, max(0, int(length.max()) - state.tokens.shape[1])))
        wider[torch.arange(len(length)), state.length] = tokens
        return DecodingState(length, wider.shape[1], None, wider), self._reread(wider, length)

    def select(self, state: DecodingState, rows: Int[Tensor, " k"]) -> DecodingState:
        """The state of the given rows only; ``state`` must not be used again."""
        rows = rows.cpu()
        if state.tokens is not None:
            return DecodingState(state.length[rows], state.width, None, state.tokens[rows])
        with torch.inference_mode():
            state.cache.reorder_cache(rows.to(self.model.device))
        return DecodingState(state.length[rows], state.width, state.cache, None)

    def _step(self, state: DecodingState, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        mask = (torch.arange(state.width) >= state.width - state.length[:, None]).long()
        with torch.inference_mode():
            hidden, state.cache = self._trunk(tokens, mask, cache=state.cache, use_cache=True)
            return hidden[:, -1]

    def _reread(self, tokens: Int[Tensor, "b l"], length: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        tokens = tokens[:, : int(length.max())]
        with torch.inference_mode():
            hidden, _ = self._trunk(tokens, torch.ones_like(tokens))
            return hidden[torch.arange(len(length)), (length - 1).to(hidden.device)]

    # ------------------------------------------------------------------------------- the two halves

    def _trunk(
        self, tokens: Int[Tensor, "b l"], mask: Int[Tensor, "b w"], *, cache: Any = None, use_cache: bool = False
    ) -> tuple[Float[Tensor, "b l d"], Any]:
        """One forward pass in which the head is given no rows to work on: what enters it is kept."""
        if self._activate is not None:
            self._activate()
        device = self.model.device
        inputs: dict[str, Any] = {"input_ids": tokens.to(device), "use_cache": use_cache}
        # State-space models take the mask with the padding only; afterwards their state has absorbed it.
        if cache is None or self._cache_name == "past_key_values":
            inputs["attention_mask"] = mask.to(device)
        if self._takes_positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :].to(device)
        if cache is not None:
            inputs[self._cache_name] = cache
        if self._head is None:
            output = self.model(**inputs)
            return output.logits, getattr(output, self._cache_name, None)
        caught: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            caught.append(args[0])
            return (args[0][:, :0], *args[1:])

        handle = self._head.register_forward_pre_hook(catch)
        try:
            output = self.model(**inputs)
        finally:
            handle.remove()
        (hidden,) = caught
        return hidden, getattr(output, self._cache_name, None)

    def _logits(self, h: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        if self._activate is not None:
            self._activate()
        assert self._head is not None
        if self._wide_head is None:
            logits = self._head(h)
        else:
            logits = nn.functional.linear(h.to(self._wide_head[0]), *self._wide_head)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if self._factor != 1.0:
            logits = logits * self._factor
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    @cached_property
    def _wide_head(self) -> tuple[Tensor, Tensor | None] | None:
        """Weights of a plain half-precision head in fp32: logits rounded to bf16 are a bias, not noise."""
        head = self._head
        if type(head) is not nn.Linear or head.weight.dtype not in (torch.float16, torch.bfloat16):
            return None
        return head.weight.detach().float(), None if head.bias is None else head.bias.detach().float()

    # ------------------------------------------------------------------------------- verification

    def _verify_split(self) -> tuple[int, int]:
        """Compare the read-out of caught trunk vectors with the model's logits; return (v, d)."""
        head, tokens = self._head, self._probe()
        mask = torch.ones_like(tokens)
        with torch.inference_mode():
            self._head = None
            logits = self._trunk(tokens, mask)[0]
            if bool(torch.isnan(logits).any()):
                raise ValueError(
                    f"expected finite logits from {self.name} on a short probe, got NaN; "
                    f"the weights are damaged, or overflow in {self.dtype}: load the model with dtype=float32"
                )
            if not _close(self._trunk(tokens[:, :-1], mask[:, :-1])[0], logits[:, :-1], 512):
                raise ValueError(
                    f"expected a causal language model, got {type(self.model).__name__}, whose prediction of a token "
                    f"changes with what comes after it; load a model that was trained to predict the next token"
                )
            size = int(logits.shape[-1])
            self._head = head
            for factor, cap in dict.fromkeys([(self._factor, self._cap), (1.0, None)]) if head is not None else ():
                self._factor, self._cap = factor, cap
                try:
                    hidden = self._trunk(tokens, mask)[0]
                    mine = self._logits(hidden.flatten(0, 1)).view(logits.shape)
                except (ValueError, TypeError, RuntimeError, IndexError):
                    continue  # the head is not called once with (b, l, d): not a split this class knows
                if _close(mine, logits, 128 if self.dtype in (torch.float32, torch.float64) else 8):
                    return size, int(hidden.shape[-1])
        self._head = None
        self._note(f"the logits of {self.name} are not a known function of its output head's input; kept whole")
        return size, size

    def _verify_cache(self) -> None:
        """Compare ragged decoding through the cache (with a row leaving) with teacher forcing."""
        long = self._probe()[0]
        short = long[2:]
        x = Sequences.pack([long[:3], short[:1]], [long[3:], short[1:]])
        wanted = torch.split(self.encode(x), x.lengths.tolist())
        try:
            state, h = self.begin([long[:3], short[:1]])
            got = [h]
            for t in range(len(long) - 4):
                if t == 1:
                    state = self.select(state, torch.tensor([1, 0]))
                order = (short[1 + t], long[3 + t]) if t else (long[3], short[1])
                state, h = self.advance(state, torch.stack(order))
                got.append(h.flip(0) if t else h)
            seen = torch.stack(got, 1)
            steps = seen.shape[1]
            ok = _close(seen[0], wanted[0][:steps], 512) and _close(seen[1], wanted[1][:steps], 512)
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, NotImplementedError):
            ok = False
        if not ok:
            self._cached = False
            self._note(f"the cache of {self.name} fails on ragged batches; contexts are read anew at every token")

    def _probe(self) -> Int[Tensor, "1 l"]:
        """A short row of ordinary token ids, spread over the vocabulary."""
        special = set(self.tokenizer.all_special_ids)
        rows = min(len(self.tokenizer), int(self.model.get_input_embeddings().weight.shape[0]))
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


def _first_int(config: Any, keys: Sequence[str]) -> int | None:
    values = (getattr(config, key, None) for key in keys)
    return next((v for v in values if isinstance(v, int) and v > 0), None)


def _after_head(config: Any) -> tuple[float, float | None]:
    """Factor and soft cap that the configuration declares for logits: ``cap · tanh(factor · z / cap)``."""
    factor = 1.0
    for key in LOGIT_FACTORS:
        value = getattr(config, key, None)
        factor *= value if isinstance(value, (int, float)) else 1.0
    for key in LOGIT_DIVISORS:
        value = getattr(config, key, None)
        factor /= value if isinstance(value, (int, float)) else 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return float(factor), None if cap is None else float(cap)


def _close(a: Tensor, b: Tensor, roundings: int) -> bool:
    """Whether two tensors agree to so many roundings of the coarser format, relative to the largest entry."""
    a = a.to(b.device)
    # Parts of many architectures work in fp32 even where the weights are fp64.
    eps = max(torch.finfo(t.dtype).eps for t in (a, b, torch.empty(0)))
    finite = torch.isfinite(b)
    if not bool((torch.isfinite(a) == finite).all()):
        return False
    a, b = a[finite].double(), b[finite].double()
    if not len(b):
        return False
    return float((a - b).abs().max()) <= min(0.1, roundings * eps) * float(b.abs().max().clamp(min=1e-30))
