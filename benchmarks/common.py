"""What the benchmarks share: timing side by side, peak memory of a fresh process, the machine, tables."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

MEBI = 1 << 20
PACKAGES = ("klkit", "torch", "transformers", "numba", "liger-kernel", "trl", "torchmetrics")

Work = Callable[[], object] | tuple[Callable[[], object], Callable[[], object]]
"""What is timed; or what prepares it, which is not timed, and then what is."""


def options(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each piece of work is timed")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for other processes, in all")
    parser.add_argument("--json", type=Path, default=None, metavar="PATH")
    parser.add_argument("--peak", default=None, metavar="NAME", help=argparse.SUPPRESS)  # see peak_memory
    return parser


def begin(arguments: argparse.Namespace) -> None:
    """Apply the common options."""
    torch.set_num_threads(arguments.threads)
    Patience.seconds = arguments.patience


def side_by_side(work: Mapping[str, Work], rounds: int, *, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each piece of work in each round: all of them in turn, in reverse order every other round.

    What disturbs the machine for a while then disturbs all alike, and a ratio within a round is fair. While other
    processes are busy nothing is timed, and what they disturbed is timed again, as long as there is patience.
    """
    steps = {name: w if isinstance(w, tuple) else (lambda: None, w) for name, w in work.items()}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(-warm, rounds):  # the first round warms up, where nothing else has
        for name in sorted(steps, key=list(steps).index, reverse=number % 2 == 1):
            prepare, run = steps[name]
            while True:
                wait_until_quiet()
                prepare()
                others, began = others_seconds(), time.perf_counter()
                result = run()
                taken = time.perf_counter() - began
                del result
                # The kernel counts in hundredths of a second.
                if number < 0 or others_seconds() - others < 0.03 + 0.03 * taken or not Patience.left(taken):
                    break
            if number >= 0:
                seconds[name].append(taken)
    return seconds


class Patience:
    """Seconds that a benchmark may still spend on waiting and on timing again."""

    seconds = 0.0

    @classmethod
    def left(cls, spent: float) -> bool:
        cls.seconds -= spent
        return cls.seconds > 0


def others_seconds() -> float:
    """Processor seconds of all other processes since the system started (Linux; else 0)."""
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = Path("/proc/stat").read_text().split()[1:9]
    busy = sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def wait_until_quiet() -> None:
    """Return once other processes have used less than a tenth of a processor for a moment, or patience has run out."""
    while Patience.seconds > 0:
        before, began = others_seconds(), time.perf_counter()
        time.sleep(0.1)
        passed = time.perf_counter() - began
        if others_seconds() - before < 0.1 * passed + 0.01 or not Patience.left(passed):
            return


def ratio(seconds: Mapping[str, Sequence[float]], name: str, other: str) -> float:
    """How many times as long ``name`` takes as ``other``: the median over rounds of their ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))


def milliseconds(values: Sequence[float]) -> str:
    """The median, and the least in brackets."""
    return f"{statistics.median(values) * 1e3:.1f} ({min(values) * 1e3:.1f})"


def peak_memory(script: str, name: str, arguments: Sequence[str] = ()) -> float:
    """MiB that work ``name`` of a benchmark holds at most above its inputs, in a process of its own."""
    command = [sys.executable, script, "--peak", name, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.split()[-1])


def peak_of(work: Callable[[], object]) -> float:
    """MiB that this process holds at most while ``work`` runs, above what it held before (Linux)."""
    resident = Path("/proc/self/statm")
    before = int(resident.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    work()
    return max(0.0, (peak_bytes() - before) / MEBI)


def peak_bytes() -> int:
    """Largest resident size of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss of a child starts from what its parent held
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine(threads: int) -> dict[str, object]:
    """Processor, memory, versions and load: what a reader needs to judge a time."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    described = dict(line.split(":", 1) for line in lines if ":" in line)
    model = next((v.strip() for k, v in described.items() if k.strip() == "model name"), platform.machine())
    family = next((v.strip() for k, v in described.items() if k.strip() == "cpu family"), "unknown")
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": f"{model} (family {family}), {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


@dataclass(frozen=True)
class Table:
    """A titled table of text; the first column names the work."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in Markdown, padded so that it reads as plain text."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = [self._line(line, widths) for line in lines]
        rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
        return "\n".join([f"**{self.title}**", "", text[0], rule, *text[1:]])

    @staticmethod
    def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"


def report(tables: Sequence[Table], seconds: Mapping[str, object], arguments: argparse.Namespace) -> None:
    """Print the tables; with ``--json`` keep them with every single time and the machine."""
    for table in tables:
        print(table.markdown() + "\n", flush=True)
    if arguments.json:
        found = {
            "machine": machine(arguments.threads),
            "rounds": arguments.rounds,
            "tables": [asdict(table) for table in tables],
            "seconds": seconds,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
