"""Text documents: which of them are held out, and how they become samples."""

from collections.abc import Sequence
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from data.lanes.lane import Chunk
from data.lanes.rows import Origin
from data.sources.arrow import Bytes
from data.text.packing import join, windows
from data.text.tokenizers import Text, Tokenizer, texts_of

if TYPE_CHECKING:
    import pyarrow as pa


class Documents:
    """The texts in a table's rows: training or held-out, by a hash of the key alone.

    So the split is the same in every run and for every seed. Empty texts are left out.
    """

    def __init__(self, *, text_column: str, key_column: str, held_out: float) -> None:
        self.text_column = text_column
        self.key_column = key_column
        self.limit = int(held_out * 2.0**64)
        """Keys with a hash below it are held out."""

    def all(self, table: "pa.Table") -> list[Text]:
        """All texts, as views of the table's memory."""
        return [text for text in text_column(table, self.text_column) if len(text)]

    def training(self, table: "pa.Table") -> list[Text]:
        """The texts that are not held out."""
        if self.limit == 0:
            return self.all(table)
        texts = text_column(table, self.text_column)
        held_out = self._are_held_out(table, texts)
        return [text for text, held in zip(texts, held_out, strict=True) if not held and len(text)]

    def held_out(self, table: "pa.Table") -> list[Text]:
        """The held-out texts."""
        texts = text_column(table, self.text_column)
        return [text for text in compress(texts, self._are_held_out(table, texts)) if len(text)]

    def _are_held_out(self, table: "pa.Table", texts: list[Text]) -> list[bool]:
        keys = texts if self.key_column == self.text_column else column(table, self.key_column)
        limit = self.limit
        digest = xxhash.xxh3_64_intdigest
        return [digest(key) < limit for key in keys]  # type: ignore[arg-type]  # an array is a buffer, untyped


class TextSamples:
    """Packs documents into windows of seq_len + 1 tokens (packing.py)."""

    def __init__(self, tokenizer: Tokenizer, documents: Documents, *, seq_len: int) -> None:
        self.tokenizer = tokenizer
        self.split = documents
        self.seq_len = seq_len
        self.dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32

    def documents(self, table: "pa.Table", origin: Origin) -> list[Text]:
        return self.split.training(table)

    def first_carry(self) -> list[int]:
        return [self.tokenizer.eod]

    def make(self, documents: Sequence[Text], carry: list[int]) -> Chunk:
        tokens = self.tokenizer.encode(documents)
        stream = join(np.array(carry, self.dtype), tokens, self.tokenizer.eod)
        samples, rest = windows(stream, self.seq_len)
        return Chunk(samples, rest.tolist(), unreadable=0)


def text_column(table: "pa.Table", name: str) -> list[Text]:
    """The texts of a column. Raises ValueError if it does not hold text."""
    import pyarrow as pa

    kind = table.schema.field(name).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"run.objective.data.text_column: {name!r} holds {kind}, not text; use a column of strings")
    return column(table, name)


def column(table: "pa.Table", name: str) -> list[Bytes]:
    """Each value of the column as UTF-8."""
    values: list[Bytes] = []
    for chunk in table.column(name).chunks:
        values += texts_of(chunk)
    return values
