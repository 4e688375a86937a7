"""Values of an arrow array as views of its memory."""

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa

Bytes = npt.NDArray[np.uint8]


def views(array: "pa.Array") -> list[Bytes]:
    """The bytes of each value of an array of strings or binaries, as views; nulls are empty."""
    import pyarrow as pa

    large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    assert large or pa.types.is_string(array.type) or pa.types.is_binary(array.type), array.type
    width: type[np.integer] = np.int64 if large else np.int32
    _, offsets, values = array.buffers()
    if len(array) == 0:
        return []
    data = np.frombuffer(values or b"", np.uint8)
    start = array.offset * np.dtype(width).itemsize
    edges = np.frombuffer(offsets, width, count=len(array) + 1, offset=start)
    return [data[begin:end] for begin, end in pairwise(edges.tolist())]
