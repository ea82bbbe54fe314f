"""From two checkpoints to a number with an interval."""

import klkit

result = klkit.estimate("klkit:docs-tuned", "klkit:docs", samples=64, max_tokens=32)
print(result)
for name, text in result.lines.items():
    print(f"  {name}: {text}")

# Every estimator saw the same strings, so their errors can be compared.
for method, ratio in result.variance_ratio_vs_mc.items():
    print(f"  variance of {method:10s} / variance of Monte Carlo = {ratio:.2f}")
