"""Tokens a second of klkit's sampling and of transformers' ``generate``, from the same model and prompts.

    python benchmarks/sampling.py [--threads 2] [--json PATH]

A random GPT-2 of 4 layers and width 256 with a vocabulary of 50,257; 32 prompts of 8 tokens, up to 64 new tokens,
from the full next-token law (``do_sample=True, top_k=0, top_p=1, temperature=1``). klkit draws in double precision,
from a stream of its own for each string, and settles close choices, so that a string does not depend on its batch.
"""

from __future__ import annotations

import sys

import torch
from common import Table, begin, milliseconds, options, ratio, report, side_by_side
from pair import pair

from klkit.models.hf import HuggingFaceModel
from klkit.sampling.ancestral import sample
from klkit.sampling.draw import Noise, draw

GENERATE, KLKIT = "transformers generate, default cache", "klkit sample"


def generate(model: HuggingFaceModel, prompts: torch.Tensor, new: int) -> torch.Tensor:
    """The usual call, told to cut nothing off."""
    with torch.inference_mode():
        return model.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=new,
            pad_token_id=model.vocabulary.ends[0],
        )


def parts_of_a_step(model: HuggingFaceModel, prompts: torch.Tensor, rounds: int) -> Table:
    """Where the time of one decoding step goes."""
    n, size = len(prompts), model.vocabulary.size
    _, hidden = model.begin(list(prompts))
    logp = model.readout(hidden)
    noise = Noise([torch.Generator().manual_seed(i) for i in range(n)], size)
    rows, steps = torch.arange(n), iter(range(1 << 30))
    weight = model.model.lm_head.weight
    with torch.inference_mode():
        seconds = side_by_side(
            {
                "read-out of klkit: head, log-softmax, check": lambda: model.readout(hidden),
                "the head as transformers multiplies it": lambda: torch.nn.functional.linear(hidden, weight),
                "draw of klkit, with its random numbers": lambda: draw(logp, noise.take(rows, next(steps))),
                "draw of generate: softmax, torch.multinomial": lambda: torch.multinomial(logp.softmax(-1), 1),
            },
            rounds,
        )
    rows_of_text = [[name, milliseconds(taken)] for name, taken in seconds.items()]
    return Table(f"One decoding step of {n} strings, V = {size:,}", ["", "ms (least)"], rows_of_text)


def main() -> None:
    arguments = options(__doc__, rounds=7).parse_args()
    begin(arguments)
    size, new, count = (300, 4, 3) if arguments.quick else (50257, 64, 32)
    model, _ = pair(size)
    prompts = torch.randint(size - 1, (count, 8), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)  # generate draws from the global generator
    seeds = iter(range(1 << 30))
    drawn: dict[str, list[int]] = {GENERATE: [], KLKIT: []}

    def theirs() -> None:
        out = generate(model, prompts, new)[:, prompts.shape[1] :]
        ended = (out == model.vocabulary.ends[0]).int().cumsum(1)
        drawn[GENERATE].append(int((ended.roll(1, 1).index_fill(1, torch.tensor([0]), 0) == 0).sum()))

    def ours() -> None:
        drawn[KLKIT].append(sample(model, list(prompts), max_tokens=new, seed=next(seeds)).sequences.decisions)

    seconds = side_by_side({GENERATE: theirs, KLKIT: ours}, arguments.rounds)
    a_token = {name: [t / n for t, n in zip(taken, drawn[name][1:], strict=True)] for name, taken in seconds.items()}
    rows = [
        [name, f"{sum(drawn[name][1:]) / sum(taken):,.0f}", f"{ratio(a_token, GENERATE, name):.2f}"]
        for name, taken in seconds.items()
    ]
    title = f"Sampling {count} strings of up to {new} tokens, V = {size:,}"
    tables = [
        Table(title, ["", "tokens a second", "x generate"], rows),
        parts_of_a_step(model, prompts, 5 * arguments.rounds),
    ]
    report(tables, seconds, arguments)


if __name__ == "__main__":
    sys.exit(main())
