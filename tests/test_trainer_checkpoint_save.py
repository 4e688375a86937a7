"""A checkpoint holds all of the state and loads into any layout bit for bit.

It is refused when one byte of it is wrong.
"""

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_job
from distributed import run_distributed
from training_state import whole_state

from trainer.checkpoint import format as checkpoint
from trainer.checkpoint.fragments import Fragment, receipt
from trainer.checkpoint.load import load, newest, verify
from trainer.checkpoint.save import CheckpointConfig, Checkpointer
from trainer.inference.load import ALONE
from trainer.storage import Folder

STEPS = 3


def build(world: Any, job: dict[str, Any], zero: int, ep: int) -> Any:
    from trainer.config import RunConfig
    from trainer.parsing import parse
    from trainer.worker.main import build_training

    return build_training(
        parse(RunConfig, job | {"engine": {"name": "deepspeed", "zero": zero, "ep": ep}}, "run"), world
    )


def train_and_save(world: Any, job: dict[str, Any], zero: int, ep: int, root: str) -> dict[str, torch.Tensor]:
    from data.share import Share
    from trainer.core.loop import fit
    from trainer.core.training import fragments

    training = build(world, job, zero, ep)
    batch = job["batch"]
    stream = training.objective.stream(
        Share(rank=world.rank, world=world.size, global_batch=batch["global_batch"], micro_batch=batch["micro_batch"]),
        None,
    )
    fit(training, stream, STEPS, [])
    stream.close()
    saver = Checkpointer(Folder(root), world, CheckpointConfig(), attempt=0)
    saver.save(STEPS, fragments(training), {"step": STEPS})
    saver.wait()
    world.gather(None)
    return whole_state(training)


def load_into(
    world: Any, job: dict[str, Any], layouts: list[tuple[int, int]], root: str
) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    from trainer.core.training import fragments

    found = {}
    for zero, ep in layouts:
        training = build(world, job, zero, ep)
        folder = Folder(root) / checkpoint.step_name(STEPS)
        load(folder, checkpoint.read_manifest(folder), fragments(training), world)
        for engine in training.engines.values():
            engine.refresh()
        state = whole_state(training)
        if zero < 3:  # what the network computes with must be the fp32 weights, too
            ((_, network),) = training.objective.networks.items()
            dense = {name: p for name, p in network.named_parameters() if not hasattr(p, "group_name")}
            assert all(torch.equal(p.detach().flatten(), state[f"weight/model/{name}"]) for name, p in dense.items())
        found[zero, ep] = state
    return found


@pytest.fixture(scope="module")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of four ranks with EP 2 and ZeRO 2, and the state that went into it."""
    root = tmp_path_factory.mktemp("checkpoints")
    return root, run_distributed(train_and_save, 4, tiny_job(corpus), 2, 2, str(root))[0]


@pytest.mark.parametrize(("world", "layouts"), [(1, [(0, 1), (1, 1), (3, 1)]), (2, [(0, 2), (1, 1), (2, 2), (3, 1)])])
def test_any_layout_loads_the_same_bits(
    world: int, layouts: list[tuple[int, int]], saved: tuple[Path, dict[str, torch.Tensor]], corpus: Path
) -> None:
    root, expected = saved
    for layout, state in run_distributed(load_into, world, tiny_job(corpus), layouts, str(root))[0].items():
        assert state.keys() == expected.keys(), layout
        assert all(torch.equal(state[key], expected[key]) for key in expected), layout
    moments = [key for key in expected if key.startswith("exp_avg_sq/") and "experts" in key]
    assert len(moments) == 4
    assert all(expected[key].abs().sum() > 0 for key in moments), (
        "experts' moments are zero, so equality would say little"
    )


def test_receipts_add_up_over_any_cut() -> None:
    values = torch.randn(1000)
    whole = receipt(values, 0)
    for cuts in ([0, 1, 500, 1000], [0, 333, 334, 999, 1000]):
        parts = sum(receipt(values[a:b], a) for a, b in pairwise(cuts))
        assert parts % (1 << 64) == whole
    swapped = values.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert receipt(swapped, 0) != whole


def save_alone(root: Path, step: int, values: torch.Tensor) -> Path:
    saver = Checkpointer(Folder(str(root)), ALONE, CheckpointConfig(keep=2, keep_every=4), attempt=0)
    parts = [
        Fragment("net/a", "weight", (values.numel(),), 0, values, slice(0, values.numel())),
        Fragment("net/b", "buffer", (3,), 0, torch.arange(3), slice(0, 3)),
    ]
    saver.save(step, parts, {"step": step, "note": "grüße"})
    saver.wait()
    return root / checkpoint.step_name(step)


def test_one_flipped_byte_anywhere_is_refused(tmp_path: Path) -> None:
    good = save_alone(tmp_path, 1, torch.randn(200))
    assert verify(Folder(str(good))) == []
    places = [(file.name, at) for file in sorted(good.iterdir()) for at in range(file.stat().st_size)]
    for name, at in random.Random(0).sample(places, 200):
        bad = tmp_path / "bad" / good.name
        shutil.copytree(good, bad)
        content = bytearray((bad / name).read_bytes())
        content[at] ^= 1 << (at % 8)
        (bad / name).write_bytes(content)
        assert verify(Folder(str(bad))), f"byte {at} of {name} was flipped, and nobody noticed"
        assert newest(Folder(str(tmp_path / "bad")), say=lambda line: None) is None
        shutil.rmtree(bad)


def test_a_cut_off_checkpoint_is_never_taken_for_good(tmp_path: Path) -> None:
    save_alone(tmp_path, 1, torch.randn(50))
    last = save_alone(tmp_path, 2, torch.randn(50))
    names = [file.name for file in last.iterdir()]
    for name in names:
        copy = tmp_path / "cut"
        for step in (1, 2):
            shutil.copytree(tmp_path / checkpoint.step_name(step), copy / checkpoint.step_name(step))
        (copy / last.name / name).unlink()
        said: list[str] = []
        found = newest(Folder(str(copy)), said.append)
        assert found is not None
        assert found[1]["step"] == 1
        assert last.name in said[0]
        shutil.rmtree(copy)


def test_a_forged_manifest_does_not_hide_wrong_values(tmp_path: Path) -> None:
    """Whoever changes a file and its digest still does not have the receipts of the tensors."""
    folder = save_alone(tmp_path, 1, torch.randn(50))
    other = save_alone(tmp_path / "other", 1, torch.randn(50))
    shutil.copy(other / "rank-00000.safetensors", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = json.loads((other / "manifest.json").read_text())["files"]
    manifest["digest"] = checkpoint.digest_of_manifest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert verify(Folder(str(folder))) == ["weight/net/a has another receipt than was written"]
    with pytest.raises(ValueError, match="weight/net/a"):
        load(
            Folder(str(folder)), manifest, [Fragment("net/a", "weight", (50,), 0, torch.zeros(50), slice(0, 50))], ALONE
        )


def test_old_checkpoints_go_and_every_mth_stays(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_alone(tmp_path, step, torch.randn(5))
    assert checkpoint.steps_in(Folder(str(tmp_path))) == [4, 6, 7]


def test_an_object_store_serves_as_well(tmp_path: Path) -> None:
    root = Folder("memory://runs/a/checkpoints")
    saver = Checkpointer(root, ALONE, CheckpointConfig(), attempt=0)
    values = torch.randn(30)
    saver.save(5, [Fragment("net/a", "weight", (30,), 0, values, slice(0, 30))], {"step": 5})
    saver.wait()
    found = newest(root)
    assert found is not None
    whole = torch.zeros(30)
    load(*found, [Fragment("net/a", "weight", (30,), 0, whole, slice(0, 30))], ALONE)
    assert torch.equal(whole, values)


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = Folder(str(save_alone(tmp_path, 1, torch.randn(5))))
    manifest = checkpoint.read_manifest(folder)
    with pytest.raises(ValueError, match=r"weight/net/a has shape \(5,\) in the checkpoint and \(6,\) in this job"):
        load(folder, manifest, [Fragment("net/a", "weight", (6,), 0, torch.zeros(6), slice(0, 6))], ALONE)
    with pytest.raises(ValueError, match="it has no weight/net/c"):
        load(folder, manifest, [Fragment("net/c", "weight", (6,), 0, torch.zeros(6), slice(0, 6))], ALONE)
