"""`switchwork export`: a run's weights in a Hugging Face format, in one process without Ray."""

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from trainer.core.protocols import Objective
from trainer.inference.diffusers_export import check_diffusers, write_diffusers
from trainer.inference.load import load_objective
from trainer.inference.transformers_export import check_exportable, write_transformers
from trainer.objectives.config import ExportFormat, ObjectiveConfig
from trainer.settle import find_run, read_run
from trainer.storage import Folder, absolute, check_writable


@dataclass(frozen=True)
class Writer:
    """The functions that check for a format and write it."""

    check: Callable[[ObjectiveConfig], None]
    """Raises ValueError, before weights are read, for a network that the format cannot hold."""
    write: Callable[[Objective, Folder], list[str]]
    """Fills an empty folder; returns a line per property of the run that the format cannot hold."""
    loaded_by: str
    """The function that loads the folder."""


WRITERS: dict[ExportFormat, Writer] = {
    "transformers": Writer(check_exportable, write_transformers, "transformers.AutoModelForCausalLM.from_pretrained"),
    "diffusers": Writer(check_diffusers, write_diffusers, "diffusers.DDPMPipeline.from_pretrained"),
}


def export(console: Console, run: str, to: str) -> None:
    """Write the last checkpoint of `run` to the new or empty folder `to`.

    Raises ValueError if `to` has files in it, or if no format can hold the networks.
    """
    folder = find_run(run)
    target = Folder(absolute(to))
    config = read_run(folder)
    if target.names():
        raise ValueError(f"--to: {to} is not empty; name a new folder")
    kind = config.objective.export_format
    if kind is None:
        raise ValueError(
            f"run {folder}: no format elsewhere holds a {config.objective.name}; "
            "read its checkpoints (safetensors and JSON)"
        )
    writer = WRITERS[kind]
    writer.check(config.objective)
    objective, step = load_objective(config, folder, console.print)
    check_writable(target.url, "--to")
    notes = writer.write(objective, target)
    console.print(f"{config.name}, step {step}, to {target}: {writer.loaded_by} loads it", markup=False)
    for note in notes:
        console.print(f"note: {note}", markup=False)
