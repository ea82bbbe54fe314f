"""Several processes give the result of one, to the last digit; and none waits for one that failed."""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.api.test_run import Interrupter

import klkit
from klkit.api import strings
from klkit.api.rounds import in_rounds
from klkit.models.automaton import random_automaton
from klkit.report.record import RunFolder
from klkit.rng import stream
from klkit.sampling.importance import from_policy
from klkit.train.processes import Outcome, Processes, open_processes

PAIR = ("klkit:docs-tuned", "klkit:docs")
SMALL = {"samples": 36, "max_tokens": 8, "batch_size": 8}
CASES = {
    "strings": {**SMALL},
    "tolerance": {"max_tokens": 8, "batch_size": 24, "rtol": 0.045},
    "reverse": {**SMALL, "divergence": "reverse_kl", "floor": "dtype"},
    "both": {**SMALL, "samples": 20, "divergence": "jeffreys"},
    "text": {"text": "text.txt", "context": 16, "batch_size": 4},
}
ROOT = Path(__file__).resolve().parents[2]


class Failing:
    """``one_batch``, but for what the process of number ``rank`` raises at its call number ``at``."""

    def __init__(self, processes, rank, at, error):
        self.left = at if processes.rank == rank else -1
        self.error, self.real, self.widths = error, strings.one_batch, []

    def __call__(self, p, q, plan, start, size, **options):
        self.left -= 1
        if self.left == 0:
            raise self.error
        self.widths.append((start, size))
        return self.real(p, q, plan, start, size, **options)


def automata():
    return tuple(random_automaton(3, 5, generator=stream(i, "rounds")) for i in range(2))


def other_law(model, contexts, **names):
    """A sampler that draws from another law than the model's, and says so."""
    return from_policy(random_automaton(3, 5, generator=stream(7, "rounds")), contexts, **names)


def foreign(processes):
    options = {"samples": 30, "max_tokens": 20, "batch_size": 8, "sampler": "vllm"}
    return klkit.estimate(*automata(), draw=other_law, processes=processes, **options).to_dict()


def in_two(folder):
    """What each of two processes does, and notes for the test."""
    os.chdir(folder)
    with open_processes() as processes:
        noted = {"rank": processes.rank}
        for name, options in CASES.items():
            result = klkit.estimate(*PAIR, out=f"two/{name}", processes=processes, **options)
            noted[name] = result.to_dict()
        noted["foreign"] = foreign(processes)
        klkit.estimate(*PAIR, out="begun by one", resume=True, processes=processes, **CASES["strings"])
        for after, name in ((3, "strings"), (2, "text")):
            try:
                options = {"observe": Interrupter(after)} if name == "strings" else {}
                cut_off_text(name)
                klkit.estimate(*PAIR, out=f"begun by two {name}", processes=processes, **options, **CASES[name])
            except KeyboardInterrupt:
                noted[f"interrupted {name}"] = True
        RunFolder.append = APPEND
        # One process fails at its second batch, the fourth of all: three are kept.
        real = strings.one_batch
        strings.one_batch = Failing(processes, 1, 2, ValueError("expected no such error, got it; ask rank 1"))
        try:
            klkit.estimate(*PAIR, out="failed", processes=processes, **SMALL)
        except ValueError as error:
            noted["error"] = str(error)
        strings.one_batch = Failing(processes, 1, 1, torch.OutOfMemoryError("full"))
        strings.one_batch.real = real
        automatic = {**SMALL, "batch_size": "auto", "samples": 140}
        noted["smaller"] = klkit.estimate(*PAIR, processes=processes, **automatic).to_dict()
        noted["widths"] = strings.one_batch.widths
        strings.one_batch = real
        try:
            processes.everywhere(lambda: 1 / processes.rank)
        except ZeroDivisionError as error:
            noted["error of the first"] = str(error)
        Path(f"noted-{processes.rank}.json").write_text(json.dumps(noted))


APPEND = RunFolder.append


def cut_off_text(name):
    """Let the second batch of a text, for which there is no observer, be the last one stored."""
    left = [2]

    def cut_off(self, *arguments):
        APPEND(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    RunFolder.append = cut_off if name == "text" else APPEND


def launch(code, folder, count=2):
    """Run ``code`` in ``count`` processes as a launcher starts them: exit codes and standard error of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "KLKIT_BACKEND": "eager", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    told = [process.communicate(timeout=240) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, told, strict=True)]


@contextmanager
def at(folder):
    """Work in a folder as one of the processes does: one thread, the same kernels."""
    threads, here = torch.get_num_threads(), Path.cwd()
    (folder / "text.txt").write_text("The value of a name is looked up in the namespace of the module. " * 30)
    torch.set_num_threads(1)
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KLKIT_BACKEND", "eager")
        try:
            yield
        finally:
            os.chdir(here)
            torch.set_num_threads(threads)


def notes_of_two(module, folder):
    """What ``in_two`` of a module does in two processes, and what each of them noted."""
    for code, _, error in launch(f"from {module} import in_two; in_two({str(folder)!r})", folder):
        assert code == 0, error
    return [json.loads((folder / f"noted-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder in which one process and two have done the same."""
    folder = tmp_path_factory.mktemp("rounds")
    with at(folder):
        for name, options in CASES.items():
            klkit.estimate(*PAIR, out=f"one/{name}", **options)
        with pytest.raises(KeyboardInterrupt):
            klkit.estimate(*PAIR, out="begun by one", observe=Interrupter(3), **CASES["strings"])
        noted = notes_of_two("tests.api.test_rounds", folder)
        for name in ("strings", "text"):
            klkit.estimate(*PAIR, out=f"begun by two {name}", resume=True, **CASES[name])
        yield folder, noted


def results(folder, one, two):
    return [json.loads((folder / name / "result.json").read_text()) for name in (one, two)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_result_of_one(ran, name):
    folder, noted = ran
    one, two = results(folder, f"one/{name}", f"two/{name}")
    assert one == two
    assert noted[0][name] == noted[1][name] == two
    lines = [(folder / which / name / "samples.jsonl").read_text() for which in ("one", "two")]
    assert lines[0] == lines[1]
    assert (folder / "two" / name / "report.html").is_file()


def test_the_tolerance_was_reached_at_a_look_in_the_middle(ran):
    count = results(ran[0], "one/tolerance", "two/tolerance")[1]["headline"]["n_sequences"]
    assert 64 < count < 16384


@pytest.mark.parametrize(
    ("resumed", "whole"),
    [("begun by one", "strings"), ("begun by two strings", "strings"), ("begun by two text", "text")],
)
def test_a_run_is_resumed_by_another_number_of_processes(ran, resumed, whole):
    folder, noted = ran
    assert all(found["interrupted strings"] and found["interrupted text"] for found in noted)
    one, two = results(folder, f"one/{whole}", resumed)
    assert one == two
    lines = [(folder / name / "samples.jsonl").read_text() for name in (f"one/{whole}", resumed)]
    assert lines[0] == lines[1]


def test_an_error_anywhere_ends_all_and_keeps_what_was_done(ran):
    folder, noted = ran
    assert [found["error"] for found in noted] == ["expected no such error, got it; ask rank 1"] * 2
    assert not (folder / "failed" / "result.json").exists()
    assert len(RunFolder(folder / "failed").shards()) == 3
    assert [found["error of the first"] for found in noted] == ["division by zero"] * 2


def test_all_take_smaller_batches_when_one_has_no_room(ran):
    _, noted = ran
    assert noted[0]["smaller"]["headline"] == noted[1]["smaller"]["headline"]
    widths = noted[0]["widths"] + noted[1]["widths"]
    assert [0, 64] in widths  # the batch of the process that had room is kept
    assert {width for start, width in widths if start} == {32, 12}
    alone = klkit.estimate(*PAIR, **{**SMALL, "batch_size": "auto", "samples": 140})
    assert noted[0]["smaller"]["headline"]["value"] == pytest.approx(alone.headline.value, rel=1e-5)


def test_strings_of_another_sampler_are_drawn_once_for_all(ran):
    _, noted = ran
    one = json.loads(json.dumps(foreign(Processes())))
    assert noted[0]["foreign"] == noted[1]["foreign"] == one


COMMAND = """
import os, sys
from klkit.api import strings
from klkit.cli import main
if os.environ["RANK"] == "1":
    def fail(*arguments, **options):
        raise ValueError("expected no such error, got it; ask rank 1")
    strings.one_batch = fail
options = "--samples 20 --max-tokens 4 --batch-size 8 --out failed --json -".split()
main(["estimate", *{pair!r}, *options])
"""


def test_a_command_that_fails_in_one_process_ends_in_all_of_them(tmp_path):
    for code, out, err in launch(COMMAND.format(pair=PAIR), tmp_path):
        assert code == 2, err
        assert "klkit: expected no such error, got it; ask rank 1" in err
        assert out == ""
    assert not (tmp_path / "failed" / "result.json").exists()


def test_results_come_in_order_before_the_error_of_a_later_job():
    def work(job):
        return 1 // (3 - job)

    rounds = in_rounds(range(5), work, Processes())
    assert [next(rounds) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(rounds)


class NotPortable(OSError):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_errors_that_cannot_travel_keep_their_message():
    def fail():
        raise NotPortable("this", "that")

    outcome = Outcome.of(fail).portable()
    assert type(outcome.error) is OSError
    with pytest.raises(OSError, match="this and that"):
        outcome.get()
    out_of_memory = Outcome(error=torch.OutOfMemoryError("full")).portable()
    assert isinstance(out_of_memory.error, torch.OutOfMemoryError)
