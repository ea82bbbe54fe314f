"""Pairs of heads and hidden states, and the loss by plain automatic differentiation in double precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from klkit.divergences import jensen_shannon, kl, reverse_kl
from klkit.divergences.differentiable import Divergences
from klkit.divergences.linear import Head


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """Leaves that may need a gradient, and what else makes heads of them."""

    hidden: tuple[Tensor, Tensor]
    weight: tuple[Tensor, Tensor]
    bias: tuple[Tensor | None, Tensor | None]
    factor: tuple[float, float] = (1.0, 1.0)
    cap: tuple[float | None, float | None] = (None, None)
    size: tuple[int | None, int | None] = (None, None)
    tokens: Tensor | None = None

    def heads(self) -> tuple[Head, Head]:
        p, q = (Head(*fields) for fields in zip(self.weight, self.bias, self.factor, self.cap, self.size, strict=True))
        return p, q

    def leaves(self) -> list[Tensor]:
        tensors = (*self.hidden, *self.weight, *self.bias)
        return list({id(x): x for x in tensors if x is not None and x.requires_grad}.values())

    def arguments(self) -> tuple:
        p, q = self.heads()
        return self.hidden[0], p, self.hidden[1], q, self.tokens

    def plain(self) -> Divergences:
        """Every quantity from the logits of all rows, in double precision, with a graph."""
        logp, logq = (self._logits(i, max(head.tokens for head in self.heads())).log_softmax(-1) for i in range(2))
        drawn = torch.zeros(len(logp), dtype=torch.long) if self.tokens is None else self.tokens
        entropies = [-(x.exp() * x.clamp(min=-1e18)).sum(-1) for x in (logp, logq)]
        return Divergences(
            kl(logp, logq),
            reverse_kl(logp, logq),
            *entropies,
            logp.gather(1, drawn[:, None])[:, 0],
            logq.gather(1, drawn[:, None])[:, 0],
            jensen_shannon(logp, logq),
        )

    def _logits(self, i: int, width: int) -> Tensor:
        u = self.hidden[i].double() @ self.weight[i].double().T
        bias, cap, size = self.bias[i], self.cap[i], self.heads()[i].tokens
        u = self.factor[i] * (u if bias is None else u + bias.double())
        z = u if cap is None else cap * torch.tanh(u / cap)
        return torch.nn.functional.pad(z[:, :size], (0, width - size), value=-torch.inf)


def case(
    rows: int = 11,
    tokens: int = 37,
    widths: tuple[int, int] = (5, 7),
    *,
    biased: bool = True,
    dtype: torch.dtype = torch.float64,
    grads: str = "hwbHWB",
    spread: float = 1.0,
    **more,
) -> Case:
    """A random case; ``grads`` names the leaves that need a gradient, capitals for those of ``q``."""

    def leaf(name: str, *shape: int, scale: float = 1.0) -> Tensor:
        x = (scale * normal(*shape, seed=ord(name))).to(dtype)
        return x.requires_grad_(name in grads)

    wide = [0 if size is None else size for size in more.get("size", (None, None))]
    vocabulary = [max(tokens, size) for size in wide]
    generator = torch.Generator().manual_seed(7)
    least = min(size or tokens for size in more.get("size", (None, None)))
    return Case(
        (leaf("h", rows, widths[0]), leaf("H", rows, widths[1])),
        (leaf("w", vocabulary[0], widths[0], scale=spread), leaf("W", vocabulary[1], widths[1], scale=spread)),
        (leaf("b", vocabulary[0]), leaf("B", vocabulary[1])) if biased else (None, None),
        tokens=torch.randint(least, (rows,), generator=generator),
        **more,
    )


def oracle(x: Case, weights: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss ``Σ w · x`` and its gradients in all leaves."""
    found = x.plain()._asdict()
    loss = sum(((weight.double() * found[name]).sum() for name, weight in weights.items()), torch.zeros(()))
    return loss.detach(), list(torch.autograd.grad(loss, x.leaves(), allow_unused=True))
