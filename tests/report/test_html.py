"""The page of a run: self-contained, escaped, and really opened in a browser where one is at hand."""

import html.parser
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import klkit
from klkit.models.automaton import random_automaton
from klkit.models.token_classes import NAMES
from klkit.report.html import SATURATED, embed, heat_map, level_of, render, shade_limit, upper_quantile, write_report
from klkit.report.record import RunFolder
from klkit.report.text import printable
from klkit.rng import numpy_stream, stream

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "\x1b[31m\x07",
    "\u202eright to left",
    '"><img src=x>',
    "a\nb",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    generator = stream(3, "page")
    p, q = (random_automaton(3, 5, generator=generator) for _ in range(2))
    path = tmp_path_factory.mktemp("run") / "run"
    klkit.estimate(p, q, samples=80, max_tokens=30, out=path)
    return RunFolder.open(path)


@pytest.fixture(scope="module")
def hostile_page(folder):
    texts = {token: HOSTILE[i % len(HOSTILE)] for i, token in enumerate(sorted(folder.tokens()))}
    result = folder.result()
    for row in result["breakdown"]["tokens"]:
        row["text"] = texts[row["token"]]
    result["provenance"]["models"]["p"]["name"] = HOSTILE[0]
    result["notes"] = [HOSTILE[0]]
    row = {"prompts": 1, "strings": 2, "nats_per_response": 1.0, "lower": "nan", "upper": "nan", "share": 1.0}
    result["breakdown"]["by_group"] = [{**row, "method": HOSTILE[3], "group": text} for text in HOSTILE]
    return render(result, folder.shown(), shade_limit(folder), texts, [])


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes


def test_the_page_loads_nothing(folder):
    page = (folder.path / "report.html").read_text()
    parsed = Tags()
    parsed.feed(page)
    assert not {"link", "img", "iframe", "object", "embed"} & set(parsed.tags)
    assert not [v for k, v in parsed.attributes if k in ("src", "href") and v and not v.startswith("#")]
    assert "default-src 'none'" in page


def test_tokens_that_are_markup_or_control_characters_stay_text(hostile_page):
    assert "<script>document.title" not in hostile_page
    assert "<img" not in hostile_page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", hostile_page)
    parsed = Tags()
    parsed.feed(hostile_page)
    assert parsed.tags.count("script") == 2  # the data block and the page's own


def test_the_heat_map_says_what_the_statistics_say(folder):
    few = folder.shown().statistics
    strings = heat_map(folder.shown(), shade_limit(folder), folder.tokens())
    assert len(strings) == 24
    assert [s["kl"] for s in strings] == sorted((s["kl"] for s in strings), reverse=True)
    sums = few.per_string(few.rows.kl)
    for s in strings:
        assert s["kl"] == pytest.approx(float(sums[s["number"]]))
        assert [t["t"] for t in s["top"]] == few.x.completion(s["number"]).tolist()
        for token in s["top"]:
            assert token["tp"][0][1] >= token["tp"][-1][1]


def test_tokens_are_shown_with_their_kinds(folder):
    result, few = folder.result(), folder.shown().statistics
    kind = {t: name for name, tokens in result["breakdown"]["token_classes"].items() for t in tokens}
    assert set(kind) == set(few.x.targets().tolist())
    strings = heat_map(folder.shown(), shade_limit(folder), folder.tokens(), kind)
    for s in strings:
        ids = few.x.completion(s["number"]).tolist()
        names = [kind[t] for t in ids]
        names[0] = "first" if names[0] != "end" else "end"
        assert [t["kind"] for t in s["tokens"]] == names
    page = (folder.path / "report.html").read_text()
    assert [name for name in NAMES if f'class="kind" value="{name}"' in page] == [
        name for name in NAMES if any(t["kind"] == name for s in strings for t in s["tokens"])
    ]
    assert page.count('data-k="') == few.x.decisions


def test_a_folder_of_an_earlier_version_makes_a_page(folder, tmp_path):
    """Without p's confidence, without the newer parts of the breakdown."""
    shutil.copytree(folder.path, tmp_path / "run")
    old = RunFolder.open(tmp_path / "run")
    tensors = load_file(old.path / "tensors.safetensors")
    del tensors["rows.confidence"]
    save_file(tensors, old.path / "tensors.safetensors")
    result = old.result()
    for name in ("by_confidence", "by_class", "by_group", "token_classes"):
        del result["breakdown"][name]
    result["breakdown"]["end"] = {name: result["breakdown"]["end"][name] for name in ("end_share", "content_share")}
    for row in result["breakdown"]["by_position"]:
        del row["lower"], row["upper"], row["method"]
    (old.path / "result.json").write_text(json.dumps(result))
    assert old.shown().statistics.rows.confidence.isnan().all()
    page = write_report(old).read_text()
    assert "token by token" in page
    assert "By confidence" not in page
    assert 'class="kind"' not in page
    assert "nan" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL).lower().split("<footer>")[0]


def test_bars_end_where_numbers_say():
    rows = [
        {"nats_per_response": 2.0, "lower": 1.0, "upper": 4.0},
        {"nats_per_response": 1.0, "lower": "nan", "upper": "nan"},
        {"nats_per_response": "nan", "lower": "nan", "upper": "nan"},
    ]
    assert [level_of(row, rows) for row in rows] == [
        "--value: 50.00%; --lower: 25.00%; --upper: 100.00%",
        "--value: 25.00%; --lower: 25.00%; --upper: 25.00%",
        "--value: 0.00%; --lower: 0.00%; --upper: 0.00%",
    ]


def test_infinite_divergence_makes_a_page(folder):
    shown, result = folder.shown(), folder.result()
    rows = shown.statistics.rows
    kl = rows.kl.clone()
    kl[0] = torch.inf
    shown = replace(shown, statistics=replace(shown.statistics, rows=replace(rows, kl=kl)))
    result["headline"]["value"] = "inf"
    assert "∞" in render(result, shown, shade_limit(folder), folder.tokens(), [])


@pytest.mark.parametrize("count", [1, 2, 3, 199, 201, 1000])
def test_the_scale_ends_at_a_quantile_of_all_decisions(count):
    values = numpy_stream(0, "shade", count).exponential(size=count)
    for size in (1, 7, 1000):
        parts = np.split(values, range(size, count, size))
        assert upper_quantile(parts, count, SATURATED) == pytest.approx(np.quantile(values, SATURATED), rel=1e-12)


def test_printable_and_embed():
    assert printable("\x1b]0;title\x07") == "\\x1b]0;title\\x07"
    assert printable("\u200b\ud800") == "\\u200b\\ud800"
    assert json.loads(embed(HOSTILE)) == HOSTILE
    assert "<" not in embed(HOSTILE)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_the_page_opens_in_a_browser(folder, hostile_page, tmp_path):
    def browse(page, *options):
        path = tmp_path / "page.html"
        path.write_text(page)
        command = [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", *options, path.as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    # The tooltip of the first token, shown by the page's own script, lands in the dumped document.
    focus = "<script>document.querySelector('.token').focus()</script></body>"
    dumped = browse((folder.path / "report.html").read_text().replace("</body>", focus), "--dump-dom")
    assert re.search(r'id="card"[^>]*display: block', dumped)
    assert re.search(r"KL [\d.e-]+ nats · drawn", dumped)
    box = "document.querySelector('.kind[value=first]')"
    clicked = f"<script>{box}.click()</script></body>"
    dumped = browse((folder.path / "report.html").read_text().replace("</body>", clicked), "--dump-dom")
    dimmed = re.findall(r'<span class="token[^"]* dim"[^>]*data-k="(\w+)"', dumped)
    wanted = re.findall(r'data-k="first"', (folder.path / "report.html").read_text())
    assert dimmed.count("first") == len(dimmed) == len(wanted) > 0
    assert "owned" not in re.search(r"<title>(.*?)</title>", browse(hostile_page, "--dump-dom")).group(1)
    picture = tmp_path / "page.png"
    browse((folder.path / "report.html").read_text(), f"--screenshot={picture}", "--window-size=1100,1400")
    assert picture.stat().st_size > 20_000
