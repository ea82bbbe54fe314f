"""Everything that the documentation shows is run: Python blocks, `sh` blocks of klkit commands, examples."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from klkit.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {number + 1}", "exec"), namespace)
    assert page.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_klkit_commands_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] != "klkit":
                continue
            # A documented command may take a minute at full size; here it draws fewer strings.
            if words[1] == "estimate" and "--samples" not in words and "--text" not in words:
                words += ["--samples", "4" if "--prompts" in words else "32"]
            if words[1] == "reproduce":
                small = ["--pool", "20", "--count", "3", "--max-tokens", "10"]
                words += small if words[2] == "estimators" else ["--smoke"]
            if words[1] in ("zoo", "demo"):
                continue  # built and run in tests of their own
            with pytest.raises(SystemExit) as stop:
                main(words[1:])
            assert stop.value.code in (0, None), (line, capsys.readouterr().err)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_within_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(example, tmp_path, monkeypatch, capsys):
    if example.stem.endswith("_trl"):
        pytest.importorskip("trl", reason="TRL is not installed: make test-trl installs it and runs this")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()
