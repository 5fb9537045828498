"""Reading text: every kind of source, lazily, and one sentence for every mistake."""

import gzip
import json

import pytest

from rankine.errors import UserError
from rankine.tasks import text
from rankine.tasks.text import passages


def read(source, **kwargs):
    return [p.text for p in passages(source, **kwargs)]


def test_strings():
    assert read(["a b", "", "c"]) == ["a b", "c"]


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n", encoding="utf-8")
    found = list(passages(path))
    assert [p.text for p in found] == ["one\ntwo\n"]
    assert found[0].final


@pytest.mark.parametrize("line", ["línea número {n}\n", "{n} ", "no break at all"])
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_large_text_comes_in_pieces_that_add_up(tmp_path, monkeypatch, line, suffix):
    monkeypatch.setattr(text, "BLOCK", 101)  # odd: characters and lines straddle blocks
    whole = "".join(line.format(n=n) for n in range(200))
    path = tmp_path / f"a{suffix}"
    raw = whole.encode()
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    found = list(passages(str(path)))
    assert "".join(p.text for p in found) == whole
    assert len(found) > 3
    assert [p.final for p in found] == [False] * (len(found) - 1) + [True]
    if "\n" in line:
        assert all(p.text.endswith("\n") for p in found)


def test_a_large_file_is_read_only_as_far_as_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 1 << 10)
    path = tmp_path / "a.txt"
    path.write_bytes(b"good line\n" * 10_000 + b"\xff\xfe broken far behind\n")
    stream = passages(path)
    assert "good line" in next(stream).text
    with pytest.raises(UserError, match="UTF-8"):
        list(stream)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_rows(tmp_path, suffix):
    rows = [{"text": "a", "n": 1}, {"text": "", "n": 2}, {"text": "é", "n": 3}]
    path = tmp_path / f"a{suffix}"
    write_rows(path, rows)
    assert read(path) == ["a", "é"]


def write_rows(path, rows):
    if path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    lines = "\n".join(map(json.dumps, rows)) if ".jsonl" in path.name else json.dumps(rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def test_only_string_column_is_taken(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"body": "hello", "n": 1}])
    assert read(path) == ["hello"]
    write_rows(path, [{"question": "q", "answer": "a"}])
    assert read(path, column="answer") == ["a"]
    with pytest.raises(UserError, match="answer, question"):
        read(path)


def test_lone_surrogates_do_not_reach_the_tokenizer(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}')
    assert read(path) == ["a?b"]


MISTAKES = {
    "empty.txt": (b"", "empty"),
    "blank.txt": (b"\n  \n", "found none"),
    "binary.txt": (b"ab\0\1", "binary"),
    "latin.txt": ("caf\xe9 au lait".encode("latin-1"), "UTF-8"),
    "cut.txt": ("é".encode()[:1], "UTF-8"),
    "latin.jsonl": (b'{"text": "caf\xe9"}', "UTF-8"),
    "broken.jsonl": (b'{"text": "a"}\n{"text":', "line 2"),
    "number.jsonl": (b'{"text": 3}', "found a int"),
    "list.jsonl": (b"[1, 2]", "found a list"),
    "fake.parquet": (b"no parquet at all", "parquet"),
    "fake.txt.gz": (b"no gzip at all", "cannot read"),
    "cut.txt.gz": (gzip.compress(b"hello" * 100)[:-9], "cannot read"),
    "a.docx": (b"PK", "ending in"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path, name):
    content, sentence = MISTAKES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or path.name in str(caught.value)


def test_wrong_column_lists_the_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"text": "a", "label": "b"}])
    with pytest.raises(UserError, match=r'"body".*label, text'):
        read(path, column="body")


def test_directories_and_missing_files(tmp_path):
    with pytest.raises(UserError, match="directory"):
        read(tmp_path)
    with pytest.raises(UserError, match="found nothing there"):
        read(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="found nothing there"):
        read("none.txt")
    with pytest.raises(UserError, match="list of texts"):
        read([])
    with pytest.raises(UserError, match="hub data set"):
        read("what is this?")


def test_a_local_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("x")
    with pytest.raises(UserError, match="ending in"):
        read("owner/name")


def test_hub_data_sets_stream(tmp_path, monkeypatch):
    import datasets

    rows = {"train": [{"text": "seen"}], "test": [{"text": "held out"}]}
    asked = []

    def load(repo, config, streaming):
        asked.append((repo, config, streaming))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("owner/name:small", split="calibration") == ["seen"]
    assert read("owner/name", split="evaluation") == ["held out"]
    assert asked == [("owner/name", "small", True), ("owner/name", None, True)]


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch):
    import datasets

    def load(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"no hub data set in reach: no route$"):
        read("owner/name")


def test_embedded_splits_share_no_text():
    calibration, evaluation = set(read("embedded")), set(read("embedded", split="evaluation"))
    assert len(calibration) > 50
    assert len(evaluation) > 30
    assert not calibration & evaluation
    assert set(read("embedded", split="train")) == calibration
