"""Runs of the command line in this process, and what they need: shared by several rooms."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: n for n, c in enumerate([*alphabet, "<eos>"])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


def write_tiny(place: Path, **overrides: object) -> Path:
    """A random two-block Llama with a byte-level tokenizer, as a directory."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 256,
        "dtype": "float32",
    }
    LlamaForCausalLM(LlamaConfig(**{**fields, **overrides})).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


def write_text(file: Path) -> Path:
    """Some kilobytes of text."""
    lines = [f"def add_{n}(first, second): return first + {n} * second" for n in range(300)]
    file.write_text("\n".join(lines), "utf-8")
    return file


def small_run(text: Path) -> list[str]:
    """Options that keep a run small and offline."""
    return [
        *("--calibration", str(text), "--evaluation", str(text)),
        *("--tokens", "4x32", "--eval-tokens", "200", "--threads", "1"),
    ]
