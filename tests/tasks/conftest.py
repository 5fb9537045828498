"""A tokenizer trained on the spot and a small random Llama: no downloads."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import byte_models

LINES = [
    f"def add_{n}(first, second): return first + {n} * second  # über {n} €" for n in range(400)
]


@pytest.fixture(scope="session")
def lines():
    """400 documents of one line each, some of their characters outside ASCII."""
    return LINES


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE of 400 tokens with an end-of-text token and nothing added by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>", "<bos>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


@pytest.fixture(scope="session")
def framing_tokenizer(tokenizer):
    """The same one, putting <bos> before every document."""
    bpe = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", bos_token="<bos>")


@pytest.fixture(scope="session")
def model():
    """A random two-block Llama with a context of 64."""
    return byte_models.llama(vocab_size=400, eos_token_id=0, pad_token_id=0)
