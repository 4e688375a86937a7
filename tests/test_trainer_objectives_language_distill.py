"""Distillation: the loss against NumPy, the same in every layout, resumed to the bit.

A start is the teacher's, and teachers that do not fit are refused.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_job
from distributed import run_distributed
from loss_curves import trained
from machines import MACHINE
from rich.console import Console
from saved_runs import SWITCH, begun, job_of, model_of, save_run, started_state, tokens
from torch import nn
from training_state import whole_state
from whole_runs import resume, train

from data.share import Share
from launch.audit.report import likely_causes
from launch.commands.eval import evaluate_run
from launch.commands.export import export
from launch.commands.sample import show_samples
from models.init import initialise
from models.transformer.cost import forward_flops_per_token
from trainer.audit.evidence import Evidence
from trainer.audit.verdict import judge
from trainer.checkpoint import fragments as shards
from trainer.checkpoint.save import CheckpointConfig, Checkpointer
from trainer.config import RunConfig
from trainer.inference.load import ALONE, load_objective
from trainer.objectives import build_objective
from trainer.objectives.language.teacher import load_teacher
from trainer.parsing import parse
from trainer.planning.estimate import estimate
from trainer.planning.layout import Part
from trainer.settle import read_run, resolve_run
from trainer.storage import Folder
from trainer.world import joined

MIXED = {"qk_norm": True, "moe": SWITCH, "moe_layers": [0, 2]}
"""The teacher: experts, a dense layer, experts."""


def student_of(
    corpus: Path, root: Path, name: str, taught_by: Path | str, model: dict[str, Any] | None = None, **objective: Any
) -> dict[str, Any]:
    job = job_of(corpus, root, name, model or {"qk_norm": True}, **objective)
    job["objective"] |= {"name": "distill", "teacher": str(taught_by)}
    return job


def objective_of(job: dict[str, Any]) -> Any:
    run = parse(RunConfig, job, "run")
    objective = build_objective(run.objective, run.seed)
    initialise(objective.networks["model"], run.seed)
    return objective


@pytest.fixture(scope="module")
def root(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `teacher`, its export `exported`, and the run `masked`."""
    root = tmp_path_factory.mktemp("teachers")
    export(Console(quiet=True), str(save_run(job_of(corpus, root, "teacher", MIXED))), str(root / "exported"))
    masked = job_of(corpus, root, "masked", {"causal": False})
    masked["objective"]["name"] = "masked_lm"
    del masked["objective"]["sample_tokens"]
    save_run(masked)
    return root


class Given(nn.Module):
    """A network that answers any text with these logits."""

    def __init__(self, logits_BTV: torch.Tensor):
        super().__init__()
        self.logits_BTV = nn.Parameter(logits_BTV)

    def forward(self, inputs_BT: Any, samples_B: Any, segments_BT: Any, seed: int) -> tuple[torch.Tensor, tuple[()]]:
        return self.logits_BTV, ()


def softmax(x: Any) -> Any:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.25, 1.0), (0.7, 2.0), (1.0, 0.5)])
def test_loss_and_gradient_are_those_of_the_formula(alpha: float, temperature: float, root: Path, corpus: Path) -> None:
    objective = objective_of(student_of(corpus, root, "s", root / "teacher", alpha=alpha, kl_temperature=temperature))
    generator = torch.Generator().manual_seed(5)
    batch = {"tokens": tokens(4), "sample": torch.arange(4), "mask": torch.rand(4, 23, generator=generator) < 0.7}
    net = Given(3 * torch.randn(4, 23, 258, generator=generator, dtype=torch.float64))
    loss, sums = objective.loss("model", net, batch, 0)
    loss.backward()

    z = net.logits_BTV.detach().numpy()
    counts = batch["mask"].numpy()
    target = batch["tokens"][:, 1:].numpy()
    with torch.no_grad():
        taught = model_of(root / "teacher")(batch["tokens"][:, :-1])[0].double().numpy()
    p = softmax(taught / temperature)
    soft = softmax(z / temperature)
    plain = softmax(z)
    hit = np.eye(258)[target]
    cross_entropy = -(hit * np.log(plain)).sum(-1)
    kl = (p * np.log(p / soft)).sum(-1)
    assert loss.item() == pytest.approx(
        (counts * ((1 - alpha) * cross_entropy + alpha * temperature**2 * kl)).sum(), rel=1e-9
    )
    assert net.logits_BTV.grad is not None
    expected = counts[..., None] * ((1 - alpha) * (plain - hit) + alpha * temperature * (soft - p))
    np.testing.assert_allclose(net.logits_BTV.grad.numpy(), expected, atol=1e-9)

    figures = objective.report(sums)
    assert figures["cross_entropy"] == pytest.approx((counts * cross_entropy).sum() / counts.sum(), rel=1e-6)
    assert figures["teacher_kl"] == pytest.approx((counts * kl).sum() / counts.sum(), rel=1e-9)
    assert figures["teacher_agreement"] == pytest.approx(
        (counts * (taught.argmax(-1) == z.argmax(-1))).sum() / counts.sum()
    )
    assert objective.weight("model", batch) == counts.sum()


@pytest.mark.parametrize("folder", ["teacher", "exported"])
def test_the_teacher_is_what_lies_in_the_folder_whole_and_frozen(folder: str, root: Path, corpus: Path) -> None:
    objective = objective_of(student_of(corpus, root, "s", root / folder))
    before = torch.get_rng_state()
    assert not objective.teacher.training
    assert not any(parameter.requires_grad for parameter in objective.teacher.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(objective.teacher(tokens())[0], model_of(root / "teacher")(tokens())[0])
    assert list(objective.networks) == ["model"]
    assert not any(objective.teacher is module for module in objective.model.modules())


def test_held_out_data_are_measured_as_without_a_teacher_even_where_there_is_none(root: Path, corpus: Path) -> None:
    plain = objective_of(job_of(corpus, root, "p", {"qk_norm": True}))
    student = objective_of(student_of(corpus, root, "s", "nowhere"))
    batch = next(iter(plain.held_out(Share(rank=0, world=1, global_batch=4, micro_batch=4))))
    expected, found = (each.evaluate(each.networks, batch) for each in (plain, student))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def curves(
    world: Any, jobs: list[dict[str, Any]], steps: int
) -> list[tuple[list[tuple[float, float]], dict[str, torch.Tensor]]]:
    """Of each of `jobs`, loss and gradient norm by step, and the weights after the last."""
    found = []
    for job in jobs:
        training, curve = trained(world, job, steps)
        found.append((curve, {key: value for key, value in whole_state(training).items() if key.startswith("weight/")}))
    return found


ENGINES: list[tuple[int, dict[str, Any]]] = [
    (world, {"name": "deepspeed", "zero": zero, "ep": ep})
    for world, sizes in {1: [1], 2: [1, 2], 4: [1, 2, 4]}.items()
    for ep in sizes
    for zero in ((0, 1, 2, 3) if ep == 1 else (0, 1, 2))
]
ENGINES += [(2, {"name": "accelerate"})]
QUICK = [(2, {"name": "deepspeed", "zero": 1, "ep": 2})]
STEPS = 8


def switch_student(corpus: Path, root: Path, engine: dict[str, Any], **batch: int) -> dict[str, Any]:
    """A student with experts of its own, whose first weights are the seed's."""
    job = tiny_job(corpus, engine=engine, batch={"global_batch": 16, "micro_batch": 4} | batch)
    job["objective"] |= {
        "name": "distill",
        "teacher": str(root / "teacher"),
        "alpha": 0.5,
        "kl_temperature": 2.0,
        "init_from_teacher": False,
    }
    return job


@cache
def reference(corpus: Path, root: Path) -> list[tuple[float, float]]:
    """One process, in one micro-batch."""
    with joined(device="cpu", threads=1) as world:
        return curves(world, [switch_student(corpus, root, {"name": "accelerate"}, micro_batch=16)], STEPS)[0][0]


@cache
def of_world(world: int, quick: bool, corpus: Path, root: Path) -> list[list[tuple[float, float]]]:
    engines = [engine for size, engine in (QUICK if quick else ENGINES) if size == world]
    return [
        curve
        for curve, _ in run_distributed(
            curves, world, [switch_student(corpus, root, engine) for engine in engines], STEPS
        )[0]
    ]


@pytest.mark.parametrize(
    ("world", "quick"), [(2, True), *(pytest.param(world, False, marks=pytest.mark.slow) for world in (1, 2, 4))]
)
def test_losses_do_not_depend_on_the_layout(world: int, quick: bool, root: Path, corpus: Path) -> None:
    expected = reference(corpus, root)
    assert expected[-1][0] < expected[0][0] - 0.1, "the reference does not learn, so equality would say little"
    for curve in of_world(world, quick, corpus, root):
        assert len(curve) == STEPS
        for (loss, norm), (expected_loss, expected_norm) in zip(curve, expected, strict=True):
            assert loss == pytest.approx(expected_loss, abs=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_without_the_teachers_share_it_is_the_plain_run_to_the_bit(root: Path, corpus: Path) -> None:
    plain = job_of(corpus, root, "p", {"qk_norm": True})
    student = student_of(corpus, root, "s", root / "teacher", alpha=0.0, init_from_teacher=False)
    taught = student_of(corpus, root, "t", root / "teacher", alpha=0.25, init_from_teacher=False)
    with joined(device="cpu", threads=1) as world:
        (_, expected), (_, found), (_, other) = curves(world, [plain, student, taught], 3)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert any(not torch.equal(other[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("model", "attention"), [({}, True), ({"heads": 2, "kv_heads": 1}, False)], ids=["same heads", "other heads"]
)
def test_a_student_starts_with_the_weights_outside_experts_that_are_alike(
    model: dict[str, Any], attention: bool, root: Path, corpus: Path
) -> None:
    job = student_of(corpus, root, "s", root / "teacher", {"qk_norm": True} | model)
    own, found, theirs = (
        each.state_dict() for each in (objective_of(job).model, begun(job), model_of(root / "teacher"))
    )
    taken = {
        "embedding.weight",
        "head.weight",
        "norm.weight",
        *(f"blocks.1.ffn.{name}.weight" for name in ("gate", "up", "down")),
    }
    for index in range(3):
        taken |= {f"blocks.{index}.{name}.weight" for name in ("attention_norm", "ffn_norm")}
        taken |= {f"blocks.{index}.attention.{name}.weight" for name in ("qkv", "out", "q_norm", "k_norm") if attention}
    assert taken < found.keys()
    for name, value in found.items():
        assert torch.equal(value, theirs[name] if name in taken else own[name]), name


@pytest.mark.slow
def test_every_engine_starts_from_the_same_bits(root: Path, corpus: Path) -> None:
    job = student_of(corpus, root, "s", root / "teacher", MIXED | {"moe": SWITCH | {"experts": 2}})
    expected = {f"weight/model/{name}": value.detach().flatten() for name, value in begun(job).named_parameters()}
    engines: list[dict[str, Any]] = [
        {"name": "deepspeed", "zero": zero, "ep": ep} for zero, ep in ((0, 2), (1, 2), (2, 1), (3, 1))
    ]
    for state in run_distributed(started_state, 2, [job | {"engine": engine} for engine in engines])[0]:
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())


def whole_and_resumed(world: Any, whole: dict[str, Any], parted: dict[str, Any], taught_by: str) -> str:
    """Train `whole`, and `parted` in two attempts; then train the teacher further.

    Returns the complaint of the next attempt.
    """
    train(world, whole)
    train(world, parted | {"stop": {"steps": 3}})
    resume(world, parted)
    model = load_teacher(taught_by)
    model.norm.weight.data.mul_(2)
    saver = Checkpointer(Folder(taught_by) / "checkpoints", ALONE, CheckpointConfig(), attempt=0)
    saver.save(2, [fragment.named("model") for fragment in shards.weights(model)], {"step": 2})
    saver.wait()
    try:
        resume(world, parted | {"stop": {"steps": 8}})
    except ValueError as error:
        return str(error)
    return ""


def test_a_resumed_run_ends_with_the_same_bits_and_a_teacher_that_changed_is_refused(
    root: Path, corpus: Path, tmp_path: Path
) -> None:
    taught_by = tmp_path / "own_teacher"
    shutil.copytree(root / "teacher", taught_by)
    optimizer = {"lr": 0.01, "schedule": {"name": "constant"}}
    changes = {
        "stop": {"steps": 6},
        "checkpoint": {"every": 3},
        "optimizer": optimizer,
        "ema": {"decay": 0.9},
        "log_every": 1,
    }
    whole, parted = (student_of(corpus, tmp_path, name, taught_by, alpha=1.0) | changes for name in ("whole", "parted"))
    complaint = run_distributed(whole_and_resumed, 1, whole, parted, str(taught_by))[0]
    assert "run.objective.teacher: it was 'step 1, " in complaint
    assert "is 'step 2, " in complaint
    receipts = []
    for name in ("whole", "parted"):
        manifest = json.loads((tmp_path / name / "checkpoints" / "step-00000006" / "manifest.json").read_text())
        receipts.append({key: tensor["receipt"] for key, tensor in manifest["tensors"].items()})
    assert receipts[0] == receipts[1]
    assert not any("teacher" in key for key in receipts[0])
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["loss"], row["teacher_kl"]) for row in rows if "loss" in row]
    assert len(losses) == 6
    assert all(loss == pytest.approx(kl, rel=1e-6) for loss, kl in losses), (
        "alpha is 1: the teacher's loss is all of it"
    )
    assert "started with the weights outside experts" in (tmp_path / "whole" / "events.jsonl").read_text()
    _looked_at_without_its_teacher(tmp_path, taught_by)


def _looked_at_without_its_teacher(tmp_path: Path, taught_by: Path) -> None:
    shutil.rmtree(taught_by)
    console = Console(quiet=True)
    run = str(tmp_path / "whole")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert evaluate_run(console, run)["cross_entropy"] == pytest.approx(summary["eval"]["cross_entropy"], abs=1e-6)
    show_samples(console, run, 1, 0, {"temperature": 0.0})
    export(console, run, str(tmp_path / "out"))
    config = read_run(Folder(run))
    model = load_objective(config, Folder(run), print)[0].networks["model"].eval()
    with torch.no_grad():
        torch.testing.assert_close(load_teacher(str(tmp_path / "out"))(tokens())[0], model(tokens())[0], rtol=0, atol=0)
        assert torch.equal(load_teacher(run)(tokens())[0], model(tokens())[0]), "a distilled run may teach in its turn"


def test_the_plan_counts_the_teacher(root: Path, corpus: Path) -> None:
    changes: dict[str, Any] = {
        "engine": {"name": "deepspeed", "zero": 1},
        "batch": {"global_batch": 16, "micro_batch": 2},
    }
    alone = estimate(parse(RunConfig, job_of(corpus, root, "p", {"qk_norm": True}) | changes, "run"), MACHINE)
    taught = estimate(parse(RunConfig, student_of(corpus, root, "s", root / "teacher") | changes, "run"), MACHINE)
    theirs = model_of(root / "teacher")
    size = 4 * sum(parameter.numel() for parameter in theirs.parameters())
    assert taught.forecast is not None
    assert alone.forecast is not None
    needs = taught.forecast.layout.memory
    needs_alone = alone.forecast.layout.memory
    assert needs.parts[Part.TEACHER] == size
    assert needs.balanced == pytest.approx(needs_alone.balanced + size, abs=1)
    step = taught.forecast.layout.step
    step_alone = alone.forecast.layout.step
    cost = alone.parameters.transformer
    assert step is not None
    assert step_alone is not None
    assert cost is not None
    more = forward_flops_per_token(theirs.config, 258, 32) / cost.flops_per_token
    assert step.arithmetic == pytest.approx((1 + more) * step_alone.arithmetic)
    assert any("teacher" in line for line in taught.unknown)


def audited(world: Any, job: dict[str, Any]) -> Evidence:
    from trainer.audit.collect import collect

    return collect(parse(RunConfig, job, "run"), world)


@pytest.mark.slow
def test_the_audit_passes_a_student(root: Path, corpus: Path) -> None:
    job = switch_student(corpus, root, {"name": "deepspeed", "zero": 1, "ep": 2}, global_batch=8, micro_batch=2)
    findings = judge(parse(RunConfig, job, "run"), run_distributed(audited, 2, job)[0], directions=1)
    assert findings.good, likely_causes(findings)


WRONG: list[tuple[str, dict[str, Any], dict[str, Any], list[str]]] = [
    ("nowhere", {}, {}, ["run.objective.teacher: ", "nowhere", "no such folder"]),
    ("masked", {}, {}, ["run.objective.teacher: ", "restores masked tokens"]),
    ("teacher", {}, {"vocab_size": 300}, ["it has 258 tokens", "300"]),
    ("renamed", {}, {}, ["other tokens", "'<hole>' is 257 in the folder and none in the job"]),
    ("teacher", {"d_model": 32}, {}, ["no weight outside its experts", "init_from_teacher: false"]),
    ("teacher", {}, {"init_from": "elsewhere"}, ["run.objective.init_from: elsewhere", "init_from_teacher"]),
    ("teacher", {}, {"alpha": 1.5}, ["run.objective.alpha: 1.5", "0 to 1"]),
    ("teacher", {}, {"kl_temperature": 0}, ["run.objective.kl_temperature: 0", "above 0"]),
    ("teacher", {"causal": False}, {}, ["run.objective.model.causal: false", "masked_lm"]),
]


@pytest.mark.parametrize(
    ("folder", "model", "objective", "said"),
    WRONG,
    ids=[f"{folder} {model | objective}" for folder, model, objective, _ in WRONG],
)
def test_what_does_not_fit_is_refused_in_one_line(
    folder: str, model: dict[str, Any], objective: dict[str, Any], said: list[str], root: Path, corpus: Path
) -> None:
    if folder == "renamed" and not (root / folder).exists():
        shutil.copytree(root / "exported", root / folder)
        file = root / folder / "tokenizer.json"
        file.write_text(file.read_text().replace("<mask>", "<hole>"))
    with pytest.raises(ValueError) as raised:
        resolve_run(
            parse(
                RunConfig, student_of(corpus, root, "s", root / folder, {"qk_norm": True} | model, **objective), "run"
            ),
            "job",
            1,
            resume=False,
        )
    complaint = str(raised.value)
    assert "\n" not in complaint
    for word in said:
        assert word in complaint


def test_a_teacher_that_is_damaged_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "teacher", tmp_path / "cut")
    (file,) = (tmp_path / "cut" / "checkpoints" / "step-00000001").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="no intact checkpoint"):
        load_teacher(str(tmp_path / "cut"))


def test_an_absolute_folder_goes_into_the_resolved_job(
    root: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    run = resolve_run(parse(RunConfig, student_of(corpus, root, "s", "teacher"), "run"), "job", 1, resume=False)
    assert run.objective.teacher == str(root / "teacher")  # type: ignore[union-attr]
