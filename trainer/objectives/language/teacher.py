"""The teacher of a distillation: checked before any worker starts, a start for the student's weights, and loaded whole and frozen."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.text.tokenizer_files import token_ids, tokenizer_files
from data.text.tokenizers import load_tokenizer
from models.transformer.model import Transformer, TransformerConfig
from trainer.checkpoint import fragments as shards
from trainer.checkpoint.fragments import Fragment
from trainer.checkpoint.weight_source import WeightSource, open_source
from trainer.objectives.language.vocabulary import embedding_rows
from trainer.storage import Folder, absolute

_ROUTED = {"experts", "router"}


@dataclass(frozen=True, kw_only=True)
class Student:
    """A language model that learns from a teacher, and may start with its weights."""

    teacher: str
    """Folder of the teacher."""
    model: TransformerConfig
    tokenizer: str
    vocab_size: int | None
    starts_alike: bool
    """Whether it starts with the weights that both have alike."""

    def check(self) -> None:
        """Raises ValueError, naming fields, values and fixes, if the student cannot learn from what lies in the folder."""
        with _opened(self.teacher) as source:
            self._check_reading(source)
            shapes = _shapes(self.model, source.vocab_size)
            if self.starts_alike and not any(_alike(name, shape, self.model, source) for name, shape in shapes):
                what = "no weight outside its experts has the shape of one of run.objective.model"
                fix = f"set run.objective.init_from_teacher: false, or d_model {source.model.d_model} as there"
                raise ValueError(f"run.objective.teacher: {self.teacher}: {what}; {fix}")

    def fill(self, fragments: Iterable[Fragment], say: Callable[[str], None]) -> None:
        """Copies the weights that teacher and student have alike into `fragments`."""
        with _opened(self.teacher) as source, torch.no_grad():
            for fragment in fragments:
                name = fragment.name.removeprefix("model/")
                if fragment.kind == "weight" and _alike(name, fragment.global_shape, self.model, source):
                    fragment.values[:] = source.read(name, fragment.start, fragment.start + fragment.values.numel())
        say(f"started with the weights outside experts of the teacher {self.teacher}")

    def _check_reading(self, source: WeightSource) -> None:
        """ValueError unless teacher and student have the same tokens, as far as the teacher's folder says."""
        where = f"run.objective.teacher: {self.teacher}"
        rows = embedding_rows(self.vocab_size, load_tokenizer(self.tokenizer))
        if rows != source.vocab_size:
            fix = f"use the tokenizer that it reads by, or run.objective.vocab_size={source.vocab_size} where that is the same"
            tokens = f"it has {source.vocab_size} tokens and run.objective.data.tokenizer {self.tokenizer} {rows}"
            raise ValueError(f"{where}: {tokens}; {fix}")
        theirs = source.tokenizer()
        if theirs is None:
            return
        there = token_ids(theirs)
        here = token_ids(tokenizer_files(self.tokenizer)["tokenizer.json"])
        if there != here:
            token = min(token for token in there.keys() | here.keys() if there.get(token) != here.get(token))
            ids = f"{token!r} is {there.get(token, 'none')} there and {here.get(token, 'none')} here"
            other = f"it reads by other tokens than run.objective.data.tokenizer {self.tokenizer} ({ids})"
            raise ValueError(f"{where}: {other}; use the tokenizer that it reads by")


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
            raise ValueError(
                f"run.objective.teacher: {teacher}: it restores masked tokens; name a model that predicts the next one (moe_lm)"
            )
        yield source


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
