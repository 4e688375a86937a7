"""The teacher of a distillation.

It is checked before any worker starts, may lend the student its first weights, and is loaded whole
and frozen for training.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.text.tokenizer_files import token_ids, tokenizer_files
from data.text.tokenizers import load_tokenizer
from models.transformer.model import Transformer, TransformerConfig
from trainer.checkpoint.fragments import Fragment, weights
from trainer.checkpoint.weight_source import WeightSource, open_source
from trainer.objectives.language.vocabulary import embedding_rows
from trainer.storage import Folder, absolute

_ROUTED = {"experts", "router"}


@dataclass(frozen=True, kw_only=True)
class Student:
    """A language model that learns from a teacher and may start with its weights."""

    teacher: str
    """Folder of the teacher."""
    model: TransformerConfig
    """The student's network."""
    tokenizer: str
    """The tokenizer of the student's text."""
    vocab_size: int | None
    """Rows of the student's embedding; None: as many as the tokenizer has ids."""
    starts_alike: bool
    """Whether the student starts with the teacher's weights of the same name and shape."""

    def check(self) -> None:
        """Raises ValueError if the student cannot learn from the model in the folder.

        The message names the fields, their values and a remedy.
        """
        with _opened(self.teacher) as source:
            self._check_reading(source)
            shapes = _shapes(self.model, source.vocab_size)
            if self.starts_alike and not any(_alike(name, shape, self.model, source) for name, shape in shapes):
                raise ValueError(
                    f"run.objective.teacher: {self.teacher}: no weight outside its experts has the shape of one of "
                    "run.objective.model; set run.objective.init_from_teacher: false, or use the teacher's "
                    f"d_model {source.model.d_model}"
                )

    def fill(self, fragments: Iterable[Fragment], say: Callable[[str], None]) -> None:
        """Copies the teacher's weights of the same name and shape into `fragments`."""
        with _opened(self.teacher) as source, torch.no_grad():
            for fragment in fragments:
                name = fragment.name.removeprefix("model/")
                if fragment.kind == "weight" and _alike(name, fragment.global_shape, self.model, source):
                    fragment.values[:] = source.read(name, fragment.start, fragment.start + fragment.values.numel())
        say(f"started with the weights outside experts of the teacher {self.teacher}")

    def _check_reading(self, source: WeightSource) -> None:
        """Raises ValueError if the teacher's folder describes other tokens than the student's."""
        where = f"run.objective.teacher: {self.teacher}"
        rows = embedding_rows(self.vocab_size, load_tokenizer(self.tokenizer))
        if rows != source.vocab_size:
            raise ValueError(
                f"{where}: it has {source.vocab_size} tokens, but run.objective.data.tokenizer {self.tokenizer} "
                f"has {rows}; use the teacher's tokenizer, or run.objective.vocab_size={source.vocab_size} "
                "if the tokenizers are the same"
            )
        content = source.tokenizer()
        if content is None:
            return
        teacher_ids = token_ids(content)
        own_ids = token_ids(tokenizer_files(self.tokenizer)["tokenizer.json"])
        if teacher_ids != own_ids:
            tokens = teacher_ids.keys() | own_ids.keys()
            token = min(token for token in tokens if teacher_ids.get(token) != own_ids.get(token))
            ids = f"{teacher_ids.get(token, 'none')} in the folder and {own_ids.get(token, 'none')} in the job"
            raise ValueError(
                f"{where}: it has other tokens than run.objective.data.tokenizer {self.tokenizer} "
                f"({token!r} is {ids}); use the teacher's tokenizer"
            )


def load_teacher(teacher: str) -> Transformer:
    """Loads the whole teacher on the CPU, in evaluation mode and without gradients.

    It drops no token, so that its outputs depend on the text alone.
    """
    with _opened(teacher) as source, torch.no_grad():
        moe = source.model.moe and replace(source.model.moe, eval_capacity_factor=None)
        with torch.random.fork_rng(devices=[]):  # leaves the global generator as it was
            model = Transformer(replace(source.model, moe=moe), source.vocab_size)
        for fragment in weights(model):
            if fragment.kind == "weight" or source.shape(fragment.name) == fragment.global_shape:
                fragment.values[:] = source.read(fragment.name, 0, fragment.values.numel())
    return model.eval().requires_grad_(False)


def describe_teacher(teacher: str) -> tuple[TransformerConfig, int]:
    """Reads the teacher's config and vocabulary size, without its weights."""
    with _opened(teacher) as source:
        return source.model, source.vocab_size


def teacher_identity(teacher: str) -> str:
    """A text that identifies the teacher's weights."""
    with _opened(teacher) as source:
        return source.identity()


@contextmanager
def _opened(teacher: str) -> Iterator[WeightSource]:
    """Opens the folder `teacher` for the duration of the block.

    Raises ValueError unless it holds a language model that predicts the next token.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            source = open_source(Folder(absolute(teacher)), Path(scratch))
        except ValueError as error:
            raise ValueError(f"run.objective.teacher: {teacher}: {error}") from None
        if not source.model.causal:
            raise ValueError(
                f"run.objective.teacher: {teacher}: it restores masked tokens; "
                "name a model that predicts the next token (moe_lm)"
            )
        yield source


def _shapes(model: TransformerConfig, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of the parameters of `model`."""
    with torch.device("meta"):
        student = Transformer(model, vocab_size)
    for name, parameter in student.named_parameters():
        yield name, tuple(parameter.shape)


def _alike(name: str, shape: tuple[int, ...], student: TransformerConfig, source: WeightSource) -> bool:
    """Whether the student's weight `name` may start as the teacher's.

    The shapes must be equal, the weight must be outside experts and routers, and the rows of
    attention weights must belong to the same heads.
    """
    parts = set(name.split("."))
    if parts & _ROUTED or source.shape(name) != shape:
        return False
    return "attention" not in parts or _heads(student) == _heads(source.model)


def _heads(model: TransformerConfig) -> tuple[int, int, int]:
    return model.heads, model.kv_head_count, model.head_width
