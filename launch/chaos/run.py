"""`switchwork chaos`: a fire drill. A run without faults, the same run with them, and a table of what each cost.

The faults that a worker can do to itself happen inside it (trainer/recovery/faults.py), the others are done from here: SIGTERM to the
command, which is then started again with --resume, and a tracking server that goes away for a while.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console

from launch.chaos.report import InjectedFault, report
from launch.config import JobConfig
from trainer.checkout import CHECKOUT
from trainer.parsing import parse, plain, read_job
from trainer.recovery.faults import FaultConfig
from trainer.run_files import run_files
from trainer.run_rows import Fault
from trainer.world import free_port

_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Terminate:
    """SIGTERM to the command; once it has left, it is started again with --resume."""

    name: Literal["terminate"] = "terminate"
    step: int
    """After this step, as it is logged."""


@dataclass(frozen=True, kw_only=True)
class TrackingAway:
    """The MLflow server is killed, and started again."""

    name: Literal["tracking_away"] = "tracking_away"
    step: int
    """After this step, as it is logged."""
    seconds: float = 30.0
    """It is away for so long."""


@dataclass(frozen=True, kw_only=True)
class Drill:
    """A faults file."""

    overrides: tuple[str, ...] = ()
    """Fields of the job that are set for the drill, `a.b=c` each: to make it short, mostly."""
    faults: tuple[FaultConfig | Terminate | TrackingAway, ...]
    """What happens, and when."""


def chaos(console: Console, job_file: str, faults_file: str, overrides: Sequence[str], folder: str) -> bool:
    """Run the drill in `folder`, print its table, and write it to drill.json; returns whether the run came through."""
    drill = parse(Drill, read_job(faults_file), "faults")
    root = Path(folder).absolute()
    root.mkdir(parents=True, exist_ok=True)
    for name in ("undisturbed", "drill"):
        if (root / name).exists():
            raise ValueError(f"--folder: {root / name} is there from an earlier drill; name another folder")
    with _Server(root) as server:
        job = read_job(job_file, [*drill.overrides, *overrides])
        settings = {
            "root": str(root),
            "log_every": 1,
            "tracking": {**job["run"].get("tracking", {}), "uri": server.uri},
        }
        restarts = {"max_failures": len(drill.faults)}
        inner = [plain(fault) for fault in drill.faults if not isinstance(fault, Terminate | TrackingAway)]
        for name, more in (("undisturbed", {}), ("drill", {"faults": inner})):
            whole = {
                "run": {**job["run"], **settings, "name": name, **more},
                "cluster": {**job.get("cluster", {}), **restarts},
            }
            parse(JobConfig, whole)
            (root / f"{name}.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
        console.print(f"a run without faults, then one with {len(drill.faults)}; their output is in {root}")
        if code := _Command(root, "undisturbed").wait():
            raise ValueError(f"the run without faults ended with code {code}; see {root / 'undisturbed.log'}")
        outer = [fault for fault in drill.faults if isinstance(fault, Terminate | TrackingAway)]
        came_through = _disturbed(console, root, outer, server)
    injected = [
        InjectedFault(fault["name"], fault["step"], fault["time"]) for fault in run_files(str(root), "drill").faults()
    ]
    return (
        report(console, root, sorted(injected, key=lambda each: each.time), planned=len(drill.faults)) and came_through
    )


def _disturbed(console: Console, root: Path, faults: Sequence[Terminate | TrackingAway], server: "_Server") -> bool:
    """Run the drill to its end, doing from outside what cannot be done from inside; returns whether it ended well."""
    files, left = run_files(str(root), "drill"), sorted(faults, key=lambda fault: fault.step)
    command = _Command(root, "drill")
    while True:
        time.sleep(_POLL_S)
        step = max((row.step for row in files.metrics()), default=0)
        server.back_if_due()
        if left and step >= left[0].step and command.process.poll() is None:
            fault = left.pop(0)
            console.print(f"step {step}: {fault.name}")
            files.add_fault(Fault(fault=-1, name=fault.name, step=step, time=time.time()))
            match fault:
                case Terminate():
                    command.process.send_signal(signal.SIGTERM)
                    command.wait()
                    command = _Command(root, "drill", "--resume")
                case TrackingAway(seconds=seconds):
                    server.go_away(seconds)
        elif (code := command.process.poll()) is not None:
            server.back_if_due(now=True)
            return code == 0


class _Command:
    """A `switchwork train` of its own."""

    def __init__(self, root: Path, name: str, *options: str):
        with (root / f"{name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", "train", str(root / f"{name}.yaml"), *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=root,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))},
            )

    def wait(self) -> int:
        try:
            return self.process.wait()
        except BaseException:  # Ctrl-C: the run goes with the drill
            self.process.kill()
            raise


class _Server:
    """An MLflow server on this machine, over a store in `root`, that can go away for a while."""

    def __init__(self, root: Path):
        self.root, self.port, self.back_at = root, free_port(), float("inf")
        self.process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "_Server":
        self._start()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._kill()

    def _start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        store = [
            "--backend-store-uri",
            f"sqlite:///{self.root}/mlflow.db",
            "--artifacts-destination",
            str(self.root / "artifacts"),
        ]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.root / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *store],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.root,
                env=os.environ | quiet,
                start_new_session=True,
            )

    def _kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def go_away(self, seconds: float) -> None:
        self._kill()
        self.back_at = time.monotonic() + seconds

    def back_if_due(self, now: bool = False) -> None:
        if self.process is None and (now or time.monotonic() >= self.back_at):
            self._start()
