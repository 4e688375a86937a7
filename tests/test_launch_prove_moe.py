"""The proof of the MoE: intervals against SciPy's paired test, and a small proof in full.

The variants differ in their experts alone.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from moe_variants import moe_job, variants_of
from rich.console import Console
from scipy.stats import ttest_rel

from launch.prove.moe import Options, Speed, prove, short_run, steps_that_fit
from launch.prove.moe_report import sentence
from launch.prove.paired import lead
from launch.prove.side_by_side import named, summaries
from launch.prove.variants import CURVE
from models.moe.layer import MoELayer
from models.transformer.cost import flops_per_token, parameters
from models.transformer.model import Transformer
from trainer.worker.main import build_training
from trainer.world import joined


def test_interval_is_that_of_the_paired_t_test() -> None:
    theirs = [1.52, 1.49, 1.55, 1.50]
    ours = [1.45, 1.46, 1.47, 1.47]
    found = lead(theirs, ours)
    test = ttest_rel(theirs, ours)
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high, found.n) == (pytest.approx(interval.low), pytest.approx(interval.high), 4)
    assert found.mean == pytest.approx(sum(theirs) / 4 - sum(ours) / 4)
    assert (test.pvalue < 0.05) == (found.verdict == "ahead")


@pytest.mark.parametrize(
    ("ours", "verdict"), [([1.0, 1.1, 1.2], "ahead"), ([3.0, 3.1, 3.2], "behind"), ([1.0, 2.1, 3.2], "not decided")]
)
def test_verdict_follows_from_where_the_interval_lies(ours: list[float], verdict: str) -> None:
    found = lead([2.0, 2.11, 2.2], ours)
    assert found.verdict == verdict
    assert verdict.split()[0] in sentence("ours", "theirs", found)


def test_variants_differ_in_their_experts_alone(corpus: Path) -> None:
    runs = variants_of(corpus)
    assert list(runs) == ["dense", "2 experts", "4 experts", "8 experts", "frozen router", "permuted router"]
    reference = runs["4 experts"]
    for run in runs.values():
        model = replace(run.objective.model, moe=reference.objective.model.moe, ffn=reference.objective.model.ffn)
        assert replace(run, objective=replace(run.objective, model=model)) == reference
    for name, control in (("frozen router", "frozen"), ("permuted router", "permuted")):
        moe = runs[name].objective.model.moe
        assert moe is not None
        assert (moe.control, replace(moe, control="none")) == (control, reference.objective.model.moe)


@pytest.mark.parametrize("layers", ["all", "alternate"])
def test_dense_model_costs_no_less_than_any_other_and_not_a_unit_more(corpus: Path, layers: str) -> None:
    job = moe_job(corpus)
    job["objective"]["model"] |= {"moe_layers": layers, "layers": 4}
    models = {name: run.objective.model for name, run in variants_of(corpus, **job).items()}
    cost = {name: flops_per_token(model, 257, 32) for name, model in models.items()}
    assert cost["dense"] >= max(cost.values())
    dense = models["dense"]
    assert flops_per_token(replace(dense, ffn=dense.ffn - 1), 257, 32) < max(
        value for name, value in cost.items() if name != "dense"
    )
    assert parameters(dense, 257).total == sum(each.numel() for each in Transformer(dense, 257).parameters())


def test_a_seed_gives_all_variants_the_same_start_and_the_same_data(corpus: Path) -> None:
    states = []
    batches = []
    with joined("cpu", threads=1) as world:
        for run in variants_of(corpus).values():
            training = build_training(run, world)
            stream = training.objective.stream(_share(), None)
            batches.append(next(iter(stream)).micro_batches[0]["tokens"])
            stream.close()
            network = training.objective.networks["model"]
            assert isinstance(network, Transformer)
            assert sum(isinstance(module, MoELayer) for module in network.modules()) in (0, 2)
            states.append({name: weight.detach() for name, weight in network.named_parameters() if ".ffn." not in name})
    for state, batch in zip(states[1:], batches[1:], strict=True):
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())
        assert torch.equal(batch, batches[0])


def _share() -> Any:
    from data.share import Share

    return Share(rank=0, world=1, global_batch=16, micro_batch=4)


@pytest.mark.slow
def test_a_small_proof_in_full_and_again(corpus: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    folder = tmp_path / "proof"
    job.write_text(yaml.safe_dump({"run": moe_job(corpus)}))
    options = Options(experts="4", seeds=2, processes=2, minutes=None, folder=str(folder))
    console = Console(width=160, record=True)
    prove(console, str(job), [], options)
    results = json.loads((folder / "results.json").read_text())
    losses = {each["name"]: each["losses"] for each in results["variants"]}
    for name, values in losses.items():
        for seed, value in enumerate(values):
            (run,) = (folder / "runs").glob(f"{name.replace(' ', '-')}-seed{seed}-*")
            assert json.loads((run / "summary.json").read_text())["eval"]["cross_entropy"] == value
            assert (
                len({step for step, _ in next(each for each in results["variants"] if each["name"] == name)["curve"]})
                == 4
            )
    assert len({value for values in losses.values() for value in values}) == 8, "two runs are the same"
    leads = {(each["of"], each["over"]): each for each in results["leads"]}
    assert set(leads) == {("4 experts", "dense"), ("4 experts", "permuted router"), ("4 experts", "frozen router")} | {
        (control, "dense") for control in ("permuted router", "frozen router")
    }
    test = ttest_rel(losses["dense"], losses["4 experts"])
    assert leads["4 experts", "dense"]["low"] == pytest.approx(test.confidence_interval(0.95).low)
    printed = console.export_text()
    assert "8 of 8 runs" in printed
    assert f"{leads['4 experts', 'dense']['mean']:+.4f}" in printed
    assert (folder / "proof.png").read_bytes().startswith(b"\x89PNG")

    (lost,) = (folder / "runs").glob("dense-seed1-*")
    written = {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/summary.json")}
    (lost / "summary.json").unlink()
    again = Console(width=160, record=True)
    prove(again, str(job), [], options)
    assert "7 of 8 runs are there already" in again.export_text()
    assert [path.parent.name for path, when in written.items() if path.stat().st_mtime_ns != when] == [lost.name]
    assert json.loads((folder / "results.json").read_text())["variants"] == results["variants"]


@pytest.mark.slow
def test_sigterm_to_the_command_ends_its_runs_with_checkpoints(corpus: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    folder = tmp_path / "proof"
    job.write_text(yaml.safe_dump({"run": moe_job(corpus, stop={"steps": 1_000_000})}))
    arguments = [
        "prove",
        "moe",
        "--job",
        str(job),
        "--experts",
        "4",
        "--seeds",
        "2",
        "--processes",
        "2",
        "--folder",
        str(folder),
    ]
    command = psutil.Popen(
        [sys.executable, "-m", "launch.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 90
    while len(list((folder / "runs").glob("*/metrics.jsonl"))) < 2:
        assert command.poll() is None, command.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    runs = command.children(recursive=True)
    command.terminate()
    printed, _ = command.communicate(timeout=60)
    assert command.returncode == 2, printed
    assert "give the same command again" in printed
    assert not psutil.wait_procs(runs, timeout=10)[1]
    assert len(list((folder / "runs").glob("*/checkpoints/step-*/manifest.json"))) == 2


def test_steps_that_fit_use_the_time_that_is_left(corpus: Path, tmp_path: Path) -> None:
    run = named(short_run(variants_of(corpus, evaluate={"samples": 0})["4 experts"]), "speed", str(tmp_path))
    (summary,) = summaries(Console(), [run], 1, "speed")
    speed = Speed.of(summary)
    assert min(speed.start_s, speed.step_s, speed.hooks_s) > 0
    assert 60 * speed.step_s + speed.hooks_s <= summary["train_seconds"], "no time is counted twice"
    seeds = 3
    processes = 2
    minutes = 10.0
    count = 4
    steps = steps_that_fit(minutes, [speed] * count, seeds, processes)

    def minutes_of(steps: int) -> float:
        return (
            count
            * (speed.total_s + seeds * (speed.start_s + CURVE * speed.hooks_s + speed.step_s * steps))
            / processes
            / 60
        )

    assert minutes_of(steps) <= 0.95 * minutes < minutes_of(steps + 1)
    with pytest.raises(ValueError, match=r"--minutes: 0\.1 is too short"):
        steps_that_fit(0.1, [speed] * count, seeds, processes)


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({}, {"seeds": 1}, "--seeds: 1"),
        ({}, {"processes": 0}, "--processes: 0"),
        ({}, {"experts": "1,4"}, "--experts: '1,4'"),
        ({}, {"experts": "many"}, "--experts: 'many'"),
        ({"stop": {"hours": 1}, "optimizer": {"schedule": {"name": "constant"}}}, {}, "run.stop.steps"),
    ],
)
def test_wrong_proofs_are_refused(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], flags: dict[str, Any], words: str
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({"run": moe_job(corpus) | changes}))
    with pytest.raises(ValueError, match=words):
        prove(
            Console(),
            str(job),
            [],
            Options(
                **(
                    {"experts": "4", "seeds": 2, "processes": 1, "minutes": None, "folder": str(tmp_path / "proof")}
                    | flags
                )
            ),
        )
