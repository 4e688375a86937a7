"""Whole runs of the image objectives: equal metrics across any ranks, resumed bit for bit.

They are exported, and noticed when they collapse.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_distributed
from image_jobs import DIGITS, GRID, MLP_GAN, SMALL_OBJECTIVES, SMALL_UNET, image_job
from rich.console import Console
from whole_runs import resume, train

QUALITY = {"samples": 48, "network": {"channels": [8], "features": 8}}


def in_turn(world: Any, fn: Callable[[Any, dict[str, Any]], Any], jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        fn(world, job)


def summary(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / name / "summary.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of each objective over 1 and over 2 ranks, six steps each.

    A third run on 1 rank was stopped after three steps and resumed.
    """
    root = tmp_path_factory.mktemp("runs")
    whole = {
        name: {"data": DIGITS | {"max_eval_samples": 40}, "quality": QUALITY} | objective
        for name, objective in SMALL_OBJECTIVES.items()
    }
    run_distributed(
        in_turn, 2, train, [image_job(root, f"{name}-2", objective, 6) for name, objective in whole.items()]
    )
    interrupted = [image_job(root, f"{name}-resumed", objective, 3) for name, objective in whole.items()]
    run_distributed(
        in_turn,
        1,
        train,
        [*interrupted, *(image_job(root, f"{name}-1", objective, 6) for name, objective in whole.items())],
    )
    run_distributed(in_turn, 1, resume, [job | {"stop": {"steps": 6}} for job in interrupted])
    return root


@pytest.mark.parametrize("name", SMALL_OBJECTIVES)
def test_measures_of_samples_do_not_depend_on_the_ranks(runs: Path, name: str) -> None:
    one = summary(runs, f"{name}-1")
    two = summary(runs, f"{name}-2")
    assert one["quality"]["frechet_distance"] > one["quality"]["held_out/frechet_distance"] > 0
    assert one["quality"] == pytest.approx(two["quality"], rel=1e-3, abs=1e-4)
    assert one["eval"] == pytest.approx(two["eval"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", SMALL_OBJECTIVES)
def test_a_resumed_run_ends_with_the_same_bits(runs: Path, name: str) -> None:
    """Weights, moments, averages and buffers, by their receipts."""
    receipts = []
    for run in (f"{name}-1", f"{name}-resumed"):
        manifest = json.loads((runs / run / "checkpoints" / "step-00000006" / "manifest.json").read_text())
        receipts.append({key: tensor["receipt"] for key, tensor in manifest["tensors"].items()})
    assert receipts[0] == receipts[1]
    assert any(key.startswith("ema/") for key in receipts[0])
    assert summary(runs, f"{name}-1")["eval"] == summary(runs, f"{name}-resumed")["eval"]


@pytest.mark.parametrize("name", SMALL_OBJECTIVES)
def test_there_is_something_to_look_at(runs: Path, name: str) -> None:
    files = {file.name.removeprefix("step-00000006-") for file in (runs / f"{name}-1" / "samples").iterdir()}
    expected = {
        "vae": {"prior.png", "reconstructions.png", "interpolations.png"},
        "ddpm": {"samples.png", "denoising.png"},
        "gan": {"samples.png"},
    }
    assert expected[name] <= files
    assert (runs / f"{name}-1" / "curves.png").exists()


def test_a_diffusion_run_is_exported_and_diffusers_makes_the_same_images(runs: Path, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    from launch.commands.export import export
    from models.diffusion.samplers import ddpm, timesteps
    from trainer.inference.load import load_objective
    from trainer.settle import read_run
    from trainer.storage import Folder

    objective = {
        "name": "ddpm",
        "data": DIGITS,
        "network": SMALL_UNET,
        "diffusion": {"schedule": {"steps": 12, "beta_end": 0.5}},
        "bound_timesteps": 0,
    }
    run_distributed(train, 1, image_job(runs, "exported", objective | {"sampler": {"name": "ddpm"}}, 3))
    export(Console(quiet=True), str(runs / "exported"), str(tmp_path / "out"))
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        batch_size=3, num_inference_steps=12, generator=torch.Generator().manual_seed(5), output_type="np"
    ).images

    folder = Folder(str(runs / "exported"))
    ours, _ = load_objective(read_run(folder), folder, print)
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(3, 1, 8, 8, generator=generator)
    denoise = ours._denoiser(None, 1.0)
    with torch.no_grad():
        x = ddpm(
            denoise, ours.schedule, start, timesteps(12, 12), lambda t: torch.randn(3, 1, 8, 8, generator=generator)
        )
    torch.testing.assert_close(
        (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), torch.from_numpy(theirs), atol=1e-5, rtol=0
    )


def test_a_collapsed_generator_is_an_event_of_the_run(tmp_path: Path) -> None:
    objective = {"name": "gan", "data": GRID, "network": MLP_GAN, "quality": {"samples": 100}}
    found = run_distributed(train, 1, image_job(tmp_path, "collapsed", objective, 2))[0]
    assert found["quality"]["modes"] < 12
    assert found["quality"]["perfect/modes"] > 20
    assert "collapse: samples reach" in (tmp_path / "collapsed" / "events.jsonl").read_text()


def test_a_classifier_without_classes_is_refused(tmp_path: Path) -> None:
    from trainer.config import RunConfig
    from trainer.parsing import parse

    objective = {
        "name": "vae",
        "data": {key: value for key, value in DIGITS.items() if key != "classes"},
        "quality": QUALITY,
    }
    with pytest.raises(ValueError, match=r"quality\.network: the classifier needs labels"):
        parse(RunConfig, image_job(tmp_path, "refused", objective, 1), "run")
