"""A byte-level tokenizer without merges, small random models, and models with known logits."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer():
    """One token per byte, and an end-of-text token that comes last (256)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: n for n, c in enumerate([*alphabet, "<eos>"])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


def build_llama(seed=0, **changes):
    """A random two-block Llama with a context of 64 over 257 tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
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
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def llama():
    """A function that builds one."""
    return build_llama


@pytest.fixture(scope="session")
def model():
    return build_llama()


class Oracle(nn.Module):
    """Logits that are a function of the tokens seen so far: `rule(ids) → (b, t, v)`."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, input_ids, attention_mask=None):
        return self.rule(input_ids)


@pytest.fixture(scope="session")
def oracle():
    """The class of models with known logits."""
    return Oracle


@pytest.fixture(scope="session")
def uniform():
    """All 257 tokens equally likely."""
    return Oracle(lambda ids: torch.zeros(*ids.shape, 257))
