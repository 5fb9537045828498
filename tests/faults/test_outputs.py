"""What is written and printed: no word of a stranger's becomes code, markup or a command to the
terminal; the code in a checkpoint is a constant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import rankine as library
import tiny_models as tiny
from rankine import report
from rankine.limits import printable

CODE = Path(library.__file__).parent / "checkpoint" / "modeling_rankine.py"
EVIL = "<script>alert(1)</script>[red]\x1b[2J`x`|](http://x) import os; os.system('x')"


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.opt, tiny.qwen2])
def test_the_code_in_every_checkpoint_is_the_same_bytes(build, tmp_path):
    model = build()
    result = library.compress(model, method="svd", keep=0.7, task=tiny.tokens(), evaluate=False)
    library.save(model, tmp_path / EVIL.replace("/", "")[:80], result.patch, cost=EVIL)
    (written,) = tmp_path.glob("*/*.py")
    assert written.read_bytes() == CODE.read_bytes()


def test_what_a_checkpoint_carries_as_code_is_not_handed_on(directory, small, rankine, tmp_path):
    for name in ("modeling_rankine.py", "evil.py"):
        (directory / name).write_text("raise SystemExit('not ours')\n")
    run = ["compress", directory, "--method", "rtn", "--evaluate", "no", *small]
    assert rankine(*run, "-o", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "modeling_rankine.py").read_bytes() == CODE.read_bytes()
    assert [file.name for file in (tmp_path / "out").rglob("*.py")] == ["modeling_rankine.py"]


def test_a_module_whose_names_are_markup_or_commands(tmp_path):
    """Paths of modules reach tables, reports and errors."""
    net, batches = nn.Sequential(), [torch.randn(8, 16)]
    net.add_module("<script>alert(1)</script>", nn.Linear(16, 16))
    out = tmp_path / "out"
    library.compress(net, method="svd_llm", keep=0.7, calibration=batches, output=out)
    assert "<script>alert" not in (out / "report.html").read_text()
    net = nn.Sequential()
    net.add_module("\x1b[2J[red]", nn.Linear(16, 16))
    net[0].weight.data.fill_(float("nan"))
    with pytest.raises(library.UserError, match="red") as caught:
        library.compress(net, method="svd_llm", keep=0.7, calibration=batches)
    assert "\x1b" not in printable(str(caught.value))


def evil_report():
    row = {"name": EVIL, "kind": "result", "method": EVIL, "bytes": 10, "note": EVIL}
    target = {"id": EVIL, "path": EVIL, "role": EVIL, "shape": [2, 2], "bits": 8, "keep": 0.5}
    return {
        "schema": "1.0",
        "model": {"name": EVIL, "family": EVIL, "dtype": EVIL},
        "rows": [row],
        "targets": [target],
        "warnings": [EVIL],
        "samples": [{"prompt": EVIL, "before": EVIL, "after": EVIL}],
        "recipe": {"model": EVIL},
        "versions": {EVIL: EVIL},
    }


def test_reports_show_what_they_are_given(tmp_path, rankine):
    report.write(evil_report(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    assert 'href="http://x' not in page
    assert "\x1b" not in report.plain_table(evil_report()["rows"])
    outside_code = report.cost(evil_report()).split("```")[::2]
    assert not any("<script>" in part for part in outside_code)
    assert rankine("report", tmp_path).code == 0
    assert json.loads((tmp_path / "report.json").read_text())["model"]["name"] == EVIL


def test_what_a_model_says_cannot_command_the_terminal(tiny, rankine, monkeypatch):
    """A model can be trained to write escape sequences."""
    ran = rankine("generate", tiny, "-p", f"{EVIL}\n\tx", "--max-tokens", "8")
    assert ran.code == 0
    assert "\x1b" not in ran.out
    assert "?[2J" in ran.out
    assert "\n\tx" in ran.out
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    escape = tokenizer("\x1b[2J", add_special_tokens=False)["input_ids"]
    assert "\x1b" in tokenizer.decode(escape)  # it does reach the text: what prints must stop it
    found = rankine("generate", tiny, "-p", EVIL, "--max-tokens", "1", "--json")
    assert "\x1b" not in found.out
    assert json.loads(found.out)["prompt"] == EVIL


def test_errors_quote_without_obeying(rankine, tmp_path):
    for arguments in (
        ("inspect", tmp_path / "\x1b[2J"),
        ("plan", "embedded", "--method", "\x1b[2J\u202e", "--keep", "0.5"),
        ("plan", "embedded", "--recipe", tmp_path / "\x1b]0;x\x07"),
    ):
        ran = rankine(*arguments)
        assert ran.code == 2
        assert ran.sentence.isprintable()
    ran = rankine("plan", "./\x1b[31m", "--method", "svd", "--keep", "0.5", "--log-json")
    assert json.loads(ran.err.splitlines()[-1])["level"] == "error"
    assert "\x1b" not in ran.err


@pytest.mark.parametrize("char", ["\x1b", "\x07", "\x9b", "\r", "\u202e", "\u2066", "\x7f", "\0"])
def test_printable(char):
    assert printable(f"a{char}b\n\tc") == "a?b\n\tc"


def test_printable_leaves_the_languages_alone():
    assert printable(text := "naïve 日本 \N{GREEK SMALL LETTER SIGMA} → ≤ 🙂") == text
