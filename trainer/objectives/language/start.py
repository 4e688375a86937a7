"""Starting a language model from weights that lie in a folder: checked before any worker starts, then read through the fragments.

Every rank fills the fragments that it holds, so ZeRO stage, experts over ranks and engine do not matter. A checkpoint of the run itself wins.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from data.text.tokenizers import load_tokenizer
from models.transformer.hf_layout import shape_of
from models.transformer.model import Transformer, TransformerConfig
from models.transformer.upcycle import Origin, UpcycleConfig, upcycled
from trainer.checkpoint.fragments import Fragment
from trainer.checkpoint.weight_source import WeightSource, open_source
from trainer.objectives.language.vocabulary import embedding_rows
from trainer.storage import Folder


@dataclass(frozen=True, kw_only=True)
class InitFrom:
    """A language model that starts from the weights in a folder."""

    folder: str
    model: TransformerConfig
    """The model that starts, with the experts that `upcycle` asks for."""
    upcycle: UpcycleConfig | None
    tokenizer: str
    vocab_size: int | None

    def check(self) -> None:
        """Raises ValueError, naming fields, values and fixes, if the model cannot start from what lies in the folder."""
        with tempfile.TemporaryDirectory() as scratch:
            self._open(Path(scratch))

    def fill(self, fragments: Iterable[Fragment], say: Callable[[str], None]) -> None:
        """Copies the weights into `fragments`, and the buffers other than the counters of the routing watch."""
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            source, origins = self._open(Path(scratch))
            for fragment in fragments:
                name = fragment.name.removeprefix("model/")
                if fragment.kind == "weight":
                    _fill(fragment, origins[name], source)
                elif (
                    fragment.kind == "buffer"
                    and not name.startswith("routing_watch.")
                    and source.shape(name) == fragment.global_shape
                ):
                    _fill(fragment, Origin((name,)), source)
        copies = f", each feed-forward network {self.upcycle.experts} times" if self.upcycle else ""
        say(f"started from {self.folder}{copies}")

    def _open(self, scratch: Path) -> tuple[WeightSource, Mapping[str, Origin]]:
        """The source, and where each parameter comes from."""
        where = f"run.objective.init_from: {self.folder}"
        try:
            source = open_source(Folder(self.folder), scratch)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if self.upcycle and source.model.moe_indices:
            experts = source.model.moe and source.model.moe.experts
            raise ValueError(f"{where}: it is a mixture of {experts} experts already; leave upcycle out")
        _compare(source.model, replace(self.model, moe=None) if self.upcycle else self.model, where)
        rows = self._rows(source, where)
        with torch.device("meta"):
            names = [name for name, _ in Transformer(self.model, rows).named_parameters()]
        origins = {name: Origin((name,) if source.shape(name) else ()) for name in names}
        return source, origins | upcycled(self.model, names) if self.upcycle else origins

    def _rows(self, source: WeightSource, where: str) -> int:
        """Rows of the embedding: the same there and here."""
        rows = embedding_rows(self.vocab_size, load_tokenizer(self.tokenizer))
        if rows != source.vocab_size:
            fix = f"use its own tokenizer (run.objective.data.tokenizer={self.folder})"
            if source.vocab_size > rows:
                fix += f", or run.objective.vocab_size={source.vocab_size} where this one is its own"
            there, here = (source.vocab_size, self.model.d_model), (rows, self.model.d_model)
            raise ValueError(f"{where}: embedding.weight is {there} there and {here} here; {fix}")
        return rows


def _compare(there: TransformerConfig, here: TransformerConfig, where: str) -> None:
    theirs, ours = shape_of(there), shape_of(here)
    names = [name for name in dict.fromkeys((*theirs, *ours)) if theirs.get(name) != ours.get(name)]
    if not names:
        return
    if here.moe_indices and not there.moe_indices:
        experts = here.moe.experts if here.moe else 0
        raise ValueError(
            f"{where}: it is dense, and run.objective.model has {experts} experts; set run.objective.upcycle.experts={experts}, or model.moe=null"
        )
    differences = "; ".join(
        f"run.objective.model.{name} is {theirs.get(name, 'none')} there and {ours.get(name, 'none')} here"
        for name in names
    )
    raise ValueError(f"{where}: {differences}; set what is there")


def _fill(fragment: Fragment, origin: Origin, source: WeightSource) -> None:
    """Copy what `fragment` covers of its origin: several tensors, one behind the other."""
    if not origin.names:
        if origin.scale != 1:
            fragment.values.mul_(origin.scale)
        return
    begin, end, start = fragment.start, fragment.start + fragment.values.numel(), 0
    for name in origin.names:
        shape = source.shape(name)
        assert shape is not None, name
        low, high = max(begin, start), min(end, start + prod(shape))
        if low < high:
            values = source.read(name, low - start, high - start)
            fragment.values[low - begin : high - begin] = values * origin.scale if origin.scale != 1 else values
        start += prod(shape)
    assert start == prod(fragment.global_shape), f"{fragment.name}: {start} elements of {fragment.global_shape}"
