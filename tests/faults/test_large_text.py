"""Large texts are read as streams: memory and time follow what is asked for, not the file."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

import byte_models
from rankine import UserError
from rankine.tasks import LanguageModelling, text
from rankine.tasks.text import passages

LINE = "def add_{n}(first, second): return first + {n} * second\n"
CHUNK = "".join(LINE.format(n=n) for n in range(20_000)).encode()  # about a megabyte


MB = 1 << 20


class Growth:
    """How far the memory of this process rose above where it stood: `with Growth() as grown`."""

    def __enter__(self) -> Growth:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        except OSError as error:
            pytest.skip(f"needs the kernel's high-water mark ({error})")
        self.before = self.mark()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self.mark() - self.before

    def mark(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def write_plain(file, megabytes):
    with file.open("wb") as out:
        for _ in range(megabytes):
            out.write(CHUNK)


def write_rows(file, megabytes):
    row = json.dumps({"text": CHUNK.decode()}).encode() + b"\n"
    with file.open("wb") as out:
        for _ in range(megabytes):
            out.write(row)


def write_zipped(file, megabytes):
    member = gzip.compress(CHUNK)  # an archive may have several
    with file.open("wb") as out:
        for _ in range(megabytes):
            out.write(member)


WRITERS = {"a.txt": write_plain, "a.jsonl": write_rows, "a.txt.gz": write_zipped}


def windows(file):
    task = LanguageModelling(
        byte_models.tokenizer(), file, file, sequences=8, length=128, max_tokens=2_000
    )
    return len(task.windows("calibration")), len(task.windows("evaluation"))


@pytest.mark.parametrize("name", WRITERS)
def test_a_hundred_megabytes_cost_no_more_than_one(name, tmp_path):
    """A few thousand tokens are wanted of it."""
    small, large = tmp_path / f"small-{name}", tmp_path / name
    WRITERS[name](small, 1)
    WRITERS[name](large, 100)
    windows(small)  # everything that is made once is made
    with Growth() as one:
        assert windows(small)[0] == 8
    with Growth() as hundred:
        assert windows(large)[0] == 8
    assert hundred.bytes < one.bytes + 48 * MB  # not half of it is ever there
    assert hundred.bytes < 128 * MB


@pytest.mark.slow
def test_a_gigabyte_is_read_to_its_end_in_a_few_megabytes(tmp_path):
    """All of it, as training does: without a tokenizer, which would take minutes."""
    write_plain(tmp_path / "a.txt", 1000)
    size = (tmp_path / "a.txt").stat().st_size
    assert size > 1_000_000_000
    next(passages(tmp_path / "a.txt"))
    with Growth() as grown:
        found = sum(len(passage.text) for passage in passages(tmp_path / "a.txt"))
    assert found == size
    assert grown.bytes < 16 * MB


def test_training_text_is_a_stream_too(tmp_path):
    write_plain(tmp_path / "a.txt", 100)
    task = LanguageModelling(
        byte_models.tokenizer(), tmp_path / "a.txt", "embedded", sequences=4, length=64
    )
    batches = iter(task.batches("train"))
    next(batches)
    with Growth() as grown:
        assert all(batch["input_ids"].shape[1] == 64 for batch, _ in zip(batches, range(10)))
    assert grown.bytes < 48 * MB


def test_the_measure_would_notice():
    """Memory that is really taken, and given back, shows."""
    with Growth() as grown:
        assert len(bytes(range(256)) * (100 * MB // 256)) == 100 * MB
    assert grown.bytes > 90 * MB


def test_one_enormous_line(tmp_path, monkeypatch):
    """Text without any line end is cut; a row of JSON cannot be."""
    (tmp_path / "a.txt").write_bytes(b"x" * (3 << 20))
    assert max(len(p.text) for p in passages(tmp_path / "a.txt")) <= 2 * text.BLOCK
    monkeypatch.setattr(text, "LINE", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * (2 << 20) + b'"}')
    with pytest.raises(UserError, match="found more in line 1"):
        list(passages(tmp_path / "a.jsonl"))
    monkeypatch.setattr(text, "WHOLE", 1 << 20)
    (tmp_path / "a.json").write_bytes(b'["' + b"x" * (2 << 20) + b'"]')
    with pytest.raises(UserError, match=r"write it as \.jsonl"):
        list(passages(tmp_path / "a.json"))


def test_a_long_row_is_one_document_in_pieces(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": CHUNK.decode()}) + '\n{"text": "end"}\n')
    found = list(passages(tmp_path / "a.jsonl"))
    assert "".join(p.text for p in found) == CHUNK.decode() + "end"
    assert [p.final for p in found].count(True) == 2
    assert max(len(p.text) for p in found) <= text.BLOCK


def test_a_bomb_of_zeros_is_no_text(tmp_path):
    """Ten kilobytes that unfold to ten megabytes."""
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(bytes(10 << 20)))
    with pytest.raises(UserError, match="found a binary file"):
        list(passages(tmp_path / "a.txt.gz"))


@pytest.mark.parametrize(
    "line", ['{"text": ' * 5000, "[" * 100_000, '{"text": ' + "9" * 5000 + "}", '{"text": 1e999}']
)
def test_rows_of_nonsense(line, tmp_path):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(UserError, match="expected") as caught:
        list(passages(tmp_path / "a.jsonl"))
    assert "\n" not in str(caught.value)


def test_a_broken_archive(tmp_path):
    whole = gzip.compress(CHUNK)
    (tmp_path / "a.txt.gz").write_bytes(whole[:1000] + bytes(100) + whole[1100:])
    with pytest.raises(UserError, match="cannot read"):
        list(passages(tmp_path / "a.txt.gz"))
