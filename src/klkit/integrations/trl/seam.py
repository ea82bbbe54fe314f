"""Where a trainer's scoring passes through: the forward of its models, from hidden states on.

TRL's trainers ask a model for log-probabilities by ``model(..., labels=labels, fused_lm_head=True)``. The forward put
here answers such calls with klkit's one pass over both models' heads: log-probabilities, entropies and next-token
divergences of the scored positions, each differentiable, without logits of more than a few tokens. It runs inside the
forward that the trainer calls, under whatever wraps the model; all other calls, generation among them, are untouched.

Log-probabilities of the sampler, of the policy and of the divergence come from the same arithmetic, so a ratio of
policy and sampler is 1 where nothing was trained, in half precision too.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from klkit.divergences.linear import Head
from klkit.divergences.linear_tiles import linear_divergences
from klkit.models.base import VocabularyMismatch
from klkit.models.split import close, declared_after_head

PROBE = (3, 1, 2, 5, 4)
"""Token ids on which it is verified that logits follow from hidden states as a configuration declares."""


@dataclass
class Scores(ModelOutput):
    """What a scoring forward returns, zero at positions that are not scored; ``(b, l)`` each.

    Attributes:
        log_probs: ``log p(y_n)`` of each position's next token; the name is TRL's.
        entropy: of the next token.
        aux_loss: load-balancing loss of a mixture of experts.
        kl: ``KL(p‖q)`` of the next token; None without a reference.
        reference_log_probs: ``log q(y_n)``; None without a reference.
    """

    log_probs: Any = None  # accelerate makes a new one from a dictionary of all fields
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None
    kl: Tensor | None = None
    reference_log_probs: Tensor | None = None


class Seam:
    """What the forwards of policy and reference are to do, and what they leave for the trainer.

    Attributes:
        reference_head: output head of the reference as it was when its hidden states were kept.
    """

    def __init__(self, *, copy_head: bool = False) -> None:
        self.reference_head: Head | None = None
        self._reference: Tensor | None = None
        self._scores: list[Scores] | None = None
        self._kept: list[Tensor] | None = None
        self._last = 0
        self._copy_head = copy_head

    @contextmanager
    def recording(self, reference: Float[Tensor, "b c e"] | None = None) -> Iterator[list[Scores]]:
        """Score the policy, against the reference whose hidden states at the last ``c`` positions are given."""
        self._scores, self._reference = [], reference
        try:
            yield self._scores
        finally:
            self._scores = self._reference = None

    @contextmanager
    def keeping(self, last: int) -> Iterator[list[Tensor]]:
        """Keep hidden states of the ``last`` positions of every scoring call, and read nothing out."""
        self._kept, self._last = [], last
        try:
            yield self._kept
        finally:
            self._kept = None

    def visit(
        self, hidden: Float[Tensor, "b l d"], labels: Int[Tensor, "b l"], head: Head, aux_loss: Tensor | None
    ) -> Scores:
        """Answer one scoring call; a label of -100 marks a position that is not scored.

        Raises:
            VocabularyMismatch: policy and reference do not choose from as many tokens.
            ValueError: there are other strings than the reference's hidden states are of.
        """
        if self._kept is not None:
            self._kept.append(hidden[:, -self._last :].clone())
            head = head.detach()
            self.reference_head = replace(head, weight=head.weight.clone()) if self._copy_head else head
            return Scores(log_probs=hidden.new_zeros(labels.shape, dtype=torch.float32))
        mask = labels != -100
        tokens, rows = labels[mask], hidden[mask]
        reference = self._reference
        if reference is None:
            # Any q will do: uniform from one-column weights, whose logits cost nothing.
            rows_q, head_q = rows.new_zeros(len(rows), 1), Head(head.weight.new_zeros(head.tokens, 1))
        else:
            rows_q, head_q = self._reference_rows(reference, mask, head)
        with torch.autocast(hidden.device.type, enabled=False):
            found = linear_divergences(rows, head, rows_q, head_q, tokens)

        def spread(values: Tensor | None) -> Tensor:
            assert values is not None
            # A scatter stays connected to the model where no position is scored, as distributed backward passes need.
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        compared = (None, None) if reference is None else (spread(found.kl), spread(found.logq))
        scores = Scores(spread(found.logp), spread(found.entropy_p), aux_loss, *compared)
        if self._scores is not None:
            self._scores.append(scores)
        return scores

    def _reference_rows(self, reference: Tensor, mask: Tensor, head: Head) -> tuple[Tensor, Head]:
        head_q = self.reference_head
        assert head_q is not None
        if head.tokens != head_q.tokens:
            raise VocabularyMismatch(
                f"expected a reference over the policy's {head.tokens} tokens, got one over {head_q.tokens}; load both "
                f"from checkpoints of one vocabulary, or resize the embeddings of the one that the policy's "
                f"configuration names"
            )
        width = reference.shape[1]
        if reference.shape[0] != len(mask) or bool(mask[:, :-width].any()):
            raise ValueError(
                f"expected {reference.shape[0]} strings scored at their last {width} positions, as the reference's "
                f"hidden states are, got {len(mask)} strings; score a batch of the trainer in one call"
            )
        return reference[mask[:, -width:]], head_q


def attach(seam: Seam, network: Any, temperature: float, *, verify: bool = True) -> None:
    """Let scoring calls of ``network``, a causal language model of transformers, pass through ``seam``.

    Raises:
        ValueError: the head has an adapter or is no plain linear layer, or logits do not follow from hidden states by
            it, a scale and a cap.
    """
    factor, cap = declared_after_head(network.config.get_text_config())
    head_of(network, factor, cap)
    if verify:
        verify_head(network, factor, cap)
    stock = network.forward

    @functools.wraps(type(network).forward)  # generation reads the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None:
            kwargs |= {"fused_lm_head": True} if fused_lm_head else {}
            kwargs |= {} if labels is None else {"labels": labels}
            return stock(*args, **kwargs)
        if kwargs.get("output_router_logits"):
            # The load-balancing loss comes with TRL's own pass, over the same hidden states.
            caught: list[Any] = []
            handle = self.base_model.register_forward_hook(lambda _module, _args, output: caught.append(output))
            try:
                aux_loss = stock(*args, fused_lm_head=True, labels=labels, **kwargs).aux_loss
            finally:
                handle.remove()
            (output,) = caught
        else:
            output, aux_loss = self.base_model(*args, use_cache=False, **kwargs), None
        # Looked up at each call: wrappers replace parameters after this forward is put.
        head = head_of(self, factor, cap).cooled(temperature)
        hidden = output.last_hidden_state[:, :-1].to(head.weight.device)
        return seam.visit(hidden, labels[:, 1:].to(hidden.device), head, aux_loss)

    network.forward = types.MethodType(forward, network)


def head_of(network: Any, factor: float, cap: float | None) -> Head:
    """The output head of ``network``, gathered if its weight is sharded.

    Raises:
        ValueError: it has an adapter, is not a plain linear layer, or is sharded in a way not supported.
    """
    module = network.get_output_embeddings()
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(
            f"expected a plain linear output head, the same for policy and reference, got {type(module).__name__}; "
            f"leave the head out of target_modules and modules_to_save, and out of quantisation"
        )
    if hasattr(weight, "ds_id"):
        raise ValueError(
            "expected weights that are whole in the forward pass, got DeepSpeed ZeRO stage 3, which takes the head "
            "apart before the backward pass; use stage 2 or FSDP2"
        )
    bias: Any = module.bias
    if hasattr(weight, "full_tensor"):  # a DTensor, of FSDP2
        weight = weight.full_tensor()
        bias = None if bias is None else bias.full_tensor()
    return Head(weight, bias, factor, cap)


@torch.no_grad()
def verify_head(network: Any, factor: float, cap: float | None) -> None:
    """Check on a few tokens that the network's logits are those of its head on its last hidden state.

    Raises:
        ValueError: they are not.
    """
    if any(p.is_meta for p in network.parameters()):
        return
    modes = {module: module.training for module in network.modules()}
    network.eval()
    tokens = torch.tensor([PROBE], device=network.device)
    try:
        logits = network(input_ids=tokens).logits[0]
        hidden = network.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    finally:
        for module, training in modes.items():
            module.training = training
    found = head_of(network, factor, cap).logits(hidden.to(logits.device))
    wide = logits.dtype in (torch.float32, torch.float64)
    if found.shape != logits.shape or not close(found, logits, 128 if wide else 8):
        raise ValueError(
            f"expected logits that are the output head's, scaled and capped as the configuration declares (factor "
            f"{factor:g}, cap {cap}), got others from {type(network).__name__}; train it with the stock trainer"
        )
