"""Weights to start from, by our names, whoever wrote them: a folder that transformers saved, or a run of ours. Safetensors only.

Any range of a flattened weight can be asked for, so that a rank reads what it owns, in any layout; of a run, what is read whole is held against its receipt.
"""

import hashlib
import json
from collections.abc import Mapping
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
from trainer.checkpoint import load as restore
from trainer.checkpoint.format import digest_of_file, receipt_text
from trainer.checkpoint.fragments import Fragment, receipt
from trainer.parsing import parse
from trainer.run_files import RESOLVED, RunFiles
from trainer.storage import Folder

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class TensorSlice(Protocol):
    """A tensor in a safetensors file, of which rows can be read."""

    def get_shape(self) -> list[int]: ...
    def __getitem__(self, rows: slice) -> Tensor: ...


class WeightSource(Protocol):
    """Weights of a transformer, somewhere."""

    model: TransformerConfig
    """What they belong to; of it only what decides the weights' shapes and meaning is known."""
    vocab_size: int

    def identity(self) -> str:
        """Other weights, another text."""

    def tokenizer(self) -> bytes | None:
        """The tokenizer.json that they read by; None where the folder does not say."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of our weight or buffer `name`; None if it is not there."""

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Its elements from `begin` to before `end`, flattened: (end - begin,), float32 where it is a weight."""


def open_source(folder: Folder, scratch: Path) -> WeightSource:
    """What lies in `folder`; files of a URL are copied to `scratch`. ValueError, saying what is missing, if it is neither kind."""
    if not folder.exists():
        raise ValueError("no such folder; name one that `switchwork export` or save_pretrained() wrote, or a run")
    if RunFiles(folder).has_job:
        return RunSource(folder, scratch)
    if not folder.exists("config.json"):
        raise ValueError(
            f"the folder has neither config.json nor {RESOLVED}; name one that `switchwork export` or save_pretrained() wrote, or a run"
        )
    return TransformersSource(folder, scratch)


class RunSource:
    """The newest whole checkpoint of a run of ours: the moving average of its weights, where it has one, as everywhere outside training."""

    def __init__(self, folder: Folder, scratch: Path):
        files = RunFiles(folder)
        objective = files.job()["run"].get("objective", {})
        if "model" not in objective or "tokenizer" not in objective.get("data", {}):
            raise ValueError(
                f"it is a run of {objective.get('name')}, which is no language model; name a run of one, such as moe_lm"
            )
        self.model = parse(TransformerConfig, objective["model"], "objective.model")
        self.reads_by = str(objective["data"]["tokenizer"])
        found = restore.newest(files.checkpoints)
        if found is None:
            raise ValueError("the run has no whole checkpoint yet; let it save one")
        self.folder, self.manifest = found
        self.tensors, self.pieces = self.manifest["tensors"], restore.PieceFiles(self.folder, scratch)
        shape = self.shape("embedding.weight")
        assert shape is not None
        self.vocab_size = shape[0]

    def identity(self) -> str:
        return f"step {self.manifest['step']}, {self.manifest['digest']}"

    def tokenizer(self) -> bytes | None:
        return tokenizer_files(self.reads_by)["tokenizer.json"]

    def _key(self, name: str) -> str | None:
        return next(
            (key for kind in ("ema", "weight", "buffer") if (key := f"{kind}/model/{name}") in self.tensors), None
        )

    def shape(self, name: str) -> tuple[int, ...] | None:
        key = self._key(name)
        return None if key is None else tuple(self.tensors[key]["shape"])

    def read(self, name: str, begin: int, end: int) -> Tensor:
        key = self._key(name)
        assert key is not None
        tensor = self.tensors[key]
        values = torch.empty(end - begin, dtype=getattr(torch, tensor["dtype"]))
        fragment = Fragment(
            key.partition("/")[2], key.partition("/")[0], tuple(tensor["shape"]), begin, values, slice(0, end - begin)
        )
        restore.fill(fragment, tensor["pieces"], self.pieces)
        if (begin, end) == (0, prod(tensor["shape"])) and receipt_text(receipt(values, 0)) != tensor["receipt"]:
            raise ValueError(f"checkpoint {self.folder}: {key} is not what was saved; use an earlier one")
        return values


class TransformersSource:
    """A folder that transformers' `save_pretrained` or our export wrote: one file, or several with an index."""

    def __init__(self, folder: Folder, scratch: Path):
        self.folder = folder
        self.scratch = scratch
        self.readers: dict[str, safe_open] = {}
        self.model, self.vocab_size = from_config(_json(folder, "config.json"))
        self.files = self._files()
        stacked = any(name.endswith("experts.gate_up_proj") for name in self.files)
        self.parts = tensors(self.model, self.vocab_size, stacked)
        self._check({part.name: part.shape for parts in self.parts.values() for part in parts} | zeros(self.model))

    def identity(self) -> str:
        names = ("config.json", *sorted(set(self.files.values())))
        return hashlib.sha256(
            "".join(digest_of_file(self.folder.fetch(name, self.scratch)) for name in names).encode()
        ).hexdigest()

    def tokenizer(self) -> bytes | None:
        return self.folder.read("tokenizer.json") if self.folder.exists("tokenizer.json") else None

    def _files(self) -> Mapping[str, str]:
        """The file of each tensor."""
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
        """ValueError unless the files hold exactly the tensors that config.json tells of, in their shapes."""
        missing, more = sorted(expected.keys() - self.files.keys()), sorted(self.files.keys() - expected.keys())
        if missing or more:
            said = [f"no {name}" for name in missing[:1]] + [
                f"a tensor {name}, which such a model has not" for name in more[:1]
            ]
            raise ValueError(
                f"its files have {' and '.join(said)} ({len(missing)} missing, {len(more)} too many); save config and weights together"
            )
        for name, shape in expected.items():
            found = tuple(self._slice(name).get_shape())
            if found != shape:
                raise ValueError(
                    f"{name} is {found} in its file and {shape} by config.json; save config and weights together"
                )
        for name in zeros(self.model):
            if torch.count_nonzero(self._reader(self.files[name]).get_tensor(name)):
                raise ValueError(
                    f"{name} is not zero, and ours has no such gate; only shared experts without one are possible"
                )

    def _reader(self, file: str) -> safe_open:
        if file not in self.readers:
            if not self.folder.exists(file):
                raise ValueError(f"the folder has no {file}, which its index names; copy the whole folder")
            try:
                self.readers[file] = safe_open(self.folder.fetch(file, self.scratch), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is no safetensors file ({error}); copy it again") from None
        return self.readers[file]

    def _slice(self, name: str) -> TensorSlice:
        try:
            return self._reader(self.files[name]).get_slice(name)
        except SafetensorError:
            raise ValueError(
                f"{self.files[name]} has no {name}, which the index says it has; copy the whole folder"
            ) from None

    def shape(self, name: str) -> tuple[int, ...] | None:
        parts = self.parts.get(name)
        if parts is None or len(parts) == 1:
            return parts and parts[0].shape
        return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def read(self, name: str, begin: int, end: int) -> Tensor:
        found, start = [torch.empty(0)], 0
        for part in self.parts[name]:
            low, high = max(begin - start, 0), min(end - start, prod(part.shape))
            if low < high:
                found.append(self._range(part, low, high))
            start += prod(part.shape)
        return torch.cat(found)

    def _range(self, part: Part, low: int, high: int) -> Tensor:
        """Elements `low` to before `high` of one tensor, reading no more than the rows that hold them."""
        row = prod(part.shape[1:])
        first = low // row
        values: Tensor = (
            self._slice(part.name)[first : -(-high // row)].float().flatten()[low - first * row : high - first * row]
        )
        return values if part.scale == 1 else values / part.scale


def _json(folder: Folder, name: str) -> dict[str, Any]:
    try:
        values = json.loads(folder.read(name))
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}); copy it again") from None
    return dict(values)
