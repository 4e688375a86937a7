"""Which text a run trains on: the config alone, with nothing heavy to import."""

from dataclasses import dataclass, field
from typing import Literal

from data.sources import Plain, PythonStdlib, Source


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text a run trains on, and how it becomes samples."""

    source: Source = field(default_factory=PythonStdlib)
    """Training documents."""
    eval_source: Source | None = None
    """Held-out documents; None: a share of `source` is kept apart."""
    text_column: str = "text"
    """The column that holds the text."""
    key_column: str | None = None
    """What tells documents apart when some are held out; None: `key` for python_stdlib, else the text itself."""
    tokenizer: str = "bytes"
    """`bytes`, or a Hugging Face tokenizer: a folder, a tokenizer.json, or a Hub name."""
    seq_len: int = 256
    """Tokens predicted in one sample; it holds one more."""
    document_mask: bool = False
    """Batches carry `segments`, so that attention stays within a document."""
    lanes: int | None = None
    """Deterministic streams that the run is dealt from: a multiple of every number of workers it may ever have. None: 8, or more where 8 does not divide."""
    window: int = 1024
    """Documents shuffled together in a lane."""
    held_out: float = 0.02
    """Share of the documents kept for evaluation, by a hash of their key; unused with `eval_source`."""
    max_eval_samples: int | None = None
    """Evaluate on the first so many windows; None: on all, which reads the whole source."""
    prefetch: int = 8
    """Steps made ready in the background; 0: none."""
    processes: int = 0
    """Processes of a worker that read and decode ahead, its lanes divided among them; 0: a thread of the worker does it."""
    retry_seconds: float = 300.0
    """How long a source that does not answer is tried again before it counts as unreadable."""
    on_unreadable: Literal["fail", "skip"] = "fail"
    """What cannot be read ends the run, with its name; or the rest of that shard is left out, counted and logged."""

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 1), ("window", 1), ("prefetch", 0), ("processes", 0), ("retry_seconds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} = {getattr(self, name)} is less than {least}; set it to {least} or more")
        for name in ("lanes", "max_eval_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"data.{name} = {value} is less than 1; leave it out or set it to 1 or more")
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"data.held_out = {self.held_out} is not a share from 0 up to (not including) 1; the usual one is 0.02")

    @property
    def training_held_out(self) -> float:
        """The share of `source` that is not trained on."""
        return 0.0 if self.eval_source else self.held_out

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
