"""Which text a run trains on: the config alone, with nothing heavy to import."""

from dataclasses import dataclass, field

from data.config import StreamConfig
from data.sources import Plain, PythonStdlib, Source


@dataclass(frozen=True, kw_only=True)
class TextConfig(StreamConfig):
    """Which text a run trains on, and how it becomes samples."""

    source: Source = field(default_factory=PythonStdlib)
    """Training documents."""
    held_out: float = 0.02
    """Share of the documents kept for evaluation, by a hash of their key; unused with `eval_source`."""
    text_column: str = "text"
    """The column that holds the text."""
    tokenizer: str = "bytes"
    """`bytes`, or a Hugging Face tokenizer: a folder, a tokenizer.json, or a Hub name."""
    seq_len: int = 256
    """Tokens predicted in one sample; it holds one more."""
    document_mask: bool = False
    """Batches carry `segments`, so that attention stays within a document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("seq_len")

    def key(self, source: Plain) -> str:
        """The column by whose hash documents of `source` are held out."""
        return self.key_column or ("key" if isinstance(source, PythonStdlib) else self.text_column)

    def columns(self, source: Plain) -> list[str]:
        """What is read of a part of `source`."""
        return list(dict.fromkeys([self.text_column, self.key(source)])) if self.training_held_out else self.eval_columns

    @property
    def eval_columns(self) -> list[str]:
        """What is read of `eval_source`."""
        return [self.text_column]
