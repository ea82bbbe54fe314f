import json

import pytest

from klkit.api.prompts import read_documents, read_prompts


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def test_each_format_gives_the_same_prompts(tmp_path):
    import pyarrow
    from pyarrow import parquet

    wanted = ("first, with a comma", 'second "quoted"', "dritte – Zeile")
    txt = write(tmp_path, "a.txt", "\n".join(wanted) + "\n\n")
    jsonl = write(tmp_path, "a.jsonl", "".join(json.dumps({"prompt": w}) + "\n" for w in wanted))
    whole = write(tmp_path, "a.json", json.dumps([{"prompt": w} for w in wanted]))
    rows = "prompt,id\n" + "".join('"' + w.replace('"', '""') + '",1\n' for w in wanted)
    table = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"prompt": list(wanted)}), table)
    for source in (txt, jsonl, whole, write(tmp_path, "a.csv", rows), table):
        assert read_prompts(source).contents == wanted, source


def test_conversations_beside_texts(tmp_path):
    talk = [{"role": "user", "content": "hello"}]
    lines = [{"messages": talk, "source": "chat"}, {"messages": "plain", "source": "text"}]
    source = write(tmp_path, "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert read_prompts(source, "messages").contents == (talk, "plain")


def test_only_line_ends_end_lines(tmp_path):
    """What str.splitlines splits at, beside the ends of lines, is text like any other."""
    wanted = ("a\u2028b\u2029c", "d\x85e", "f\x0cg\x0bh", "i\x1cj\x1dk\x1el")
    txt = write(tmp_path, "a.txt", "\r\n".join(wanted))
    lines = write(tmp_path, "a.jsonl", "".join(json.dumps({"prompt": w}, ensure_ascii=False) + "\r\n" for w in wanted))
    rows = write(tmp_path, "a.csv", "prompt,id\r\n" + "".join(f"{w},1\r\n" for w in wanted))
    tabs = write(tmp_path, "a.tsv", "id\tprompt\n" + "".join(f"1\t{w}\n" for w in wanted))
    for source in (txt, lines, rows, tabs):
        assert read_prompts(source).contents == wanted, source
    assert read_documents(write(tmp_path, "b.txt", "one\x0c\r\ntwo\u2028")) == ["one\x0c\ntwo\u2028"]


def test_quoted_fields_run_over_lines(tmp_path):
    rows = 'prompt,id\n"one\n\ntwo\r\nthree",1\n\n"four",2\n'
    assert read_prompts(write(tmp_path, "a.csv", rows)).contents == ("one\n\ntwo\r\nthree", "four")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"prompt": "ok"}\n{"prompt": broken\n', "line 2"),
        ("a.jsonl", '{"prompt": "ok"}\n{"text": "other"}\n', "line 2"),
        ("a.jsonl", '{"prompt": "ok"}\n\n{"prompt": ""}\n', "line 3"),
        ("a.jsonl", '{"prompt": [{"role": "user"}]}\n', "line 1"),
        ("a.jsonl", "", "none"),
        ("a.txt", "  \n\n", "none"),
        ("a.csv", "prompt,id\nok,1\ntoo,many,fields\n", "line 3"),
        ("a.csv", 'prompt,id\n"two\nlines",1\n"three\n\nlines",2,3\n', "line 4"),
        ("a.csv", 'prompt,id\n"two\nlines",1\n\n"never closed,2\nmore,3\n', "line 5"),
        ("a.csv", 'prompt,id\n"two\nlines",1\n" \n",2\n', "line 4"),
        ("a.csv", "question\nok\n", "--column"),
        ("a.jsonl", '{"prompt": "o\u2028k"}\n{"prompt": "o\x85k"}\n{"prompt": broken\n', "line 3"),
        ("a.txt", "", "none"),
        ("a.csv", "", "none"),
        ("a.json", "{}", "list"),
        ("a.parquet", "not parquet", "parquet"),
    ],
)
def test_bad_files_name_the_line(tmp_path, name, text, expected):
    with pytest.raises(ValueError, match="expected") as error:
        read_prompts(write(tmp_path, name, text))
    assert expected in str(error.value)


def test_missing_files_and_unknown_packaged_prompts(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing there"):
        read_prompts(str(tmp_path / "absent.txt"))
    with pytest.raises(FileNotFoundError, match="a folder"):
        read_prompts(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="klkit:docs"):
        read_prompts("klkit:absent")
    assert len(read_prompts("klkit:docs")) >= 32


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(ValueError, match="UTF-8"):
        read_prompts(str(path))


def test_a_text_file_is_one_document_and_records_are_several(tmp_path):
    assert read_documents(write(tmp_path, "a.txt", "one\n\ntwo\n")) == ["one\n\ntwo\n"]
    lines = '{"text": "one"}\n{"text": "two"}\n'
    assert read_documents(write(tmp_path, "a.jsonl", lines)) == ["one", "two"]
    with pytest.raises(ValueError, match="empty"):
        read_documents(write(tmp_path, "b.txt", " \n"))


def test_groups_come_with_the_prompts(tmp_path):
    lines = [{"prompt": "one", "group": "a", "kind": 1}, {"prompt": "two", "group": " b ", "kind": 2}]
    source = write(tmp_path, "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert read_prompts(source).groups == ("a", "b")
    assert read_prompts(source, group_column="kind").groups == ("1", "2")
    assert read_prompts(source, "group").groups is None  # the field holds the prompts themselves
    rows = write(tmp_path, "a.csv", "prompt,group\none,a\ntwo,b\n")
    assert read_prompts(rows).groups == ("a", "b")
    assert read_prompts(write(tmp_path, "b.csv", "prompt,group\none,\ntwo,\n")).groups is None
    assert read_prompts(write(tmp_path, "a.txt", "one\ntwo\n")).groups is None
    assert len(set(read_prompts("klkit:docs").groups)) > 1
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(lines), tmp_path / "a.parquet")
    assert read_prompts(str(tmp_path / "a.parquet")).groups == ("a", "b")


@pytest.mark.parametrize(
    ("name", "text", "column", "expected"),
    [
        ("a.jsonl", '{"prompt": "a", "group": "x"}\n\n{"prompt": "b"}\n', None, "line 3"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "group": "x"}\n', None, "line 1"),
        ("a.jsonl", '{"prompt": "a", "group": "x"}\n{"prompt": "b", "group": null}\n', None, "line 2"),
        ("a.jsonl", '{"prompt": "a", "group": ["x"]}\n', None, "text or a number"),
        ("a.csv", "prompt,group\na,x\nb, \n", None, "line 3"),
        ("a.csv", "prompt,group\na,x\n", "kind", "'kind' of line 2"),
        ("a.txt", "a\nb\n", "kind", "--group-column"),
    ],
)
def test_groups_for_some_prompts_only_are_refused(tmp_path, name, text, column, expected):
    with pytest.raises(ValueError, match="expected") as error:
        read_prompts(write(tmp_path, name, text), group_column=column)
    assert expected in str(error.value)
