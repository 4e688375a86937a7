"""What a general compressor makes of the same text: the figure that a byte model's bits per byte is read against."""

import lzma
from collections.abc import Iterable


def xz_bits_per_byte(documents: Iterable[str]) -> tuple[float, float]:
    """Bits per byte of `xz -9` on all `documents` (together in one file, each in a file of its own).

    Raises ValueError where there is not a byte.
    """
    texts = [document.encode() for document in documents]
    size = sum(map(len, texts))
    if not size:
        raise ValueError("no held-out text to compress; raise data.held_out or name a data.eval_source")
    together = len(lzma.compress(b"".join(texts), preset=9))
    one_by_one = sum(len(lzma.compress(text, preset=9)) for text in texts)
    return 8 * together / size, 8 * one_by_one / size
