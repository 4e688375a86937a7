"""The bits per byte of a general compressor on the same text, to compare a byte model with."""

import lzma
from collections.abc import Iterable


def xz_bits_per_byte(documents: Iterable[str]) -> tuple[float, float]:
    """Bits per byte of `xz -9` on `documents`: (all in one file, each in its own).

    Raises ValueError if there is no text.
    """
    texts = [document.encode() for document in documents]
    size = sum(map(len, texts))
    if not size:
        fix = "use a larger share, or name run.objective.data.eval_source"
        raise ValueError(f"run.objective.data.held_out: no held-out text to compress; {fix}")
    together = len(lzma.compress(b"".join(texts), preset=9))
    one_by_one = sum(len(lzma.compress(text, preset=9)) for text in texts)
    return 8 * together / size, 8 * one_by_one / size
