"""Weights to start from, under our names: a folder that transformers saved, or a run of ours.

Any range of a flattened weight can be read, so a rank reads only the elements that it owns, in any
layout. A tensor of a run that is read whole is checked against its receipt. Weights are read from
safetensors files only.
"""

import hashlib
import json
from collections.abc import Mapping
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.text.tokenizer_files import tokenizer_files
from models.transformer.hf_layout import from_config
from models.transformer.hf_names import Part, tensors, zeros
from models.transformer.model import TransformerConfig
from trainer.checkpoint.format import digest_of_file, receipt_text
from trainer.checkpoint.fragments import Fragment, receipt
from trainer.checkpoint.load import PieceFiles, fill, newest
from trainer.parsing import parse
from trainer.run_files import RESOLVED, RunFiles
from trainer.storage import Folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorSlice(Protocol):
    """A tensor in a safetensors file whose rows can be read one range at a time."""

    def get_shape(self) -> list[int]:
        """The shape of the whole tensor."""

    def __getitem__(self, rows: slice) -> Tensor:
        """The rows of the range `rows`."""


class WeightSource(Protocol):
    """The weights of a transformer, and the facts about it that are known."""

    model: TransformerConfig
    """The transformer; only the fields that decide the weights' shapes and meaning are known."""
    vocab_size: int
    """Number of rows of the embedding."""

    def identity(self) -> str:
        """A text that identifies the weights: other weights have another text."""

    def tokenizer(self) -> bytes | None:
        """The content of the weights' tokenizer.json, or None if it is unknown."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of our weight or buffer `name`, or None if the source lacks it."""

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Elements `begin` to before `end` of our weight or buffer `name`, flattened.

        Shape (end - begin,); float32 if it is a weight.
        """


def open_source(folder: Folder, scratch: Path) -> WeightSource:
    """The weights in `folder`, whose files are copied to `scratch` if it is a URL.

    Raises ValueError, naming the missing file, if it is neither a run nor a folder of transformers.
    """
    if not folder.exists():
        raise ValueError("no such folder; name one that `switchwork export` or save_pretrained() wrote, or a run")
    if RunFiles(folder).has_job:
        return RunSource(folder, scratch)
    if not folder.exists("config.json"):
        raise ValueError(
            f"the folder has neither config.json nor {RESOLVED}; "
            "name one that `switchwork export` or save_pretrained() wrote, or a run"
        )
    return TransformersSource(folder, scratch)


class RunSource:
    """The newest intact checkpoint of a run of ours.

    As everywhere outside training, it reads the moving average of a weight if there is one.
    """

    def __init__(self, folder: Folder, scratch: Path):
        files = RunFiles(folder)
        objective = files.job()["run"].get("objective", {})
        if "model" not in objective or "tokenizer" not in objective.get("data", {}):
            raise ValueError(
                f"it is a run of {objective.get('name')}, which is no language model; "
                "name a run of a language model, such as moe_lm"
            )
        self.model = parse(TransformerConfig, objective["model"], "objective.model")
        self.tokenizer_name = str(objective["data"]["tokenizer"])
        checkpoint = newest(files.checkpoints)
        if checkpoint is None:
            raise ValueError("the run has no intact checkpoint yet; let it save one")
        self.folder, self.manifest = checkpoint
        self.tensors = self.manifest["tensors"]
        self.pieces = PieceFiles(self.folder, scratch)
        shape = self.shape("embedding.weight")
        assert shape is not None
        self.vocab_size = shape[0]

    def identity(self) -> str:
        return f"step {self.manifest['step']}, {self.manifest['digest']}"

    def tokenizer(self) -> bytes | None:
        return tokenizer_files(self.tokenizer_name)["tokenizer.json"]

    def _key(self, name: str) -> str | None:
        """The key to read for our weight or buffer `name`, or None if the checkpoint lacks it."""
        keys = [f"{kind}/model/{name}" for kind in ("ema", "weight", "buffer")]
        return next((key for key in keys if key in self.tensors), None)

    def shape(self, name: str) -> tuple[int, ...] | None:
        key = self._key(name)
        return None if key is None else tuple(self.tensors[key]["shape"])

    def read(self, name: str, begin: int, end: int) -> Tensor:
        key = self._key(name)
        assert key is not None
        tensor = self.tensors[key]
        shape = tuple(tensor["shape"])
        values = torch.empty(end - begin, dtype=getattr(torch, tensor["dtype"]))
        kind, _, full_name = key.partition("/")
        fill(Fragment(full_name, kind, shape, begin, values, slice(0, end - begin)), tensor["pieces"], self.pieces)
        is_whole = (begin, end) == (0, prod(shape))
        if is_whole and receipt_text(receipt(values, 0)) != tensor["receipt"]:
            raise ValueError(
                f"checkpoint {self.folder}: {key} differs from the values saved; use an earlier checkpoint"
            )
        return values


class TransformersSource:
    """A folder that transformers' `save_pretrained` or our export wrote.

    Its weights are in one file, or in several files with an index.
    """

    def __init__(self, folder: Folder, scratch: Path):
        self.folder = folder
        self.scratch = scratch
        self.readers: dict[str, safe_open] = {}
        self.model, self.vocab_size = from_config(_json(folder, "config.json"))
        self.files = self._files()
        stacked = any(name.endswith("experts.gate_up_proj") for name in self.files)
        self.parts = tensors(self.model, self.vocab_size, stacked)
        shapes = {part.name: part.shape for part in chain.from_iterable(self.parts.values())}
        self._check(shapes | zeros(self.model))

    def identity(self) -> str:
        names = ("config.json", *sorted(set(self.files.values())))
        digests = [digest_of_file(self.folder.fetch(name, self.scratch)) for name in names]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def tokenizer(self) -> bytes | None:
        return self.folder.read("tokenizer.json") if self.folder.exists("tokenizer.json") else None

    def _files(self) -> Mapping[str, str]:
        """The file of each tensor, without tensors that we compute or tie. Raises ValueError."""
        if self.folder.exists(INDEX):
            files: dict[str, str] = _json(self.folder, INDEX)["weight_map"]
        elif self.folder.exists(SINGLE):
            files = dict.fromkeys(self._reader(SINGLE).keys(), SINGLE)
        else:
            others = [name for name in self.folder.names() if name.endswith((".bin", ".pt", ".pth"))]
            also = f" (it has {others[0]}, which may hold code and is not read)" if others else ""
            raise ValueError(
                f"the folder has no {SINGLE}{also}; save the model with save_pretrained(..., safe_serialization=True)"
            )
        tied = self.model.tie_embeddings
        return {
            name: file
            for name, file in files.items()
            if not (name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"))
        }

    def _check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ValueError unless the files hold exactly the tensors of `expected`."""
        missing = sorted(expected.keys() - self.files.keys())
        extra = sorted(self.files.keys() - expected.keys())
        if missing or extra:
            examples = [f"no {name}" for name in missing[:1]]
            examples += [f"a tensor {name}, which such a model does not have" for name in extra[:1]]
            raise ValueError(
                f"its files have {' and '.join(examples)} ({len(missing)} missing, {len(extra)} too many); "
                "save config and weights together"
            )
        for name, shape in expected.items():
            saved_shape = tuple(self._slice(name).get_shape())
            if saved_shape != shape:
                raise ValueError(
                    f"{name} has shape {saved_shape} in its file and {shape} by config.json; "
                    "save config and weights together"
                )
        for name in zeros(self.model):
            if torch.count_nonzero(self._reader(self.files[name]).get_tensor(name)):
                raise ValueError(
                    f"{name} is not zero, and our shared experts have no gate; use a model without such a gate"
                )

    def _reader(self, file: str) -> safe_open:
        """The safetensors file `file`, opened when it is first read. Raises ValueError."""
        if file not in self.readers:
            if not self.folder.exists(file):
                raise ValueError(f"the folder has no {file}, which its index names; copy the whole folder")
            try:
                self.readers[file] = safe_open(self.folder.fetch(file, self.scratch), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is not a safetensors file ({error}); copy it again") from None
        return self.readers[file]

    def _slice(self, name: str) -> TensorSlice:
        """The tensor `name`, not read yet. Raises ValueError if its file lacks it."""
        file = self.files[name]
        try:
            tensor: TensorSlice = self._reader(file).get_slice(name)
        except SafetensorError:
            raise ValueError(f"{file} has no {name}, although the index names it; copy the whole folder") from None
        return tensor

    def shape(self, name: str) -> tuple[int, ...] | None:
        parts = self.parts.get(name)
        if parts is None:
            return None
        if len(parts) == 1:
            return parts[0].shape
        return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def read(self, name: str, begin: int, end: int) -> Tensor:
        ranges = [torch.empty(0)]
        start = 0
        for part in self.parts[name]:
            numel = prod(part.shape)
            low = max(begin - start, 0)
            high = min(end - start, numel)
            if low < high:
                ranges.append(self._range(part, low, high))
            start += numel
        return torch.cat(ranges)

    def _range(self, part: Part, low: int, high: int) -> Tensor:
        """Elements `low` to before `high` of one tensor; reads only the rows that hold them."""
        row = prod(part.shape[1:])
        first = low // row
        rows = self._slice(part.name)[first : -(-high // row)]
        values = rows.float().flatten()[low - first * row : high - first * row]
        return values if part.scale == 1 else values / part.scale


def _json(folder: Folder, name: str) -> dict[str, Any]:
    """The content of the JSON file `name` in `folder`. Raises ValueError if it is not JSON."""
    try:
        values = json.loads(folder.read(name))
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}); copy it again") from None
    return dict(values)
