"""Every benchmark runs at tiny sizes, and its tables find their way into the page."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def among_the_benchmarks(monkeypatch: pytest.MonkeyPatch):
    """Scripts find their common modules as if they were run from the shell; nothing of it stays."""
    before, threads = set(sys.modules), torch.get_num_threads()
    monkeypatch.setenv("KLKIT_BACKEND", "eager")  # which is put back to what it was
    monkeypatch.syspath_prepend(str(FOLDER))
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    own = {path.stem for path in FOLDER.glob("*.py")}
    for name in set(sys.modules) - before:
        if name in own:
            del sys.modules[name]


@pytest.mark.parametrize(
    "name", ["logits", "linear", "adaptive", "distill", "sampling", "pipeline", "compare", "trl_step"]
)
def test_a_benchmark_runs_and_its_tables_reach_the_page(name, tmp_path, monkeypatch, capsys):
    if name == "trl_step":
        pytest.importorskip("trl", reason="TRL is not installed: make test-trl installs it and runs this")
    results = tmp_path / f"{name}.json"
    wanted = ["--quick", "--rounds", "2", "--threads", "1", "--json", str(results)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *wanted])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert stop.value.code in (0, None)
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 100
    found = json.loads(results.read_text())
    assert found["rounds"] == 2
    assert found["machine"]["threads"] == 1
    filled = runpy.run_path(str(FOLDER / "page.py"))["filled"]
    page = filled(f"# Page\n\n<!-- {name} -->\nstale\n<!-- end -->\n\n<!-- other -->\nkept\n<!-- end -->\n", tmp_path)
    assert "stale" not in page
    assert "kept" in page
    for table in found["tables"]:
        assert table["title"] in page
        assert all(row[0] in page and len(row) == len(table["columns"]) for row in table["rows"])


def test_ratios_are_medians_within_rounds():
    common = runpy.run_path(str(FOLDER / "common.py"))
    seconds = {"a": [2.0, 40.0, 3.0], "b": [1.0, 10.0, 1.0]}
    assert common["ratio"](seconds, "a", "b") == 3.0
    order: list[str] = []
    work = {name: (lambda: None, lambda name=name: order.append(name)) for name in "ab"}
    assert {len(taken) for taken in common["side_by_side"](work, 2).values()} == {2}
    assert "".join(order) == "baabba"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_is_what_the_work_holds():
    peak = runpy.run_path(str(FOLDER / "common.py"))["peak_of"](lambda: torch.ones(100 << 18).sum())
    assert 95 < peak < 140
