"""Two processes make the step that one makes: the same strings, the same gradient, one folder."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from klkit.api.distill import distill
from klkit.api.distill_plan import Distillation
from klkit.models.spec import load
from klkit.train.distill import start, step
from klkit.train.distill_recipe import DistillRecipe
from klkit.train.examples import Example
from klkit.train.processes import Processes, open_processes

EXAMPLES = [Example("the plot was", " thin" * n + " .") for n in range(1, 12)]
TEACHER, STUDENT = "klkit:reviews-positive", "klkit:reviews"
CASES = {
    "given": DistillRecipe(batch=5, max_tokens=12, warmup=1, gradient_norm=1e9),
    "mixed": DistillRecipe(batch=5, max_tokens=8, warmup=1, on_policy=0.5, micro_batch=2, loss="reverse_kl"),
    "sequence": DistillRecipe(batch=6, max_tokens=6, warmup=1, objective="sequence-rkl"),
    "more than strings": DistillRecipe(batch=1, max_tokens=8, warmup=1, loss="forward_kl"),
}
RUN = Distillation(
    STUDENT,
    "examples",
    TEACHER,
    steps=2,
    every=1,
    samples=1,
    recipe=DistillRecipe(text="teacher", batch=5, max_tokens=6),
)


def steps(processes):
    """What the cases measure and their gradients."""
    teacher, student = load(TEACHER), load(STUDENT)
    found = {}
    for name, recipe in CASES.items():
        state, metrics = step(start(student, teacher, EXAMPLES, recipe, 5, processes=processes))
        gradient = torch.cat([w.grad.reshape(-1) for _, w in state.student.parameters])
        found[name] = (metrics.loss, metrics.tokens, metrics.strings, gradient)
    return found


SCRIPT = """
import sys, torch
sys.path.insert(0, {root!r})
from tests.train.test_processes import EXAMPLES, RUN, distill, open_processes, steps
with open_processes() as processes:
    found = steps(processes)
    torch.save(found, f"{folder}/{{processes.rank}}.pt")
    assert processes.gather(processes.rank) == [0, 1]
    try:
        processes.by_first(lambda: [][1])
    except IndexError:
        pass
    distill(RUN, examples=EXAMPLES, out="{folder}/run", processes=processes)
"""


def launch(folder: Path):
    """Two processes as a launcher starts them; they say what went wrong, if anything."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).resolve().parents[2])
    script = SCRIPT.format(root=root, folder=folder)
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=240)[1] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(told)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(folder)
    return folder


def test_two_processes_form_the_gradient_of_one(two):
    mine = steps(Processes())
    theirs = [torch.load(two / f"{rank}.pt") for rank in range(2)]
    for name, (loss, tokens, strings, gradient) in mine.items():
        for found in theirs:
            assert found[name][0] == pytest.approx(loss, rel=1e-5), name
            assert found[name][1:3] == (tokens, strings), name
            assert torch.allclose(found[name][3], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name
        assert torch.equal(theirs[0][name][3], theirs[1][name][3]), name
        assert float(gradient.norm()) > 0


def test_two_processes_write_one_run_that_is_the_run_of_one(two, tmp_path):
    distill(RUN, examples=EXAMPLES, out=tmp_path / "run")
    for name in ("metrics.jsonl", "evaluations.jsonl", "teacher_text.jsonl"):
        one, both = (
            [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]
            for folder in (tmp_path, two)
        )
        assert len(one) == len(both), name
        for a, b in zip(one, both, strict=True):
            for key in a.keys() & {"loss", "tokens", "kl", "reverse_kl", "response"}:
                assert b[key] == (pytest.approx(a[key], rel=2e-3, abs=1e-7) if isinstance(a[key], float) else a[key])
    a, b = (load_file(folder / "run" / "student" / "model.safetensors") for folder in (tmp_path, two))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


def test_parts_are_all_of_it_each_once():
    for count in range(1, 5):
        for number in range(7):
            parts = [i for rank in range(count) for i in Processes(rank, count).share(number)]
            assert parts == list(range(number))


def test_one_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with open_processes() as processes:
        assert (processes.rank, processes.count, processes.first) == (0, 1, True)
        assert processes.sum([1, 2.5]) == [1.0, 2.5]
        assert processes.gather("a") == ["a"]
        with pytest.raises(ZeroDivisionError):
            processes.by_first(lambda: 1 / 0)
