"""The base class of objective configs: the questions that the rest of the trainer asks.

Each has the answer of an objective that needs nothing special. A config overrides the others.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, Self, TypeVar

from data.config import ImageConfig, TextConfig
from data.sources.kinds import absolute
from models.moe.layer import MoEConfig
from trainer.checkpoint.fragments import Fragment

StoredData = TextConfig | ImageConfig
"""Data that are read from a source, in lanes."""

ExportFormat = Literal["transformers", "diffusers"]
"""A library whose files a network can be exported to."""

_Data = TypeVar("_Data", TextConfig, ImageConfig)


class Start(Protocol):
    """Weights in a folder that a new run starts from. A checkpoint of the run itself wins."""

    def check(self) -> None:
        """Raises ValueError if the objective cannot start from them.

        The message names the fields, the values and the fix.
        """

    def fill(self, fragments: Iterable[Fragment], say: Callable[[str], None]) -> None:
        """Copy the weights into the fragments of this rank."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The section `objective` of a job file. A subclass gives `name` a default that selects it."""

    name: str

    @property
    def dataset(self) -> str:
        """The name of the data, for the tracker."""
        return self.name

    @property
    def stored_data(self) -> StoredData | None:
        """The data that must exist before training; None if samples are made while training."""
        return None

    @property
    def lanes(self) -> int | None:
        """Number of lanes of the data; None if any number of workers will do."""
        return None if self.stored_data is None else self.stored_data.lanes

    @property
    def group(self) -> int:
        """Number of consecutive samples that must stay together in a micro-batch."""
        return 1

    @property
    def tokens_per_sample(self) -> int:
        """Number of tokens that one sample trains on; 0 if there are none."""
        return 0

    @property
    def moe(self) -> MoEConfig | None:
        """The mixture of experts that can be sharded across ranks; None for a dense model."""
        return None

    @property
    def needs_second_derivatives(self) -> bool:
        """Whether the loss differentiates a gradient, which ZeRO 3 cannot do."""
        return False

    @property
    def masks_documents(self) -> bool:
        """Whether attention stays within a document, which costs memory for the mask."""
        return False

    @property
    def builds_on_meta(self) -> bool:
        """Whether the objective can be built on the `meta` device.

        Then building it neither reads data nor computes numbers.
        """
        return False

    @property
    def export_format(self) -> ExportFormat | None:
        """The format that `switchwork export` writes; None if no other library has one."""
        return None

    @property
    def start(self) -> Start | None:
        """The weights that a new run starts from; None: random ones."""
        return None

    def resolved(self, workers: int, resume: bool) -> Self:
        """The config that the workers get, with absolute paths and lanes that suit `workers`.

        Raises ValueError if weights that the objective needs do not fit it. The weights that it
        starts from are checked unless the run resumes.
        """
        return self


def resolved_data(data: _Data, workers: int) -> _Data:
    """`data` with absolute paths and a number of lanes."""
    here = Path.cwd()
    held_out = data.eval_source and absolute(data.eval_source, here)
    lanes = data.lanes or math.lcm(8, workers)
    return replace(data, lanes=lanes, source=absolute(data.source, here), eval_source=held_out)
