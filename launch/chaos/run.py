"""`switchwork chaos`: a fire drill, which shows what each fault costs a run.

The drill does a run without faults, and then the same run with them. A worker injects the faults
that it can do to itself (trainer/recovery/faults.py). This module does the others: SIGTERM to the
command, which is then started again with --resume, and a tracking server that goes away for a
while.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from rich.console import Console

from launch.chaos.report import InjectedFault, report
from launch.config import JobConfig
from trainer.checkout import CHECKOUT
from trainer.parsing import Json, parse, plain, read_job
from trainer.recovery.faults import FaultConfig
from trainer.run_files import run_files
from trainer.run_rows import Fault
from trainer.world import free_port

_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Terminate:
    """Sends SIGTERM to the command; when it has ended, starts it again with --resume."""

    name: Literal["terminate"] = "terminate"
    step: int
    """The step after which the fault happens, as it is logged."""


@dataclass(frozen=True, kw_only=True)
class TrackingAway:
    """Kills the MLflow server, and starts it again later."""

    name: Literal["tracking_away"] = "tracking_away"
    step: int
    """The step after which the fault happens, as it is logged."""
    seconds: float = 30.0
    """Seconds for which the server is away."""


@dataclass(frozen=True, kw_only=True)
class Drill:
    """A faults file."""

    overrides: tuple[str, ...] = ()
    """Fields of the job to set for the drill, each as `a.b=c`; most make the run short."""
    faults: tuple[FaultConfig | Terminate | TrackingAway, ...]
    """The faults to inject; each names its step."""


def chaos(console: Console, job_file: str, faults_file: str, overrides: Sequence[str], folder: str) -> bool:
    """Run the drill in `folder`, print its table, and write it to drill.json.

    Returns whether the run recovered from every fault, and saw the right data.
    """
    drill = parse(Drill, read_job(faults_file), "faults")
    root = Path(folder).absolute()
    root.mkdir(parents=True, exist_ok=True)
    for name in ("undisturbed", "drill"):
        if (root / name).exists():
            raise ValueError(f"--folder: {root / name} exists from an earlier drill; name another folder")
    with _Server(root) as server:
        _write_jobs(root, read_job(job_file, [*drill.overrides, *overrides]), drill, server.uri)
        console.print(f"a run without faults, then one with {len(drill.faults)}; their output is in {root}")
        if code := _Command(root, "undisturbed").wait():
            raise ValueError(f"the run without faults ended with code {code}; see {root / 'undisturbed.log'}")
        outer = [fault for fault in drill.faults if isinstance(fault, Terminate | TrackingAway)]
        recovered = _run_disturbed(console, root, outer, server)
    happened = sorted(run_files(str(root), "drill").faults(), key=lambda fault: fault["time"])
    injected = [InjectedFault(fault["name"], fault["step"], fault["time"]) for fault in happened]
    return report(console, root, injected, planned=len(drill.faults)) and recovered


def _write_jobs(root: Path, job: Json, drill: Drill, tracking_uri: str) -> None:
    """Write the job files of the two runs, which differ in their names and faults alone."""
    tracking = {**job["run"].get("tracking", {}), "uri": tracking_uri}
    run = {**job["run"], "root": str(root), "log_every": 1, "tracking": tracking}
    cluster = {**job.get("cluster", {}), "max_failures": len(drill.faults)}
    inner = [plain(fault) for fault in drill.faults if not isinstance(fault, Terminate | TrackingAway)]
    jobs = {
        "undisturbed": {"run": {**run, "name": "undisturbed"}, "cluster": cluster},
        "drill": {"run": {**run, "name": "drill", "faults": inner}, "cluster": cluster},
    }
    for name, values in jobs.items():
        parse(JobConfig, values)
        (root / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def _run_disturbed(console: Console, root: Path, faults: Sequence[Terminate | TrackingAway], server: "_Server") -> bool:
    """Run the drill to its end, and inject the faults that a worker cannot do to itself.

    Returns whether the command succeeded.
    """
    files = run_files(str(root), "drill")
    pending = sorted(faults, key=lambda fault: fault.step)
    command = _Command(root, "drill")
    while True:
        time.sleep(_POLL_S)
        step = max((row.step for row in files.metrics()), default=0)
        server.return_if_due()
        if pending and step >= pending[0].step and command.process.poll() is None:
            fault = pending.pop(0)
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
            server.return_if_due(now=True)
            return code == 0


class _Command:
    """A `switchwork train` as a process of its own; its output goes to NAME.log."""

    def __init__(self, root: Path, name: str, *options: str):
        path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
        with (root / f"{name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", "train", str(root / f"{name}.yaml"), *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=root,
                env=os.environ | {"PYTHONPATH": path},
            )

    def wait(self) -> int:
        try:
            return self.process.wait()
        except BaseException:  # Ctrl-C ends the run together with the drill
            self.process.kill()
            raise


class _Server:
    """An MLflow server on this machine, with its store in `root`, that can go away for a while."""

    def __init__(self, root: Path):
        self.root = root
        self.port = free_port()
        self.returns_at = float("inf")
        self.process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "_Server":
        self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()

    def _start(self) -> None:
        database = f"sqlite:///{self.root}/mlflow.db"
        artifacts = str(self.root / "artifacts")
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        store = ["--backend-store-uri", database, "--artifacts-destination", artifacts]
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
        self.returns_at = time.monotonic() + seconds

    def return_if_due(self, now: bool = False) -> None:
        if self.process is None and (now or time.monotonic() >= self.returns_at):
            self._start()
