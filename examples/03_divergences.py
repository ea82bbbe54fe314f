"""The divergences as plain functions on log-probabilities: masks, infinities and tiny values included."""

import torch

import klkit

logits = torch.randn(2, 5, 1000, generator=torch.Generator().manual_seed(0))
logp = logits.log_softmax(-1)
logq = (logits + 1e-3).log_softmax(-1)
print("identical up to a shift:", klkit.kl(logp, logq).abs().max().item())

masked = logits.clone()
masked[..., 10] = -torch.inf
both = klkit.kl(masked.log_softmax(-1), (2 * masked).log_softmax(-1))
print("a token masked in both: finite", bool(both.isfinite().all()))

one_sided = klkit.kl(logp, masked.log_softmax(-1))
print("a token that only q excludes:", one_sided[0, 0].item())
