"""Export of a language model to a folder that transformers loads.

The folder has safetensors, config, generation config and tokenizer.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import save_torch_state_dict

from data.text.tokenizer_files import tokenizer_files
from models.moe.policies import NoisyTopKRouting
from models.transformer.hf_layout import to_config
from models.transformer.hf_names import to_transformers
from trainer.core.protocols import Objective
from trainer.objectives.config import ObjectiveConfig
from trainer.objectives.language.config import TextModelConfig
from trainer.objectives.language.objective import LanguageObjective
from trainer.storage import Folder

LARGEST_FILE = "5GB"


def check_exportable(config: ObjectiveConfig) -> None:
    """Raises ValueError, naming the field and its options, for a model outside transformers."""
    assert isinstance(config, TextModelConfig), "others have another format"
    try:
        to_config(config.trained_model, vocab_size=1, positions=1, end_of_text=0)
    except ValueError as error:
        raise ValueError(f"run.objective.{error}") from None


def write_transformers(objective: Objective, target: Folder) -> list[str]:
    """Fill the empty folder `target`.

    Returns a line for every property of the run that the folder cannot express.
    """
    assert isinstance(objective, LanguageObjective), "others have another format"
    config, tokenizer, vocab_size = objective.config, objective.tokenizer, objective.model.vocab_size
    values = to_config(config.model, vocab_size, positions=config.data.seq_len, end_of_text=tokenizer.eod)
    generation = {name: values[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = tokenizer_files(config.data.tokenizer) | {
        "config.json": _json(values),
        "generation_config.json": _json(generation),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(target.make().path) if target.is_local else Path(scratch)
        weights = to_transformers(objective.model.state_dict(), config.model, vocab_size)
        save_torch_state_dict(weights, folder, max_shard_size=LARGEST_FILE)
        for file in Path(scratch).iterdir():
            target.put(file, file.name)
    for name, content in files.items():
        target.write(name, content)
    return _left_behind(config)


def _left_behind(config: TextModelConfig) -> list[str]:
    moe, lines = config.model.moe, []
    if moe is not None and moe.eval_capacity_factor is not None:
        lines.append(f"model.moe.eval_capacity_factor is {moe.eval_capacity_factor:g}; transformers drops no token")
    if moe is not None and isinstance(moe.router, NoisyTopKRouting):
        lines.append("the router's noise, which is for training only, is left out")
    return lines


def _json(values: Mapping[str, object]) -> bytes:
    return json.dumps(values, indent=2).encode() + b"\n"
