"""Packs documents into windows of seq_len + 1 tokens, which predict every token exactly once.

Consecutive windows overlap by one token: the last target of a window is the first input of the
next. Each document ends with the end-of-document token `eod`, from which the first token of the
next document is predicted.

Legend: N windows, S = seq_len, W = S + 1.
"""

from collections.abc import Sequence
from itertools import chain, repeat

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.integer]


def join(carry: Tokens, documents: Sequence[Tokens], eod: int) -> Tokens:
    """One stream: `carry`, then each document and its `eod`, in the dtype of `carry`."""
    end = np.array([eod], dtype=carry.dtype)
    pieces = chain.from_iterable(zip(documents, repeat(end)))
    return np.concatenate([carry, *pieces], dtype=carry.dtype, casting="unsafe")


def windows(stream: Tokens, seq_len: int) -> tuple[Tokens, Tokens]:
    """(whole windows of `stream` (N, W), a view; the 1 to S tokens that begin the next window)."""
    assert stream.ndim == 1, stream.shape
    assert len(stream) >= 1, "the first token is predicted from one before it"
    count = (len(stream) - 1) // seq_len
    rest = stream[count * seq_len :]
    if count == 0:
        return np.empty((0, seq_len + 1), stream.dtype), rest
    stride = stream.strides[0]
    shape = (count, seq_len + 1)
    view = np.lib.stride_tricks.as_strided(stream, shape, (seq_len * stride, stride), writeable=False)
    return view, rest


def segments(tokens_NW: Tokens, eod: int) -> npt.NDArray[np.int64]:
    """The number of each token's document within its window, from 0, same shape.

    An `eod` belongs to the document after it, whose first token is predicted from it.
    """
    opened = np.cumsum(tokens_NW == eod, axis=-1, dtype=np.int64)
    return opened - opened[..., :1]
