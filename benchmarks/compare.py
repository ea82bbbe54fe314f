"""What five candidates against one reference cost beside the passes that nobody can do without, and their memory.

    python benchmarks/compare.py [--rounds 3] [--json results/compare.json]

Of a small network, and of networks of the shapes of GPT-2 and GPT-2 medium, whose rounds take minutes.

Time: in one process, in turn, the sampling pass of p alone, one teacher-forced pass over the same strings (the trunk,
and the log-probabilities of every decision), and ``klkit.compare`` of five candidates: in memory, and with a run folder
and its pages. What comparison adds to sampling and six passes is what the ratio shows. Models are loaded beforehand.

Memory: the peak of a fresh process that compares by name, so that candidates are loaded and let go of, for one
candidate and for five, of separate checkpoints and of adapters on p; and of one that loads p alone and draws.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from common import MEBI, Table, begin, milliseconds, options, peak_bytes, peak_memory, ratio, report, side_by_side

import klkit
from klkit.api.batches import batches_of
from klkit.api.plan import Plan
from klkit.api.strings import resolve_batch_size
from klkit.models.base import log_probs
from klkit.models.hf import HuggingFaceModel
from klkit.sampling.ancestral import sample
from klkit.sequences import Sequences

CANDIDATES = 5
SAMPLING, PASS, COMPARE, FOLDER = (
    "sampling pass of p",
    "teacher-forced pass",
    "klkit.compare, five candidates",
    "the same with folder and pages",
)


def network(width: int, layers: int, vocabulary: int, seed: int) -> torch.nn.Module:
    """A GPT-2 of this shape with random weights, wider than the library draws them, so that laws are not flat."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=max(1, width // 64), n_positions=128,
            bos_token_id=0, eos_token_id=0, initializer_range=0.05,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()


def models(width: int, layers: int, vocabulary: int) -> list[HuggingFaceModel]:
    """A reference and its candidates, as different as random weights are."""
    words = klkit.load("klkit:docs").tokenizer
    return [
        HuggingFaceModel(network(width, layers, vocabulary, seed), words, name=f"random-{seed}", ends=[0])
        for seed in range(CANDIDATES + 1)
    ]


def timed(p: HuggingFaceModel, candidates: list[HuggingFaceModel], samples: int, tokens: int, rounds: int):
    """Seconds of each piece of work in each round."""
    context = p.context(None)
    plan = Plan([context], [context], samples, tokens, seed=0)
    size = resolve_batch_size(p, plan, "auto")
    parts: list[Sequences] = []

    def sampling() -> None:
        parts.clear()
        for rows in batches_of(plan.total, size):
            names = plan.names(int(rows[0]), int(rows[-1]) + 1)
            parts.append(sample(p, [context] * len(rows), max_tokens=tokens, seed=0, **names).sequences)

    def one_pass() -> None:
        for x in parts:
            for _ in log_probs(candidates[0], x):
                pass

    def compare() -> None:
        klkit.compare(p, candidates, samples=samples, max_tokens=tokens)

    def on_disk() -> None:
        with tempfile.TemporaryDirectory() as folder:
            klkit.compare(p, candidates, samples=samples, max_tokens=tokens, out=Path(folder) / "run")

    klkit.compare(p, candidates, samples=8, max_tokens=4)  # whatever is done once is done before
    work = {SAMPLING: sampling, PASS: one_pass, COMPARE: compare, FOLDER: on_disk}
    return side_by_side(work, rounds, warm=0)


def report_peak(p: str, *candidates: str) -> None:
    """Compare by name, or draw from ``p`` alone, and print the peak of this process."""
    if candidates:
        klkit.compare(p, candidates, samples=32, max_tokens=16)
    else:
        model = klkit.load(p)
        sample(model, [model.context(None)] * 32, max_tokens=16, seed=0, prompt=[0] * 32)
    print(peak_bytes() / MEBI)


def memory(folder: Path, quick: bool, threads: int) -> Table:
    """Peak memory of comparisons by name, of checkpoints of one shape."""
    from peft import LoraConfig, get_peft_model

    width, layers, vocabulary, count = (64, 1, 1024, 1) if quick else (1024, 8, 32_000, CANDIDATES)
    words = klkit.load("klkit:docs").tokenizer
    for seed in range(count + 1):
        model = network(width, layers, vocabulary, seed)
        model.save_pretrained(folder / f"model-{seed}")
        words.save_pretrained(folder / f"model-{seed}")
    for seed in range(1, count + 1):
        wrapped = get_peft_model(
            network(width, layers, vocabulary, 0),
            LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True),
        )
        wrapped.save_pretrained(folder / f"adapter-{seed}")
    p = str(folder / "model-0")
    weights = sum(x.numel() * x.element_size() for x in model.state_dict().values()) / MEBI
    separate = [str(folder / f"model-{i}") for i in range(1, count + 1)]
    adapters = [f"peft={folder / f'adapter-{i}'}" for i in range(1, count + 1)]
    work = {
        "p alone": [],
        "one candidate": separate[:1],
        "five candidates": separate,
        "one adapter on p": adapters[:1],
        "five adapters on p": adapters,
    }
    if quick:
        work = {"p alone": [], "one adapter on p": adapters}
    flags = ["--threads", str(threads)]
    rows = [
        [name, f"{peak_memory(__file__, json.dumps([p, *candidates]), flags):,.0f}"]
        for name, candidates in work.items()
    ]
    return Table(f"Peak memory, models of {weights:,.0f} MiB, 32 strings of 16 tokens", ["process", "MiB"], rows)


def main() -> None:
    arguments = options(__doc__, rounds=3).parse_args()
    begin(arguments)
    if arguments.peak:
        report_peak(*json.loads(arguments.peak))
        return
    tables, seconds = [], {}
    shapes = [(128, 4, 1024, 256, 64), (768, 12, 50_257, 256, 32), (1024, 24, 50_257, 256, 16)]
    for width, layers, vocabulary, samples, tokens in [(64, 1, 1024, 8, 4)] if arguments.quick else shapes:
        p, *candidates = models(width, layers, vocabulary)
        found = timed(p, candidates, samples, tokens, arguments.rounds)
        budget = [a + (CANDIDATES + 1) * b for a, b in zip(found[SAMPLING], found[PASS], strict=True)]
        found["budget"] = budget
        rows = [
            [name, milliseconds(found[name]), "" if name in (SAMPLING, PASS) else f"{ratio(found, name, 'budget'):.2f}"]
            for name in (SAMPLING, PASS, COMPARE, FOLDER)
        ]
        title = f"{samples} strings of up to {tokens} tokens, {layers} layers of width {width}, V = {vocabulary:,}"
        tables.append(Table(title, ["work", "ms, median (least)", "over sampling + 6 passes"], rows))
        seconds[title] = found
    with tempfile.TemporaryDirectory() as folder:
        tables.append(memory(Path(folder), arguments.quick, arguments.threads))
    report(tables, seconds, arguments)


if __name__ == "__main__":
    sys.exit(main())
