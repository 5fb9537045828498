"""Text to tokens to windows: documents framed as the tokenizer frames them, concatenated, cut.

Every token knows how many bytes of text it stands for (separators: none), so bits per byte are
exact for any window. Shapes: n windows, t positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankine.tasks.text import Passage

#: A fragment of the token stream: ids and bytes per id, both int64 arrays.
Fragment = tuple[np.ndarray, np.ndarray]

#: Passages and characters given to the tokenizer at once: it works on several in parallel, and
#: takes about a hundred bytes per character.
TOGETHER, CHARACTERS = 64, 1 << 18


@dataclass(frozen=True)
class Windows:
    """Windows of a token stream, padded on the right.

    - `ids_nt`: int64 tokens; `bytes_nt`: int64 bytes of text each token stands for.
    - `length_n`: tokens that are no padding; `first_n`: the first position that is scored
      (1: every token that has something before it in the window; later with overlaps).
    """

    ids_nt: Tensor
    bytes_nt: Tensor
    length_n: Tensor
    first_n: Tensor

    def __len__(self) -> int:
        return len(self.ids_nt)

    def __getitem__(self, rows: slice | Tensor) -> Windows:
        return Windows(
            self.ids_nt[rows], self.bytes_nt[rows], self.length_n[rows], self.first_n[rows]
        )

    @property
    def tokens(self) -> int:
        """Tokens in all windows, overlaps counted as often as they are read."""
        return int(self.length_n.sum())

    def present(self) -> Tensor:
        """(n, t) bool: no padding."""
        return torch.arange(self.ids_nt.shape[1]) < self.length_n[:, None]

    def scored(self) -> Tensor:
        """(n, t) bool: positions whose token is predicted and counted."""
        return self.present() & (torch.arange(self.ids_nt.shape[1]) >= self.first_n[:, None])

    def batch(self) -> dict[str, Tensor]:
        """What a model takes: `input_ids`, and an `attention_mask` where there is padding."""
        longest = int(self.length_n.max())
        batch = {"input_ids": self.ids_nt[:, :longest]}
        if int(self.length_n.min()) < longest:
            batch["attention_mask"] = self.present()[:, :longest].long()
        return batch

    def fingerprint(self) -> str:
        """sha256 over tokens and lengths."""
        digest = hashlib.sha256(str(tuple(self.ids_nt.shape)).encode())
        for tensor in (self.ids_nt, self.length_n, self.first_n):
            digest.update(tensor.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids this tokenizer puts before and after a document: its own special tokens, or its
    end-of-text token after each where it adds none (GPT-2)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            before, after = full[:start], full[start + len(bare) :]
            break
    else:
        before, after = [], []
    if not before and not after and tokenizer.eos_token_id is not None:
        after = [tokenizer.eos_token_id]
    return list(before), list(after)


def token_bytes(text: str, ends: np.ndarray) -> np.ndarray:
    """UTF-8 bytes per token from the character offsets of token ends; they sum to the text's.

    A token that ends inside a character (byte-level BPE) gets the whole character, the next none;
    characters no token covers (dropped white space) count for the token after them.
    """
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
    position = np.concatenate([[0], np.cumsum(width)])
    reached = np.maximum.accumulate(position[ends]) if len(ends) else ends
    if len(reached):
        reached[-1] = position[-1]
    return np.diff(reached, prepend=0)


def tokenize(passages: Iterable[Passage], tokenizer: Any) -> Iterator[Fragment]:
    """The token stream of a stream of passages, in fragments; lazily."""
    before, after = frame(tokenizer)
    opening = True
    for group in _groups(passages):
        encoded = _encode([p.text for p in group], tokenizer)
        for passage, (ids, size) in zip(group, encoded):
            head = before if opening else []
            tail = after if passage.final else []
            opening = passage.final
            yield (
                np.concatenate([head, ids, tail]).astype(np.int64),
                np.concatenate([[0] * len(head), size, [0] * len(tail)]).astype(np.int64),
            )


def _groups(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    """Neighbours, as many as the tokenizer takes at once; always one."""
    group: list[Passage] = []
    for passage in passages:
        longer = sum(len(p.text) for p in group) + len(passage.text)
        if group and (len(group) == TOGETHER or longer > CHARACTERS):
            yield group
            group = []
        group.append(passage)
    if group:
        yield group


def _encode(texts: list[str], tokenizer: Any) -> list[Fragment]:
    fast = getattr(tokenizer, "is_fast", False)
    # Without offsets (a tokenizer in pure Python) the bytes stay unknown: -1 marks them.
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    fragments = []
    for index, text in enumerate(texts):
        ids = np.asarray(out["input_ids"][index], dtype=np.int64)
        if fast:
            ends = np.asarray(out["offset_mapping"][index], dtype=np.int64).reshape(-1, 2)[:, 1]
            fragments.append((ids, token_bytes(text, ends)))
        else:
            fragments.append((ids, np.full(len(ids), -1)))
    return fragments


def take(fragments: Iterable[Fragment], limit: int | None) -> Fragment:
    """The first `limit` tokens of a stream (all of it for None), reading no further."""
    ids, size, found = [], [], 0
    for fragment in fragments:
        ids.append(fragment[0])
        size.append(fragment[1])
        found += len(fragment[0])
        if limit is not None and found >= limit:
            break
    empty = np.zeros(0, np.int64)
    return np.concatenate([empty, *ids])[:limit], np.concatenate([empty, *size])[:limit]


def cut(stream: Fragment, length: int, stride: int | None = None) -> Windows:
    """All windows of `length` tokens, every `stride` tokens (default: no overlap); the last may be
    shorter. Each token is scored once, in the first window that has something before it."""
    ids, size = (torch.from_numpy(np.ascontiguousarray(a)) for a in stream)
    stride = stride or length
    starts = [s for s in range(0, len(ids), stride) if s == 0 or len(ids) - s > length - stride]
    starts = [s for s in starts if len(ids) - s > 1]
    shape = (len(starts), length)
    out = Windows(
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.int64),
        torch.tensor([min(length, len(ids) - s) for s in starts], dtype=torch.int64),
        torch.tensor([1 if s == 0 else max(1, length - stride) for s in starts], dtype=torch.int64),
    )
    for row, start in enumerate(starts):
        end = start + int(out.length_n[row])
        out.ids_nt[row, : end - start] = ids[start:end]
        out.bytes_nt[row, : end - start] = size[start:end]
    return out
