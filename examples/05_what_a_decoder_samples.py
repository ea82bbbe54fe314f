"""Every transformation of a model is a model: how far is top-p sampling from the law it truncates?"""

import klkit
from klkit.models.wrap import temperature, top_p

model = klkit.load("klkit:docs")
for law in (top_p(model, 0.95), temperature(model, 0.9)):
    result = klkit.estimate(law, model, samples=48, max_tokens=24)
    print(f"{law.name}: {result.headline.value:.3f} ± {result.headline.stderr:.3f} nats per response")

# The other way round the divergence is infinite: the truncated law excludes tokens that the model allows.
back = klkit.estimate(model, top_p(model, 0.95), samples=48, max_tokens=24)
print(f"reversed: {back.headline.value} nats, at {back.headline.infinite} decisions")
