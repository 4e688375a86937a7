"""Starts a language model from the weights in a folder.

The weights are checked before any worker starts. Every rank then fills the fragments that it
holds, so the ZeRO stage, the sharding of experts across ranks and the engine do not matter. A
checkpoint of the run itself takes precedence.
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
    """The start of a language model from the weights in a folder."""

    folder: str
    """Folder of the weights, as in `init_from`."""
    model: TransformerConfig
    """The model to train, with the experts that `upcycle` asks for."""
    upcycle: UpcycleConfig | None
    """The experts to make from a dense model; None: the folder's model is taken as it is."""
    tokenizer: str
    """The tokenizer of the job's text."""
    vocab_size: int | None
    """Rows of the job's embedding; None: as many as the tokenizer has ids."""

    def check(self) -> None:
        """Raises ValueError if the model cannot start from the folder's weights.

        The message names the fields, their values and a remedy.
        """
        with tempfile.TemporaryDirectory() as scratch:
            self._open(Path(scratch))

    def fill(self, fragments: Iterable[Fragment], say: Callable[[str], None]) -> None:
        """Copies the weights into `fragments`, and all buffers but the routing watch's counters."""
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            source, origins = self._open(Path(scratch))
            for fragment in fragments:
                name = fragment.name.removeprefix("model/")
                if fragment.kind == "weight":
                    _fill(fragment, origins[name], source)
                elif _is_copied_buffer(fragment, name) and source.shape(name) == fragment.global_shape:
                    _fill(fragment, Origin((name,)), source)
        copies = f", with {self.upcycle.experts} copies of every feed-forward network" if self.upcycle else ""
        say(f"started from {self.folder}{copies}")

    def _open(self, scratch: Path) -> tuple[WeightSource, Mapping[str, Origin]]:
        """Opens the folder; returns the source, and the origin of every parameter by name."""
        where = f"run.objective.init_from: {self.folder}"
        try:
            source = open_source(Folder(self.folder), scratch)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if self.upcycle and source.model.moe_indices:
            experts = source.model.moe and source.model.moe.experts
            raise ValueError(f"{where}: it is a mixture of {experts} experts already; leave upcycle out")
        expected = replace(self.model, moe=None) if self.upcycle else self.model
        _compare(source.model, expected, where)
        rows = self._rows(source, where)
        with torch.device("meta"):
            names = [name for name, _ in Transformer(self.model, rows).named_parameters()]
        origins = {name: Origin((name,) if source.shape(name) else ()) for name in names}
        return source, origins | upcycled(self.model, names) if self.upcycle else origins

    def _rows(self, source: WeightSource, where: str) -> int:
        """Number of rows of the embedding. Raises ValueError unless the folder's has as many."""
        rows = embedding_rows(self.vocab_size, load_tokenizer(self.tokenizer))
        if rows != source.vocab_size:
            remedy = f"use the folder's tokenizer (run.objective.data.tokenizer={self.folder})"
            if source.vocab_size > rows:
                remedy += f", or run.objective.vocab_size={source.vocab_size} if the job's tokenizer is the same"
            stored = (source.vocab_size, self.model.d_model)
            wanted = (rows, self.model.d_model)
            raise ValueError(f"{where}: embedding.weight is {stored} in the folder and {wanted} in the job; {remedy}")
        return rows


def _is_copied_buffer(fragment: Fragment, name: str) -> bool:
    return fragment.kind == "buffer" and not name.startswith("routing_watch.")


def _compare(stored: TransformerConfig, wanted: TransformerConfig, where: str) -> None:
    """Raises ValueError, prefixed with `where`, unless both models have the same shapes."""
    stored_values = shape_of(stored)
    wanted_values = shape_of(wanted)
    names = dict.fromkeys((*stored_values, *wanted_values))
    different = [name for name in names if stored_values.get(name) != wanted_values.get(name)]
    if not different:
        return
    if wanted.moe_indices and not stored.moe_indices:
        experts = wanted.moe.experts if wanted.moe else 0
        raise ValueError(
            f"{where}: it is dense, but run.objective.model has {experts} experts; "
            f"set run.objective.upcycle.experts={experts}, or model.moe=null"
        )
    differences = "; ".join(
        f"run.objective.model.{name} is {stored_values.get(name, 'none')} in the folder"
        f" and {wanted_values.get(name, 'none')} in the job"
        for name in different
    )
    raise ValueError(f"{where}: {differences}; set the folder's values")


def _fill(fragment: Fragment, origin: Origin, source: WeightSource) -> None:
    """Copies the range that `fragment` covers from its origin, a concatenation of tensors."""
    if not origin.names:
        if origin.scale != 1:
            fragment.values.mul_(origin.scale)
        return
    begin = fragment.start
    end = begin + fragment.values.numel()
    start = 0
    for name in origin.names:
        shape = source.shape(name)
        assert shape is not None, name
        low = max(begin, start)
        high = min(end, start + prod(shape))
        if low < high:
            values = source.read(name, low - start, high - start)
            fragment.values[low - begin : high - begin] = values * origin.scale if origin.scale != 1 else values
        start += prod(shape)
    assert start == prod(fragment.global_shape), f"{fragment.name}: {start} elements of {fragment.global_shape}"
