"""One reference and several candidates, on the same strings: which are closer, and which cannot be told apart."""

import klkit
from klkit.api.gate import gate
from klkit.stats.anytime import anytime_difference

candidates = ["klkit:docs-int8", "klkit:docs-int4", "round=int4", "temperature=0.9"]
ranking = klkit.compare("klkit:docs", candidates, samples=48, max_tokens=12)
print(ranking)
for i in ranking.ranked:
    entry, (first, last) = ranking.entries[i], ranking.rank(i)
    place = f"{first}" if first == last else f"{first}-{last}"
    print(f"{place:>4}  {entry.name:16} {entry.result.headline.value:.4g}  tied with {ranking.tied_with(i) or 'none'}")

# A decision on one of them, with its error rate.
print(gate(ranking.entries[0].result, 0.01))

# Looking after every string, and stopping when one of two is closer: the error rate survives it (asymptotically).
int8, int4 = (ranking.entries[i].result for i in (0, 1))
rb = [next(e for e in r.estimates if e.method == "rb").contributions for r in (int8, int4)]
watched = anytime_difference(rb[0], rb[1])
print("closer:", candidates[0] if watched.closer == "first" else "not resolved", "after", watched.resolved, "strings")
