"""A tokenizer of bytes, a small random Llama that speaks it, and both as a directory."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end-of-text token that comes last (256)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: n for n, c in enumerate([*alphabet, "<eos>"])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


def llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """Two blocks, grouped heads, a context of 64."""
    torch.manual_seed(seed)
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
    return LlamaForCausalLM(LlamaConfig(**{**fields, **overrides})).eval()


def write(place: Path, **overrides: object) -> Path:
    """Model and tokenizer, as a directory."""
    llama(**overrides).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place
