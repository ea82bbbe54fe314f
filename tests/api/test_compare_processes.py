"""A comparison by several processes is that of one, to the last digit, and is resumed by any number of them."""

import json
import os
from pathlib import Path

import pytest
from tests.api.test_rounds import at, notes_of_two, results
from tests.api.test_run import Interrupter

import klkit
from klkit.train.processes import open_processes

MODELS = ("klkit:docs", ["klkit:docs-int4", "klkit:docs-lora", "temperature=0.8"])
CASES = {
    "strings": {"samples": 36, "max_tokens": 6, "batch_size": 8, "both": True},
    "text": {"text": "text.txt", "context": 16, "batch_size": 4},
}


def in_two(folder):
    """What each of two processes does."""
    os.chdir(folder)
    with open_processes() as processes:
        noted = {}
        for name, options in CASES.items():
            noted[name] = klkit.compare(*MODELS, out=f"two/{name}", processes=processes, **options).to_dict()
        try:
            klkit.compare(*MODELS, out="begun", processes=processes, observe=Interrupter(8), **CASES["strings"])
        except KeyboardInterrupt:
            noted["interrupted"] = True
        Path(f"noted-{processes.rank}.json").write_text(json.dumps(noted))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    with at(folder):
        for name, options in CASES.items():
            klkit.compare(*MODELS, out=f"one/{name}", **options)
        noted = notes_of_two("tests.api.test_compare_processes", folder)
        klkit.compare(*MODELS, out="begun", resume=True, **CASES["strings"])
        yield folder, noted


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_ranking_of_one(ran, name):
    folder, noted = ran
    one, two = results(folder, f"one/{name}", f"two/{name}")
    assert one == two
    assert noted[0][name] == noted[1][name] == two
    pages = [sorted(p.name for p in (folder / which / name / "candidates").iterdir()) for which in ("one", "two")]
    assert pages[0] == pages[1]
    assert len(pages[0]) == 3


def test_what_two_began_one_ends(ran):
    folder, noted = ran
    assert all(found["interrupted"] for found in noted)
    one, begun = results(folder, "one/strings", "begun")
    assert one == begun
