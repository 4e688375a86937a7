"""The job of a small proof of the mixture of experts, and its variants."""

from pathlib import Path
from typing import Any

from conftest import tiny_job

from launch.prove.variants import variants
from trainer.config import RunConfig
from trainer.parsing import parse


def moe_job(corpus: Path, **changes: Any) -> dict[str, Any]:
    """A job of four steps whose experts drop no token."""
    job = tiny_job(corpus, stop={"steps": 4}, tracking={"enabled": False}, engine={"name": "accelerate"}) | changes
    job["objective"]["model"]["moe"]["capacity_factor"] = None
    return job


def variants_of(corpus: Path, **changes: Any) -> dict[str, RunConfig]:
    """The variants that the proof of that job trains."""
    run = parse(RunConfig, moe_job(corpus, **changes), "run")
    assert run.objective.model.moe is not None
    return variants(run, run.objective.model.moe, (2, 8))
