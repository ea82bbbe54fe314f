import pytest

from klkit.report.pages import Heading, Items, Picture, Table, page, plain_text

BLOCKS = [
    "A paragraph of <b>text</b> " + "that goes on " * 10,
    Heading("What holds"),
    Items(["one " * 30, "two"]),
    Table(["loss", "KL"], [["fkl", "0.5"], ["akl", "12.25"]]),
    Picture(b"\x89PNG", "curves.png", "What it & that show."),
]


def test_text_fits_a_terminal_and_says_everything():
    text = plain_text(BLOCKS)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("What holds\n==========", "- two", "fkl     0.5\nakl   12.25", "[curves.png] What it & that show."):
        assert part in text


def test_the_page_is_whole_and_escapes_what_it_is_given():
    found = page("Losses & <laws>", BLOCKS)
    assert "<h1>Losses &amp; &lt;laws&gt;</h1>" in found
    assert "&lt;b&gt;text&lt;/b&gt;" in found
    assert "<td>akl</td><td>12.25</td>" in found
    assert 'src="data:image/png;base64,iVBORw==" alt="What it &amp; that show."' in found
    assert "script" not in found


def test_ragged_tables_are_refused():
    with pytest.raises(ValueError, match="2 cells in every row"):
        Table(["a", "b"], [["1", "2"], ["1"]])
