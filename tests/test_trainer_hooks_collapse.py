"""Collapsed routing is noticed and acted on, alike in every layout and across a resume.

The collapse is planted by hand after the first step.
"""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_job
from distributed import run_distributed
from training_state import whole_state

from models.moe.layer import MoEConfig
from models.moe.policies import ExpertChoiceRouting, SwitchRouting, TopKRouting
from models.moe.watch import CollapseConfig, RaiseBalanceLoss, RoutingWatch, build_watch
from trainer.endings import Ending
from trainer.run_rows import EventKind

LAYER = 1
BUSIEST = 2
PATIENCE = 3
EVENT_STEP = 4
STEPS = 8
LAYOUTS = {1: [(1, 0)], 2: [(2, 0), (2, 2), (1, 1), (1, 3)]}
"""(EP, ZeRO) for each world."""


def job_of(corpus: Path, action: dict[str, Any], **run: Any) -> dict[str, Any]:
    constant = {"lr": 2e-4, "schedule": {"name": "constant"}}
    job = copy.deepcopy(tiny_job(corpus, stop={"steps": STEPS}, optimizer=constant, tracking={"enabled": False}) | run)
    job["objective"]["model"]["moe"]["z_loss"] = 0.0  # it would undo the planted collapse
    job["objective"]["collapse"] = {"share": 0.9, "steps": PATIENCE, "action": action}
    return job


def plant(training: Any) -> None:
    """After step 1, make the router of one layer send every token to one expert.

    The engine may keep its weights in any form.
    """
    if training.step != 1:
        return
    width = training.objective.config.model.d_model
    for fragment in training.engines["model"].fragments():
        index = torch.arange(fragment.start, fragment.start + fragment.values.numel())
        row = index // width
        first = index % width == 0
        if fragment.key == "weight/embedding.weight":
            fragment.values[first] = 0.6
        if fragment.key == f"weight/blocks.{LAYER}.ffn.router.weight":
            fragment.values[first] = torch.where(row == BUSIEST, 8.0, 0.0)[first]
    training.engines["model"].refresh()


def run(
    world: Any, jobs: dict[str, dict[str, Any]], layouts: list[tuple[int, int]]
) -> dict[str, dict[tuple[int, int], dict[str, Any]]]:
    return {name: run_layouts(world, job, layouts) for name, job in jobs.items()}


def run_layouts(
    world: Any, job: dict[str, Any], layouts: list[tuple[int, int]]
) -> dict[tuple[int, int], dict[str, Any]]:
    """Return losses, loads, messages and logs for every (EP, ZeRO).

    All of the training state before and after the first event comes with them.
    """
    from data.share import Share
    from trainer.config import RunConfig
    from trainer.core.loop import fit
    from trainer.core.training import Hook, over_ranks
    from trainer.hooks.collapse import collapse_hooks
    from trainer.parsing import parse
    from trainer.worker.main import build_training

    class Noted:
        def __init__(self) -> None:
            self.logged: list[tuple[int, dict[str, float]]] = []

        def log(self, step: int, metrics: dict[str, float]) -> None:
            self.logged.append((step, metrics))

    found = {}
    for ep, zero in layouts:
        config = parse(RunConfig, job | {"engine": {"name": "deepspeed", "zero": zero, "ep": ep}}, "run")
        training = build_training(config, world)
        tracker = Noted()
        said = []
        result: dict[str, Any] = {"losses": [], "loads": [], "said": said, "logged": tracker.logged, "states": []}

        def note(training: Any, result: dict[str, Any] = result) -> None:
            sums = over_ranks(training.sums, training.world)
            training.sums = {}
            result["losses"].append(training.objective.report(sums)["loss"])
            result["loads"].append(sums["load_LE"])

        def keep(training: Any, result: dict[str, Any] = result) -> None:
            if training.step == EVENT_STEP:
                result["states"].append(whole_state(training))

        def hear(kind: EventKind, text: str, step: int | None = None, said: list[str] = said) -> None:
            assert kind is EventKind.COLLAPSE
            said.append(text)

        hooks = [Hook(1, note), Hook(1, plant), Hook(1, keep), *collapse_hooks(training, tracker, hear), Hook(1, keep)]
        share = Share(
            rank=world.rank,
            world=world.size,
            global_batch=config.batch.global_batch,
            micro_batch=config.batch.micro_batch,
        )
        stream = training.objective.stream(share, None)
        fit(training, stream, STEPS, hooks)
        stream.close()
        found[ep, zero] = result | {
            "stopped": training.stopped,
            "step": training.step,
            "raised": training.objective.watch.raised_L.clone(),
        }
    return found


ACTIONS = [
    {"name": "warn"},
    {"name": "raise_balance_loss", "factor": 2.0, "most": 3.0},
    {"name": "reinit_dead_experts"},
    {"name": "stop"},
]


@cache
def all_results(world: int, corpus: Path) -> list[dict[str, dict[tuple[int, int], dict[str, Any]]]]:
    return run_distributed(run, world, {action["name"]: job_of(corpus, action) for action in ACTIONS}, LAYOUTS[world])


def results(world: int, corpus: Path, action: dict[str, Any]) -> list[dict[tuple[int, int], dict[str, Any]]]:
    """What each rank found for one action, in every layout."""
    return [rank[action["name"]] for rank in all_results(world, corpus)]


each_layout = pytest.mark.parametrize("layout", LAYOUTS[2])


@each_layout
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action["name"])
def test_all_ranks_and_layouts_say_and_do_the_same(
    action: dict[str, Any], layout: tuple[int, int], corpus: Path
) -> None:
    reference = results(1, corpus, action)[0][1, 0]
    for rank in results(2, corpus, action):
        found = rank[layout]
        for name in ("said", "logged", "stopped", "step"):
            assert found[name] == reference[name], name
        assert found["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert torch.equal(found["raised"], reference["raised"])
        assert all(torch.equal(*pair) for pair in zip(found["loads"], reference["loads"], strict=True))


def test_warn_speaks_every_so_many_steps(corpus: Path) -> None:
    found = results(1, corpus, ACTIONS[0])[0][1, 0]
    assert [step for step, _ in found["logged"]] == [EVENT_STEP, EVENT_STEP + PATIENCE]
    assert all(
        figures.keys() == {f"collapse/layer{LAYER}"} and figures[f"collapse/layer{LAYER}"] > 0.9
        for _, figures in found["logged"]
    )
    assert found["said"][0].startswith(
        f"step {EVENT_STEP}: routing collapse in layer {LAYER}: "
        f"expert {BUSIEST} got over 90% of the tokens for {PATIENCE} steps"
    )
    assert torch.equal(found["raised"], torch.ones(2))


def test_the_balance_loss_is_raised_up_to_its_bound(corpus: Path) -> None:
    found, warned = (results(1, corpus, action)[0][1, 0] for action in (ACTIONS[1], ACTIONS[0]))
    assert found["raised"].tolist() == [1.0, 3.0]
    assert "now counts 2 times" in found["said"][0]
    assert "now counts 3 times" in found["said"][1]
    assert found["losses"][:EVENT_STEP] == warned["losses"][:EVENT_STEP]
    balance = (
        found["losses"][EVENT_STEP] - warned["losses"][EVENT_STEP]
    )  # one more time 0.01 E f P, with f and P near 1
    assert balance == pytest.approx(0.04, rel=0.1)


def test_stop_ends_the_run(corpus: Path) -> None:
    found = results(1, corpus, ACTIONS[3])[0][1, 0]
    assert found["step"] == EVENT_STEP
    assert found["stopped"].ending is Ending.COLLAPSED
    assert "routing collapse in layer 1" in found["stopped"].detail


@pytest.mark.parametrize(
    ("world", "layout"), [(world, layout) for world, layouts in LAYOUTS.items() for layout in layouts]
)
def test_dead_experts_start_anew(world: int, layout: tuple[int, int], corpus: Path) -> None:
    """Weights are drawn alike in every layout, and the moments of the old ones are gone.

    All else is untouched, and tokens come from the next step on.
    """
    action = ACTIONS[2]
    found = results(world, corpus, action)[0][layout]
    reference = results(1, corpus, action)[0][1, 0]
    before, after = found["states"]
    dead = [expert for expert in range(4) if expert != BUSIEST]
    touched = [f"model/blocks.{LAYER}.ffn.{part}" for part in ("experts.gate_up", "experts.down", "router.weight")]
    for name in touched:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            old, new = (state[f"{kind}/{name}"].view(4, -1) for state in (before, after))
            assert torch.equal(old[BUSIEST], new[BUSIEST]), (kind, name)
            assert all(old[expert].abs().max() > 0 for expert in dead), (kind, name, "there was nothing to forget")
            if kind == "weight":
                assert not any((old[expert] == new[expert]).any() for expert in dead), name
            else:
                assert not new[dead].any(), (kind, name)
    for name in touched[:2]:
        drawn = after[f"weight/{name}"].view(4, -1)[dead]
        assert torch.equal(drawn, reference["states"][1][f"weight/{name}"].view(4, -1)[dead])
        assert drawn.std().item() == pytest.approx((0.4 / 32) ** 0.5 / (1 if "gate_up" in name else 2), rel=0.05)
    counters = "buffer/model/routing_watch."
    untouched = [key for key in before if not key.startswith(counters) and key.partition("/")[2] not in touched]
    assert all(torch.equal(before[key], after[key]) for key in untouched)
    assert "experts 0, 1, 3 are reinitialised" in found["said"][0]
    loads_E = torch.stack(found["loads"])[:, LAYER]
    assert not loads_E[EVENT_STEP - 1, dead].any()
    assert (loads_E[EVENT_STEP, dead] > 0).all(), loads_E


def whole_run(world: Any, job: dict[str, Any], resume: bool) -> dict[str, Any]:
    from trainer.config import RunConfig
    from trainer.core.training import Hook
    from trainer.parsing import parse
    from trainer.settle import prepare, resolve_run
    from trainer.worker import hooks as run_hooks
    from trainer.worker import main as worker

    made = run_hooks.collapse_hooks
    run_hooks.collapse_hooks = lambda *parts: [Hook(1, plant), *made(*parts)]
    config = resolve_run(parse(RunConfig, job, "run"), "job", world.size, resume=resume)
    if world.is_main:
        prepare(config, resume=resume)
    world.gather(None)
    printed: list[str] = []
    summary = worker._train(config, world, say=printed.append, started=0.0)
    return {"summary": summary, "printed": printed}


def test_an_event_in_a_run_and_counters_that_survive_a_resume(corpus: Path, tmp_path: Path) -> None:
    def job(name: str, steps: int) -> dict[str, Any]:
        tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db"} if name == "unbroken" else {"enabled": False}
        engine = {"name": "deepspeed", "zero": 1, "ep": 2}
        return job_of(
            corpus, ACTIONS[1], root=str(tmp_path), name=name, stop={"steps": steps}, engine=engine, tracking=tracking
        )

    unbroken = run_distributed(whole_run, 2, job("unbroken", STEPS), False)[0]
    run_distributed(whole_run, 2, job("resumed", EVENT_STEP + 1), False)
    run_distributed(whole_run, 2, job("resumed", STEPS), True)
    folders = [tmp_path / name for name in ("unbroken", "resumed")]
    events = [
        [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()] for folder in folders
    ]
    collapses = [[event for event in each if "routing collapse" in event] for each in events]
    assert [event.split(":")[0] for event in collapses[0]] == [f"step {EVENT_STEP}", f"step {EVENT_STEP + PATIENCE}"]
    assert collapses[0] == collapses[1]
    assert [line for line in unbroken["printed"] if "routing collapse" in line] == collapses[0]
    tensors = [
        json.loads((folder / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())["tensors"]
        for folder in folders
    ]
    receipts = [{key: tensor["receipt"] for key, tensor in each.items()} for each in tensors]
    assert receipts[0] == receipts[1]
    assert {f"buffer/model/routing_watch.{name}" for name in ("over_LE", "idle_LE", "raised_L")} <= receipts[0].keys()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    history = client.get_metric_history((folders[0] / "mlflow_run_id").read_text(), f"collapse/layer{LAYER}")
    assert [point.step for point in history] == [EVENT_STEP, EVENT_STEP + PATIENCE]


def test_the_watch_counts_steps_in_a_row() -> None:
    watch = RoutingWatch(CollapseConfig(share=0.6, steps=2), per_token=1, layers=2, experts=3)
    for load_LE in ([[7, 3, 0], [4, 3, 3]], [[9, 1, 0], [0, 9, 1]], [[5, 5, 0], [0, 9, 1]]):
        watch.count(torch.tensor(load_LE, dtype=torch.float32))
    assert watch.over_LE.tolist() == [[0, 0, 0], [0, 2, 0]]
    assert watch.idle_LE.tolist() == [[0, 0, 3], [2, 0, 0]]


def test_an_equal_share_is_no_collapse() -> None:
    watch = build_watch(
        CollapseConfig(share=0.4, steps=1), MoEConfig(experts=2, ffn=4, router=TopKRouting(k=2)), layers=1
    )
    assert watch is not None
    watch.count(torch.tensor([[10.0, 10.0]]))
    assert not watch.over_LE.any()


def test_what_cannot_be_watched_or_raised() -> None:
    assert build_watch(CollapseConfig(), None, layers=0) is None
    assert (
        build_watch(
            CollapseConfig(), MoEConfig(experts=2, ffn=4, router=ExpertChoiceRouting(experts_per_token=1)), layers=1
        )
        is None
    )
    with pytest.raises(ValueError, match="balance_loss is 0"):
        build_watch(
            CollapseConfig(action=RaiseBalanceLoss()),
            MoEConfig(experts=2, ffn=4, router=SwitchRouting(), balance_loss=0.0),
            layers=1,
        )
    for wrong in ({"share": 0.0}, {"share": 1.1}, {"steps": 0}):
        with pytest.raises(ValueError, match="share is"):
            CollapseConfig(**wrong)
    with pytest.raises(ValueError, match="factor is"):
        RaiseBalanceLoss(factor=4.0, most=2.0)
