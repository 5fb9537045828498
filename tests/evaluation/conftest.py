"""A byte-level tokenizer without merges, small random models, and models with known logits."""

import pytest
import torch
from torch import nn

import byte_models


@pytest.fixture(scope="session")
def tokenizer():
    """One token per byte, and an end-of-text token that comes last (256)."""
    return byte_models.tokenizer()


@pytest.fixture(scope="session")
def llama():
    """A function that builds one."""
    return byte_models.llama


@pytest.fixture(scope="session")
def model():
    return byte_models.llama()


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
