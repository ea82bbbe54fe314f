import json

import pytest

from klkit.api.prompts import read_documents, read_prompts


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
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


def test_conversations_and_groups(tmp_path):
    talk = [{"role": "user", "content": "hello"}]
    lines = [{"messages": talk, "group": "chat"}, {"messages": "plain", "group": "text"}]
    source = write(tmp_path, "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    prompts = read_prompts(source, "messages")
    assert prompts.contents == (talk, "plain")
    assert prompts.groups == ("chat", "text")


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
        ("a.csv", "question\nok\n", "--column"),
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
