"""Prove a refactoring exact: `python tests/same_losses.py COMMIT` trains every objective twice.

Each job of `JOBS` runs three times: with the code of COMMIT, with the code of this checkout, and
with this checkout from the checkpoint that COMMIT's code saved at step 10. All three must log the
same numbers, to the last digit. The codes share job files and command lines and nothing else, so
files may move between them.

    --only NAME         one job (may be repeated)
    --baseline FOLDER   keep COMMIT's runs there, and reuse them the next time
    --write             write their losses to tests/same_losses.json
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
FIXTURE = Path(__file__).with_suffix(".json")
STEPS = 20
SAVED = 10
THREADS = 1
LIMIT_S = 300.0
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix potions for the king of spades".split()

_TEXT = {"source": {"name": "files", "paths": ["corpus/*.jsonl"]}, "seq_len": 32, "lanes": 8, "window": 16}
_TEXT |= {"max_eval_samples": 16}
_MODEL = {"layers": 2, "d_model": 32, "heads": 2, "ffn": 64}
_MIXED = _MODEL | {"moe": {"experts": 4, "ffn": 64, "capacity_factor": 1.25, "z_loss": 0.001}}
_DIGITS = {"source": {"name": "sklearn_digits"}, "classes": 10, "lanes": 8, "max_eval_samples": 64}
_CAUSAL = {"data": _TEXT, "sample_tokens": 8}
_AUGMENT = {"rotate": 10, "noise": 0.1}
_TOWERS = {
    "data": _DIGITS,
    "image": {"channels": [8, 16], "norm_groups": 4},
    "text": {"layers": 1, "d_model": 16, "heads": 2, "ffn": 32},
    "width": 16,
    "augment": _AUGMENT,
}

OBJECTIVES: dict[str, dict[str, object]] = {
    "moe_lm": {"name": "moe_lm", "model": _MIXED} | _CAUSAL,
    "teacher": {"name": "moe_lm", "model": _MIXED} | _CAUSAL,
    "masked_lm": {"name": "masked_lm", "model": _MIXED | {"causal": False}, "data": _TEXT},
    "distill": {"name": "distill", "model": _MODEL} | _CAUSAL,
    "vae": {
        "name": "vae",
        "data": _DIGITS,
        "network": {"name": "convolutional", "latent": 8, "channels": [8, 16], "hidden": 32},
        "likelihood": {"name": "discretised_logistic", "levels": 17},
        "quality": None,
    },
    "ddpm": {
        "name": "ddpm",
        "data": _DIGITS,
        "network": {
            "name": "unet",
            "channels": [8, 16],
            "layers_per_level": 1,
            "attention_levels": [1],
            "norm_groups": 4,
        },
        "diffusion": {"schedule": {"name": "cosine"}, "prediction": "v", "loss": {"name": "hybrid"}, "levels": 17},
        "conditional": True,
        "guidance": 1.5,
        "sampler": {"name": "dpm_solver", "steps": 4},
        "quality": {"samples": 64},
    },
    "gan": {
        "name": "gan",
        "data": _DIGITS,
        "network": {
            "name": "dcgan",
            "latent": 8,
            "channels": [8, 16],
            "batch_norm_group": 4,
            "discriminator_norm": "none",
        },
        "loss": "relativistic",
        "penalty": {"r1": 1.0, "r2": 1.0},
        "conditional": True,
        "quality": None,
    },
    "simclr": {
        "name": "simclr",
        "data": _DIGITS,
        "encoder": {"channels": [8, 16], "norm_groups": 4},
        "projection": [16, 8],
        "augment": _AUGMENT,
    },
    "clip": {"name": "clip"} | _TOWERS,
    "siglip": {"name": "siglip", "temperature": 0.1, "bias": -3.0} | _TOWERS,
}
"""Every objective; `teacher` is what distill learns from, and a mixture of experts on one rank."""

ENGINES: dict[str, dict[str, object]] = {
    "moe_lm": {"name": "deepspeed", "zero": 1, "ep": 2},
    "ddpm": {"name": "deepspeed", "zero": 2},
    "simclr": {"name": "deepspeed", "zero": 3},
}
"""Jobs on two ranks; all others run on one with accelerate."""


def job_of(name: str) -> dict[str, object]:
    """The job file of `name`, without its folders."""
    return {
        "name": name,
        "objective": OBJECTIVES[name],
        "batch": {"global_batch": 32, "micro_batch": 8},
        "optimizer": {"lr": 0.002, "schedule": {"name": "cosine", "warmup_steps": 5}},
        "engine": ENGINES.get(name, {"name": "accelerate"}),
        "ema": {"decay": 0.9},
        "device": "cpu",
        "threads": THREADS,
        "stop": {"steps": STEPS},
        "log_every": 1,
        "evaluate": {"samples": 1, "micro_batch": 16},
        "checkpoint": {"every": SAVED, "keep": 0},
        "tracking": {"enabled": False},
    }


def write_corpus(home: Path) -> None:
    """Write the texts into `home`, unless they are there: to a run, other dates are other data."""
    if (home / "corpus").exists():
        return
    (home / "corpus").mkdir(parents=True)
    for shard in range(4):
        lines = []
        for number in range(60):
            start = number * 7 + shard * 3
            stride = 1 + number % 5
            words = [WORDS[(start + i * stride) % len(WORDS)] for i in range(30 + number % 17)]
            lines.append(json.dumps({"text": f"{shard}-{number} {' '.join(words)}"}) + "\n")
        (home / "corpus" / f"part-{shard}.jsonl").write_text("".join(lines))


def write_job(home: Path, name: str) -> bool:
    """Write the job file of `name` into `home`; return whether it existed with the same content."""
    file = home / f"{name}.yaml"
    job = json.dumps({"run": job_of(name)}, indent=1)  # JSON is YAML
    if file.exists() and file.read_text() == job:
        return True
    file.write_text(job)
    return False


def environment(tree: Path) -> dict[str, str]:
    """The environment in which Python imports the code of `tree`."""
    single = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS)}
    quiet = {"DS_ACCELERATOR": "cpu", "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}
    inherited = {key: value for key, value in os.environ.items() if key not in OF_RANKS}
    return inherited | single | quiet | {"PYTHONPATH": str(tree)}


def check_tree(tree: Path, home: Path) -> None:
    """Fail unless `trainer` is imported from `tree`.

    An installed copy would make both sides the same.
    """
    question = "import importlib.util; print(importlib.util.find_spec('trainer').origin)"
    command = [sys.executable, "-c", question]
    origin = subprocess.run(command, cwd=home, env=environment(tree), capture_output=True, text=True, check=True).stdout
    if not Path(origin.strip()).resolve().is_relative_to(tree.resolve()):
        raise SystemExit(f"trainer is imported from {origin.strip()}, not from {tree}")


def train(tree: Path, home: Path, name: str, root: Path, teachers: Path, resume: bool = False) -> Path:
    """Run the job `name` of `home` with the code of `tree` into `root`; return the run's folder."""
    command = [sys.executable]
    if name in ENGINES:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "trainer", f"{name}.yaml", f"run.root={root}"]
    command += [f"run.objective.teacher={teachers / 'teacher'}"] if name == "distill" else []
    command += ["--resume"] if resume else []
    log = root / f"{name}.log"
    root.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=home,
            env=environment(tree),
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that torchrun's ranks can be ended with it
        )
        try:
            code = process.wait(LIMIT_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code:
        raise RuntimeError(f"{name} failed with the code of {tree}:\n{log.read_text()[-4000:]}")
    return root / name


def is_exact(metric: str) -> bool:
    """Whether the job alone decides `metric`: it is no time, rate, memory or attempt number."""
    if metric in ("time", "attempt", "mfu") or metric.endswith("_s"):
        return False
    return not metric.startswith(("system/", "goodput/"))


Metrics = dict[tuple[int, str], str]
"""The text of a logged number by step and name."""


def metrics_of(run: Path, after: int = 0) -> Metrics:
    """The exact metrics of `run` after step `after`; of a step that was trained twice, the last."""
    metrics: Metrics = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line, parse_float=str, parse_int=str, parse_constant=str)
        step = int(row.pop("step"))
        metrics |= {(step, name): value for name, value in row.items() if is_exact(name) and step > after}
    return metrics


def losses_of(run: Path) -> dict[str, list[float]]:
    """The training losses of `run` by name, a number per step."""
    losses: dict[str, list[float]] = {}
    for (_, name), value in sorted(metrics_of(run).items()):
        if "loss" in name and not name.startswith(("eval/", "quality/")):
            losses.setdefault(name, []).append(float(value))
    return losses


def cut(old: Path, root: Path) -> None:
    """Copy the run `old` into `root` as if it had been killed right after it saved step 10."""
    run = root / old.name
    shutil.copytree(old, run)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(run / "ends", ignore_errors=True)
    (run / "summary.json").unlink(missing_ok=True)
    for name in ("metrics.jsonl", "attempts.jsonl", "ledger.jsonl"):
        kept = [line for line in (run / name).read_text().splitlines() if keeps(json.loads(line))]
        (run / name).write_text("".join(line + "\n" for line in kept))


def keeps(line: dict[str, object]) -> bool:
    """Whether `line` existed when step 10 had been saved.

    Such a line is no end of an attempt and belongs to no later step.
    """
    step = line.get("step", 0)
    return "ended" not in line and isinstance(step, int) and step <= SAVED


def differences(old: Metrics, new: Metrics) -> list[str]:
    """What differs between two runs, in the order of steps."""
    lines = []
    for step, name in sorted(old.keys() | new.keys()):
        before = old.get((step, name), "absent")
        after = new.get((step, name), "absent")
        if before != after:
            lines.append(f"step {step} {name}: {before} became {after}")
    return lines


def with_teachers(names: list[str]) -> list[str]:
    """`names` in the order in which they can run: distill needs the teacher's run."""
    return [name for name in OBJECTIVES if name in names or (name == "teacher" and "distill" in names)]


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of `commit` for the block."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "old"
        git = ["git", "-C", str(CHECKOUT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def train_old(commit: str, home: Path, names: list[str]) -> None:
    """Make those of the runs `names` with the code of `commit` that `home` does not have yet."""
    known = home / "commit"
    if known.exists() and known.read_text() != commit:
        raise SystemExit(f"{home} has the runs of {known.read_text()}, not of {commit}; use another folder")
    write_corpus(home)
    known.write_text(commit)
    unchanged = [name for name in names if write_job(home, name) and (home / "old" / name / "summary.json").exists()]
    missing = [name for name in names if name not in unchanged]
    if not missing:
        return
    with worktree(commit) as tree:
        check_tree(tree, home)
        for name in missing:
            shutil.rmtree(home / "old" / name, ignore_errors=True)
            train(tree, home, name, home / "old", home / "old")


def compare(name: str, home: Path, scratch: Path) -> list[str]:
    """Train the job `name` with this checkout, whole and resumed; print a row of the table."""
    begin = time.perf_counter()
    expected = metrics_of(home / "old" / name)
    cells = []
    lines = []
    for how, trained, after in (("", train_whole, 0), (" resumed", train_on, SAVED)):
        due = {key: value for key, value in expected.items() if key[0] > after}
        try:
            found = differences(due, metrics_of(trained(name, home, scratch), after))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            found = [str(error)]
        cells.append("DIFFERENT" if found else "same")
        lines += [f"{name}{how}, {line}" for line in found]
    seconds = time.perf_counter() - begin
    print(f"{name:<12}{len(expected):>9}  {cells[0]:<11}{cells[1]:<22}{seconds:5.0f} s", flush=True)
    return lines


def train_whole(name: str, home: Path, scratch: Path) -> Path:
    """All steps with this checkout's code."""
    return train(CHECKOUT, home, name, scratch / "new", scratch / "new")


def train_on(name: str, home: Path, scratch: Path) -> Path:
    """The steps after the old checkpoint with this checkout's code."""
    cut(home / "old" / name, scratch / "resumed")
    return train(CHECKOUT, home, name, scratch / "resumed", home / "old", resume=True)


def machine() -> dict[str, object]:
    """What the last digits of a loss depend on, beside the code."""
    import torch

    cpu = next((line.partition(": ")[2] for line in _cpu_lines() if line.startswith("model name")), "unknown")
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": cpu,
        "threads": THREADS,
    }


def _cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def write_fixture(commit: str, old: Path) -> None:
    """Write the losses of all runs in `old` to the fixture."""
    losses = {name: losses_of(old / name) for name in OBJECTIVES}
    FIXTURE.write_text(json.dumps({"commit": commit, **machine(), "losses": losses}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--only", action="append", choices=list(OBJECTIVES))
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    resolve = ["git", "-C", str(CHECKOUT), "rev-parse", "--verify", f"{asked.commit}^{{commit}}"]
    commit = subprocess.run(resolve, capture_output=True, text=True, check=True).stdout.strip()
    names = list(OBJECTIVES) if asked.write else with_teachers(asked.only or list(OBJECTIVES))
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        home = (asked.baseline or Path(scratch) / "home").resolve()
        home.mkdir(parents=True, exist_ok=True)
        train_old(commit, home, names)
        print(f"{len(names)} runs of {commit[:7]} after {time.perf_counter() - begin:.0f} s", flush=True)
        if asked.write:
            write_fixture(commit, home / "old")
            return 0
        check_tree(CHECKOUT, home)
        print(f"{'job':<12}{'numbers':>9}  {'20 steps':<11}{'resumed from step 10':<22}", flush=True)
        lines = [line for name in names for line in compare(name, home, Path(scratch))]
    print(f"{time.perf_counter() - begin:.0f} s in all; {len(lines)} differences")
    print("\n".join(lines[:40]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
