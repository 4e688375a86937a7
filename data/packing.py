"""Documents to windows of seq_len + 1 tokens, so that every token is predicted exactly once.

Consecutive windows overlap by one token: the last target of a window is the first input of the next. Each document ends
with the end-of-document token `eod`, which is also what its successor is predicted from. Letters: N windows, S = seq_len,
W = S + 1.
"""

from collections.abc import Sequence
from itertools import chain, repeat

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.integer]


def join(carry: Tokens, documents: Sequence[Tokens], eod: int) -> Tokens:
    """One stream: what was left over, then each document and its `eod`; its dtype is that of `carry`."""
    end = np.array([eod], dtype=carry.dtype)
    pieces = chain.from_iterable(zip(documents, repeat(end)))
    return np.concatenate([carry, *pieces], dtype=carry.dtype, casting="unsafe")


def windows(stream: Tokens, seq_len: int) -> tuple[Tokens, Tokens]:
    """(windows, rest): all the whole windows of `stream`, (N, W), as a view, and the 1 to S tokens that begin the next one."""
    assert stream.ndim == 1, stream.shape
    assert len(stream) >= 1, "a stream begins with at least the token that the first one is predicted from"
    count = (len(stream) - 1) // seq_len
    rest = stream[count * seq_len :]
    if count == 0:
        return np.empty((0, seq_len + 1), stream.dtype), rest
    step = stream.strides[0]
    return np.lib.stride_tricks.as_strided(stream, (count, seq_len + 1), (seq_len * step, step), writeable=False), rest


def segments(tokens_NW: Tokens, eod: int) -> npt.NDArray[np.int64]:
    """The place of each token's document inside its window, from 0, same shape; an `eod` opens the document that is predicted from it."""
    opened = np.cumsum(tokens_NW == eod, axis=-1, dtype=np.int64)
    return opened - opened[..., :1]
