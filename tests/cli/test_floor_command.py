"""klkit floor: every floor of a model in one table."""

import json
import re


def test_every_floor_in_a_table_and_a_sentence(run):
    code, out, err = run("floor", "klkit:docs", "--prompts", "klkit:docs", "--max-tokens", "8", "--samples", "4")
    assert code == 0, err
    for kind in ("decoding", "batch shape", "noise", "dtype"):
        assert re.search(rf"^{kind} +\d", out, re.M), out
        assert re.search(rf"^{kind}: ", out, re.M), out
    assert "float32 against bfloat16" in out
    assert "more samples do not average it out" in re.sub(r"\s+", " ", out)
    assert max(map(len, out.splitlines())) <= 80


def test_json_and_nothing_else(run):
    code, out, err = run("floor", "klkit:docs,dtype=bfloat16", "--max-tokens", "4", "--samples", "3", "--json", "-")
    assert code == 0, err
    record = json.loads(out)
    assert record["model"] == "klkit:docs,dtype=bfloat16"
    assert [floor["kind"] for floor in record["floors"]] == ["decoding", "batch shape", "noise", "dtype"]
    assert all(floor["n"] == 3 and floor["unit"] == "nats" for floor in record["floors"])


def test_bad_input(run):
    for arguments, expected in (
        (["klkit:absent"], "packaged models"),
        (["klkit:docs", "--samples", "0"], "at least 1 for samples"),
        (["klkit:docs", "--max-tokens", "0"], "at least 1 for max_tokens"),
        (["klkit:docs", "--prompts", "absent.txt"], "nothing there"),
    ):
        code, _, err = run("floor", *arguments)
        assert code == 2
        assert expected in err
