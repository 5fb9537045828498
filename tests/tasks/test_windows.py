"""Windows: every token once, every byte counted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankine.tasks.text import Passage
from rankine.tasks.windows import cut, frame, take, token_bytes, tokenize


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 90), st.integers(2, 20), st.data())
def test_every_token_but_the_first_is_scored_at_most_once(n, length, data):
    stride = data.draw(st.integers(1, length))
    found = cut((np.arange(n), np.ones(n, np.int64)), length, stride)
    scored = found.ids_nt[found.scored()].tolist()
    assert len(scored) == len(set(scored))
    lost = {k * length for k in range(n // length + 1)} if stride == length else {0}
    assert set(range(n)) - set(scored) <= lost
    if stride < length:
        assert scored == list(range(1, n))


def test_boundaries():
    found = cut((np.arange(10), np.ones(10, np.int64)), 4)
    assert found.ids_nt.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert found.length_n.tolist() == [4, 4, 2]
    assert found.scored().sum(1).tolist() == [3, 3, 1]
    batch = found.batch()
    assert batch["attention_mask"].tolist()[2] == [1, 1, 0, 0]
    assert "attention_mask" not in found[:2].batch()
    assert found[2:].batch()["input_ids"].tolist() == [[8, 9]]
    # Nothing can be predicted in a window of one token.
    assert len(cut((np.arange(9), np.ones(9, np.int64)), 4)) == 2


def test_overlap_gives_context():
    found = cut((np.arange(10), np.ones(10, np.int64)), 6, 2)
    assert found.first_n.tolist() == [1, 4, 4]
    assert found.ids_nt[found.scored()].tolist() == list(range(1, 10))


@settings(deadline=None, max_examples=80)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_bytes_add_up(tokenizer, text):
    ids, size = next(tokenize([Passage(text, final=False)], tokenizer))
    assert len(ids) == len(size)
    assert size.min(initial=0) >= 0
    if len(ids):
        assert size.sum() == len(text.encode())


def test_bytes_of_a_character_in_two_tokens():
    # "é" split in two byte-level tokens: both report the character's end.
    assert token_bytes("aéb", np.array([1, 2, 2, 3])).tolist() == [1, 2, 0, 1]
    assert token_bytes("a  b ", np.array([1, 4])).tolist() == [1, 4]


def test_frame(tokenizer, framing_tokenizer):
    eos, bos = tokenizer.eos_token_id, framing_tokenizer.bos_token_id
    assert frame(tokenizer) == ([], [eos])
    assert frame(framing_tokenizer) == ([bos], [])


def test_documents_are_framed_once_even_in_pieces(tokenizer, framing_tokenizer):
    pieces = [Passage("a = 1\n", final=False), Passage("b = 2\n"), Passage("c = 3\n")]
    ids, size = take(tokenize(pieces, framing_tokenizer), None)
    bos = framing_tokenizer.bos_token_id
    assert np.flatnonzero(ids == bos).tolist() == [0, np.flatnonzero(ids == bos)[1]]
    assert size[ids == bos].sum() == 0
    assert size.sum() == 18
    ids, _ = take(tokenize(pieces, tokenizer), None)
    assert (ids == tokenizer.eos_token_id).sum() == 2
    assert ids[-1] == tokenizer.eos_token_id


def test_take_reads_no_further(tokenizer):
    def endless():
        while True:
            yield Passage("x = 1\n")

    ids, size = take(tokenize(endless(), tokenizer), 1000)
    assert len(ids) == len(size) == 1000


def test_fingerprint_sees_tokens_and_shape():
    stream = (np.arange(12), np.ones(12, np.int64))
    same = cut(stream, 4).fingerprint()
    assert same == cut(stream, 4).fingerprint()
    assert same != cut(stream, 6).fingerprint()
    other = cut(stream, 4)
    other.ids_nt[1, 1] += 1
    assert same != other.fingerprint()


@pytest.mark.parametrize("rows", [slice(1, 2), torch.tensor([1])])
def test_rows(rows):
    found = cut((np.arange(12), np.ones(12, np.int64)), 4)[rows]
    assert found.ids_nt.tolist() == [[4, 5, 6, 7]]
    assert found.tokens == 4
