"""Starting a language model from weights that lie in a folder: checked before any worker starts, then read through the fragments.

Every rank fills the fragments that it holds, so ZeRO stage, experts over ranks and engine do not matter. A checkpoint of the run itself wins.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TypeVar

import torch

from data.tokenizers import load_tokenizer
from models.transformer import Transformer, TransformerConfig
from models.transformers_format import shape_of
from models.upcycle import Origin, upcycled
from trainer import teacher
from trainer.objectives import ObjectiveConfig
from trainer.objectives.language_config import AnyLanguage, DistillConfig, vocabulary
from trainer.shards import Fragment
from trainer.sources import WeightSource, open_source
from trainer.storage import Folder, absolute

AnyObjective = TypeVar("AnyObjective", bound=ObjectiveConfig)


def settle(objective: AnyObjective, resume: bool) -> AnyObjective:
    """`objective` with an absolute `init_from`. Raises ValueError, unless the run resumes, if its model cannot start from what lies there."""
    if not isinstance(objective, AnyLanguage) or objective.init_from is None:
        return objective
    objective = replace(objective, init_from=absolute(objective.init_from))
    if not resume:
        with tempfile.TemporaryDirectory() as scratch:
            _open(objective, Path(scratch))
    return objective


def start(objective: ObjectiveConfig, fragments: Iterable[Fragment], say: Callable[[str], None]) -> bool:
    """Fill the weights and buffers among `fragments` from `init_from`, but not the watch's counters, or from a teacher; False if the job names none."""
    if isinstance(objective, DistillConfig) and objective.init_from_teacher:
        teacher.start(objective, fragments, say)
        return True
    if not isinstance(objective, AnyLanguage) or objective.init_from is None:
        return False
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        source, origins = _open(objective, Path(scratch))
        for fragment in fragments:
            name = fragment.name.removeprefix("model/")
            if fragment.kind == "weight":
                _fill(fragment, origins[name], source)
            elif fragment.kind == "buffer" and not name.startswith("routing_watch.") and source.shape(name) == fragment.global_shape:
                _fill(fragment, Origin((name,)), source)
    say(f"started from {objective.init_from}" + (f", each feed-forward network {objective.upcycle.experts} times" if objective.upcycle else ""))
    return True


def _open(objective: AnyLanguage, scratch: Path) -> tuple[WeightSource, Mapping[str, Origin]]:
    """The source, and where each parameter comes from. ValueError, naming fields, values and fixes, unless they fit."""
    assert objective.init_from is not None
    model, where = objective.model, f"run.objective.init_from: {objective.init_from}"
    try:
        source = open_source(Folder(objective.init_from), scratch)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if objective.upcycle and source.model.moe_indices:
        raise ValueError(f"{where}: it is a mixture of {source.model.moe and source.model.moe.experts} experts already; leave upcycle out")
    _compare(source.model, replace(model, moe=None) if objective.upcycle else model, where)
    rows = vocabulary(objective, load_tokenizer(objective.data.tokenizer))
    if rows != source.vocab_size:
        fix = f"use its own tokenizer (run.objective.data.tokenizer={objective.init_from})"
        if source.vocab_size > rows:
            fix += f", or run.objective.vocab_size={source.vocab_size} where this one is its own"
        raise ValueError(f"{where}: embedding.weight is {(source.vocab_size, model.d_model)} there and {(rows, model.d_model)} here; {fix}")
    with torch.device("meta"):
        names = [name for name, _ in Transformer(model, rows).named_parameters()]
    origins = {name: Origin((name,) if source.shape(name) else ()) for name in names}
    return source, origins | upcycled(model, names) if objective.upcycle else origins


def _compare(there: TransformerConfig, here: TransformerConfig, where: str) -> None:
    theirs, ours = shape_of(there), shape_of(here)
    names = [name for name in dict.fromkeys((*theirs, *ours)) if theirs.get(name) != ours.get(name)]
    if not names:
        return
    if here.moe_indices and not there.moe_indices:
        experts = here.moe.experts if here.moe else 0
        raise ValueError(f"{where}: it is dense, and run.objective.model has {experts} experts; set run.objective.upcycle.experts={experts}, or model.moe=null")
    differences = "; ".join(f"run.objective.model.{name} is {theirs.get(name, 'none')} there and {ours.get(name, 'none')} here" for name in names)
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
