"""Strings that an older policy drew, used for the divergence of the current one: prefix weights only."""

import klkit
from klkit.models.automaton import coin
from klkit.sampling.importance import effective_sample_size, from_policy

p, q, older = coin(end=0.5), coin(end=0.25), coin(end=0.4)
strings = from_policy(older, [older.context(None)] * 2000, max_tokens=60, seed=0)
statistics = klkit.score(p, q, strings)
weighted = klkit.ESTIMATORS["rb"](statistics)
print(f"exact {klkit.exact(p, q).value:.4f}, from the older policy's strings {weighted.mean():.4f}")
print("effective sample size by position:", effective_sample_size(statistics)[:5].round().int().tolist())
