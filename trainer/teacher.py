"""The teacher of a distillation: checked before any worker starts, a start for the student's weights, and loaded whole and frozen."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from data.tokenizer_files import token_ids, tokenizer_files
from data.tokenizers import load_tokenizer
from models.transformer import Transformer, TransformerConfig
from trainer import shards
from trainer.objectives.language_config import DistillConfig, vocabulary
from trainer.shards import Fragment
from trainer.sources import WeightSource, open_source
from trainer.storage import Folder, absolute

_ROUTED = {"experts", "router"}


def settle(config: DistillConfig) -> DistillConfig:
    """`config` with an absolute `teacher`. ValueError, naming fields, values and fixes, if the student cannot learn from what lies there."""
    with _opened(config.teacher) as source:
        _check_reading(config, source)
        if config.init_from_teacher and not any(_alike(name, shape, config.model, source) for name, shape in _shapes(config.model, source.vocab_size)):
            fix = f"set run.objective.init_from_teacher: false, or d_model {source.model.d_model} as there"
            raise ValueError(f"run.objective.teacher: {config.teacher}: no weight outside its experts has the shape of one of run.objective.model; {fix}")
    return replace(config, teacher=absolute(config.teacher))


def start(config: DistillConfig, fragments: Iterable[Fragment], say: Callable[[str], None]) -> None:
    """Fill the weights among `fragments` that teacher and student have alike."""
    with _opened(config.teacher) as source, torch.no_grad():
        for fragment in fragments:
            name = fragment.name.removeprefix("model/")
            if fragment.kind == "weight" and _alike(name, fragment.global_shape, config.model, source):
                fragment.values[:] = source.read(name, fragment.start, fragment.start + fragment.values.numel())
    say(f"started with the weights outside experts of the teacher {config.teacher}")


def load(teacher: str) -> Transformer:
    """The teacher on the CPU, whole, in evaluation mode and without gradients; it drops no token, so that its answers depend on nothing beside the text."""
    with _opened(teacher) as source, torch.no_grad():
        moe = source.model.moe and replace(source.model.moe, eval_capacity_factor=None)
        with torch.random.fork_rng(devices=[]):  # whoever draws from the global generator draws on as before
            model = Transformer(replace(source.model, moe=moe), source.vocab_size)
        for fragment in shards.weights(model):
            if fragment.kind == "weight" or source.shape(fragment.name) == fragment.global_shape:
                fragment.values[:] = source.read(fragment.name, 0, fragment.values.numel())
    return model.eval().requires_grad_(False)


def describe(teacher: str) -> tuple[TransformerConfig, int]:
    """The teacher's model, and its vocabulary's size."""
    with _opened(teacher) as source:
        return source.model, source.vocab_size


def identity(teacher: str) -> str:
    """Which weights they are."""
    with _opened(teacher) as source:
        return source.identity()


@contextmanager
def _opened(teacher: str) -> Iterator[WeightSource]:
    """What lies in the folder `teacher`, while the block lasts. ValueError unless it is a language model that predicts the next token."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            source = open_source(Folder(absolute(teacher)), Path(scratch))
        except ValueError as error:
            raise ValueError(f"run.objective.teacher: {teacher}: {error}") from None
        if not source.model.causal:
            raise ValueError(f"run.objective.teacher: {teacher}: it restores masked tokens; name a model that predicts the next one (moe_lm)")
        yield source


def _check_reading(config: DistillConfig, source: WeightSource) -> None:
    """ValueError unless teacher and student have the same tokens, as far as the teacher's folder says."""
    name, where = config.data.tokenizer, f"run.objective.teacher: {config.teacher}"
    rows = vocabulary(config, load_tokenizer(name))
    if rows != source.vocab_size:
        fix = f"use the tokenizer that it reads by, or run.objective.vocab_size={source.vocab_size} where that is the same"
        raise ValueError(f"{where}: it has {source.vocab_size} tokens and run.objective.data.tokenizer {name} {rows}; {fix}")
    theirs = source.tokenizer()
    if theirs is None:
        return
    there, here = token_ids(theirs), token_ids(tokenizer_files(name)["tokenizer.json"])
    if there != here:
        token = min(token for token in there.keys() | here.keys() if there.get(token) != here.get(token))
        ids = f"{token!r} is {there.get(token, 'none')} there and {here.get(token, 'none')} here"
        raise ValueError(f"{where}: it reads by other tokens than run.objective.data.tokenizer {name} ({ids}); use the tokenizer that it reads by")


def _shapes(model: TransformerConfig, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        student = Transformer(model, vocab_size)
    for name, parameter in student.named_parameters():
        yield name, tuple(parameter.shape)


def _alike(name: str, shape: tuple[int, ...], student: TransformerConfig, source: WeightSource) -> bool:
    """Whether the student's weight `name` may start as the teacher's: of the same shape, outside experts and routers, with rows for the same heads."""
    theirs, parts = source.model, set(name.split("."))
    if parts & _ROUTED or source.shape(name) != shape:
        return False
    return "attention" not in parts or _heads(student) == _heads(theirs)


def _heads(model: TransformerConfig) -> tuple[int, int, int]:
    return model.heads, model.kv_head_count, model.head_width
