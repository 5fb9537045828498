"""Runs of the command line: in this process where that shows the same, in a fresh one else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rankine import cli


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The complaint: the last line on stderr, and the only one that is no progress."""
        *before, last = self.err.strip().splitlines()
        assert all(re.fullmatch(r".+: \d+ of \d+", line) for line in before), self.err
        assert last.startswith("rankine: ")
        return last.removeprefix("rankine: ")


@pytest.fixture
def rankine(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """rankine("compress", ...) in this process."""

    def run(*arguments: object) -> Ran:
        code = cli.run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    return run


@pytest.fixture
def fresh() -> Callable[..., Ran]:
    """The same in a fresh Python; `code` there replaces the command line."""

    def run(*arguments: object, code: str | None = None) -> Ran:
        program = ["-c", code] if code else ["-m", "rankine", *map(str, arguments)]
        done = subprocess.run(
            [sys.executable, *program],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            timeout=120,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random two-block Llama with a byte-level tokenizer, as a directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: n for n, c in enumerate([*alphabet, "<eos>"])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
        dtype="float32",
    )
    place = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(place)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Some kilobytes of text."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"def add_{n}(first, second): return first + {n} * second" for n in range(300)]
    file.write_text("\n".join(lines), "utf-8")
    return file


@pytest.fixture(scope="session")
def small(text) -> list[str]:
    """Options that keep a run small and offline."""
    return [
        *("--calibration", str(text), "--evaluation", str(text)),
        *("--tokens", "4x32", "--eval-tokens", "200", "--threads", "1"),
    ]
