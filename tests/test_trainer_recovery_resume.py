"""Killed, hung, out of memory, out of disk or asked to stop: the run goes on from its last checkpoint as if nothing had been, or says why it ended."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_job
from distributed import run_distributed
from test_trainer_core_anomaly import losses, train
from test_trainer_image_runs import DIGITS
from test_trainer_image_runs import OBJECTIVES as IMAGES
from test_trainer_image_runs import job_of as image_job

from trainer.config import RunConfig
from trainer.endings import UNKNOWN, Ending
from trainer.parsing import parse
from trainer.records.attempts import close_attempt, note_end, stopped_by_error
from trainer.recovery.watchdog import HUNG
from trainer.run_files import RunFiles, run_files
from trainer.run_rows import AttemptBegan
from trainer.storage import Folder
from trainer.worker.memory import OutOfMemory, out_of_memory
from trainer.world import free_port

OBJECTIVES = ["moe_lm", *(pytest.param(name, marks=pytest.mark.slow) for name in IMAGES)]


def job_of(objective: str, corpus: Path, root: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A small job of any objective, with a checkpoint every other step."""
    every = {
        "root": str(root),
        "name": name,
        "tracking": {"enabled": False},
        "checkpoint": {"every": 2},
        "evaluate": {"samples": 0},
        "threads": 1,
    }
    if objective == "moe_lm":
        return tiny_job(corpus, **every, engine={"name": "deepspeed", "zero": 1, "ep": 2}) | changes
    return image_job(root, name, {"data": DIGITS | {"max_eval_samples": 40}} | IMAGES[objective], 10) | every | changes


@contextmanager
def ranks(folder: Path, job: dict[str, Any], world: int, resume: bool = False) -> Iterator[list[subprocess.Popen[str]]]:
    """`world` processes of `python -m trainer`, as torchrun would start them; killed at the end of the block."""
    file = folder / f"{job['name']}.yaml"
    file.write_text(yaml.safe_dump({"run": job}))
    port, started = str(free_port()), []
    for rank in range(world):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, "-m", "trainer", str(file), *(["--resume"] if resume else [])]
        started.append(
            subprocess.Popen(
                command,
                env=os.environ | place,
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def ended(folder: Path) -> list[str]:
    return [str(end.stopped) for end in RunFiles(Folder(str(folder))).attempts_ended()]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_killed_at_a_random_step_and_asked_to_stop_every_later_loss_is_bit_identical(
    objective: str, corpus: Path, tmp_path: Path
) -> None:
    run_distributed(train, 2, job_of(objective, corpus, tmp_path, "unbroken"))
    step, rank = random.randint(3, 8), random.randint(0, 1)
    job = job_of(objective, corpus, tmp_path, "broken", faults=[{"name": "kill", "step": step, "rank": rank}])
    with ranks(tmp_path, job, 2) as processes:
        codes = [process.wait(200) for process in processes]
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] > 0, "the other rank waits for a dead one, or thinks that all is well"
    with ranks(tmp_path, job, 2, resume=True) as processes:
        deadline = time.monotonic() + 200
        while max(losses(tmp_path / "broken")) <= step and time.monotonic() < deadline:
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(200) for process in processes] == [0, 0]
    with ranks(tmp_path, job, 2, resume=True) as processes:
        assert [process.wait(200) for process in processes] == [0, 0], processes[0].communicate()[0]
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken"), f"rank {rank} was killed after step {step}"
    causes = ended(tmp_path / "broken")
    assert len(causes) == 3
    assert causes[1] in ("SIGTERM", "all steps done")


def test_a_hang_ends_with_the_stacks_of_those_who_wait(corpus: Path, tmp_path: Path) -> None:
    job = job_of(
        "moe_lm", corpus, tmp_path, "hung", faults=[{"name": "hang", "step": 3, "rank": 1}], hang_timeout_s=25.0
    )
    with ranks(tmp_path, job, 2) as processes:
        assert processes[0].wait(200) == HUNG
        assert processes[1].poll() is None, "a stopped process does nothing, so it cannot end by itself"
    stacks = (tmp_path / "hung" / "stacks" / "rank-0-attempt-0.txt").read_text()
    assert "in global_weights" in stacks
    assert "Thread" in stacks
    end = close_attempt(run_files(str(tmp_path), "hung"), 0)
    assert end.ending is Ending.HUNG
    assert "no progress for 25 s on rank 0 after step 3" in end.detail


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_while_saving_costs_checkpoints_but_not_the_run(
    small_disk: Path, corpus: Path, tmp_path: Path
) -> None:
    reference = run_distributed(train, 2, job_of("moe_lm", corpus, tmp_path, "roomy"))[0]
    each = sum(file.stat().st_size for file in (tmp_path / "roomy" / "checkpoints" / "step-00000010").iterdir())
    assert 0.8e6 < each < 1.4e6, "one checkpoint must fit on the small disk, and two must not"
    summary = run_distributed(train, 2, job_of("moe_lm", corpus, small_disk, "full"))[0]
    folder = small_disk / "full"
    assert (summary["step"], summary["failed"]) == (10, True)
    assert "No space left" in summary["stopped"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"], (
        "something half-written is left"
    )
    assert losses(folder) == losses(tmp_path / "roomy")
    assert "not taken" in (folder / "events.jsonl").read_text()
    shutil.copytree(folder, tmp_path / "full")
    again = run_distributed(train, 2, job_of("moe_lm", corpus, tmp_path, "full"))[0]
    assert (again["step"], again["failed"]) == (10, False)
    assert losses(tmp_path / "full") == losses(tmp_path / "roomy")
    assert reference["failed"] is False


def test_out_of_memory_is_one_line_that_says_what_to_change(corpus: Path) -> None:
    run = parse(RunConfig, tiny_job(corpus), "run")
    with (
        pytest.raises(
            OutOfMemory, match=r"on rank 1 .*micro_batch below 4.*zero=2 instead of 1.*offload_optimizer=true"
        ),
        out_of_memory(run, 1),
    ):
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="shape"), out_of_memory(run, 1):
        torch.zeros(2).view(3)


def test_the_cause_of_an_end_is_the_first_that_is_not_a_lost_peer(tmp_path: Path) -> None:
    files = RunFiles(Folder(str(tmp_path)))
    for attempt in range(2):
        files.add_attempt(
            AttemptBegan(attempt=attempt, time=0.0, world=2, host="here", pid=1, commit=None, dirty=False)
        )
    note_end(files, 0, "rank 0", stopped_by_error("RuntimeError on rank 0: gloo: Connection closed by peer"))
    cause = stopped_by_error("OutOfMemory on rank 1: use a smaller micro_batch")
    note_end(files, 0, "rank 1", cause)
    assert close_attempt(files, 0) == cause
    assert close_attempt(files, 1) == UNKNOWN
    assert close_attempt(files, 0) == cause, "an end is written once"
    assert (len(files.attempts_begun()), len(files.attempts_ended())) == (2, 2)
