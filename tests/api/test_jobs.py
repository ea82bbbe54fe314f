import json
import os
from pathlib import Path

import pytest

from klkit.api.jobs import Job, cores, finish, openings
from klkit.api.prompts import read_prompts
from klkit.zoo import grammar
from klkit.zoo.optimum import follow


def square(settings, folder):
    """Notes who did it, so that a test can see what was done again."""
    with (Path(folder).parent / "log").open("a") as log:
        log.write(f"{settings['x']} {os.getpid()}\n")
    if settings["x"] < 0:
        raise ValueError("negative")
    return {"square": settings["x"] ** 2}


def jobs(*numbers):
    return [Job(f"n{x}", {"x": x}) for x in numbers]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_nothing_is_done_twice(tmp_path, workers):
    folder, seen = tmp_path / "runs", []
    found = finish(square, jobs(3, 1), folder, workers=workers)
    assert found == [{"square": 9}, {"square": 1}]
    more = finish(square, jobs(1, 2, 3), folder, observe=lambda *state: seen.append(state))
    assert more == [{"square": 1}, {"square": 4}, {"square": 9}]
    assert [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()].count("1") == 1
    assert [(done, total, left) for done, total, left in seen] == [(3, 3, 0.0)]
    if workers == 2:
        assert str(os.getpid()) not in (tmp_path / "log").read_text().split("\n")[0].split()


def test_what_was_done_before_a_failure_is_kept(tmp_path):
    with pytest.raises(ValueError, match="negative"):
        finish(square, jobs(2, -1, 3), tmp_path / "runs")
    assert sorted(file.name for file in (tmp_path / "runs").iterdir()) == ["n2.json"]


def test_results_of_other_settings_are_never_taken(tmp_path):
    finish(square, jobs(2), tmp_path)
    with pytest.raises(ValueError, match="same settings"):
        finish(square, [Job("n2", {"x": 5})], tmp_path)
    assert json.loads((tmp_path / "n2.json").read_text())["result"] == {"square": 4}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "log").touch()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="choose another --out"):
        finish(square, jobs(2), tmp_path / "file")
    assert cores() >= 1


def test_openings_are_new_and_the_grammar_can_go_on_from_them():
    held_out = [str(text) for text in read_prompts("klkit:reviews").contents]
    found = openings(256, seed=0, without=held_out)
    assert len(set(found)) == 256
    assert not set(found) & set(held_out)
    law = grammar.reviews()
    for text in [*found, *held_out]:
        follow(law, text)
