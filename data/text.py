"""Config of the text that a run trains on; imports nothing heavy."""

from dataclasses import dataclass, field

from data.config import StreamConfig
from data.sources import Plain, PythonStdlib, Source


@dataclass(frozen=True, kw_only=True)
class TextConfig(StreamConfig):
    """The text that a run trains on, and how it becomes samples."""

    source: Source = field(default_factory=PythonStdlib)
    """Training documents."""
    held_out: float = 0.02
    """Share of documents held out for evaluation, by a hash of the key; unused with eval_source."""
    text_column: str = "text"
    """Column of the text."""
    tokenizer: str = "bytes"
    """`bytes`, or a Hugging Face tokenizer: a folder, a tokenizer.json, or a Hub name."""
    seq_len: int = 256
    """Number of tokens that a sample predicts; it holds one more."""
    document_mask: bool = False
    """Add `segments` to batches, so that attention stays within a document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("seq_len")

    def key(self, source: Plain) -> str:
        """The column whose hash decides which documents of `source` are held out."""
        return self.key_column or ("key" if isinstance(source, PythonStdlib) else self.text_column)

    def columns(self, source: Plain) -> list[str]:
        """The columns to read of a part of `source`."""
        if not self.training_held_out:
            return self.eval_columns
        return list(dict.fromkeys([self.text_column, self.key(source)]))

    @property
    def eval_columns(self) -> list[str]:
        """The columns to read of `eval_source`."""
        return [self.text_column]
