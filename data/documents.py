"""Text documents: which are held out, and how they become samples."""

from collections.abc import Sequence
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from data.lanes import Made
from data.packing import join, windows
from data.rows import Place
from data.tokenizers import Text, Tokenizer, texts_of

if TYPE_CHECKING:
    import pyarrow as pa


class Documents:
    """What a table's rows are: texts, each in the training or in the held-out share, by a hash of its key alone.

    So the shares are the same in every run and for every seed. Rows without a byte of text are no documents.
    """

    def __init__(self, *, text_column: str, key_column: str, held_out: float) -> None:
        self._text_column = text_column
        self._key_column = key_column
        self._limit = int(held_out * 2.0**64)

    def all(self, table: "pa.Table") -> list[Text]:
        """All texts, as views of the table's memory."""
        return [text for text in text_column(table, self._text_column) if len(text)]

    def training(self, table: "pa.Table") -> list[Text]:
        """The texts that are not held out."""
        if self._limit == 0:
            return self.all(table)
        texts = text_column(table, self._text_column)
        return [text for text, held in zip(texts, self._held_out(table, texts), strict=True) if not held and len(text)]

    def held_out(self, table: "pa.Table") -> list[Text]:
        """The texts that are."""
        texts = text_column(table, self._text_column)
        return [text for text in compress(texts, self._held_out(table, texts)) if len(text)]

    def _held_out(self, table: "pa.Table", texts: list[Text]) -> list[bool]:
        keys = texts if self._key_column == self._text_column else column(table, self._key_column)
        limit, digest = self._limit, xxhash.xxh3_64_intdigest
        return [digest(key) < limit for key in keys]  # type: ignore[arg-type]  # numpy is not typed as the buffer that it is


class TextMaker:
    """Packs documents into windows of seq_len + 1 tokens (packing.py)."""

    def __init__(self, tokenizer: Tokenizer, documents: Documents, *, seq_len: int) -> None:
        self._tokenizer = tokenizer
        self._documents = documents
        self._seq_len = seq_len
        self._dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32

    def documents(self, table: "pa.Table", place: Place) -> list[Text]:
        return self._documents.training(table)

    def first_carry(self) -> list[int]:
        return [self._tokenizer.eod]

    def make(self, documents: Sequence[Text], carry: list[int]) -> Made:
        stream = join(np.array(carry, self._dtype), self._tokenizer.encode(documents), self._tokenizer.eod)
        samples, rest = windows(stream, self._seq_len)
        return Made(samples, rest.tolist(), 0)


def text_column(table: "pa.Table", name: str) -> list[Text]:
    """The texts of a column. Raises ValueError where it holds something else."""
    import pyarrow as pa

    kind = table.schema.field(name).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"data.text_column = {name!r} holds {kind}, not text; name a column of strings")
    return column(table, name)


def column(table: "pa.Table", name: str) -> list[npt.NDArray[np.uint8]]:
    """Each value of the column as UTF-8."""
    return [text for chunk in table.column(name).chunks for text in texts_of(chunk)]
