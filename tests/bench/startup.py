"""How long a command and a worker take to start, next to another commit of this project.

    python tests/bench/startup.py COMMIT [--json FILE] [--rounds 5]

Three starts: `switchwork --help`, `switchwork train --dry-run`, and a worker without Ray from its
command to its first optimiser step, as its run folder has it. Both versions run in turn with the
same interpreter; COMMIT is checked out into a temporary worktree.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paired import arguments, ratio, show, write

CHECKOUT = Path(__file__).resolve().parents[2]
JOB = "launch/configs/switch_lm_quickstart.yaml"
ONE_STEP = [
    "run.stop.steps=1",
    "run.evaluate.samples=0",
    "run.tracking.enabled=false",
    "run.objective.data.max_eval_samples=8",
]


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A temporary checkout of `commit`."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "-C", CHECKOUT, "worktree", "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", CHECKOUT, "worktree", "remove", "--force", tree], check=True)


def run(tree: Path, *command: str) -> float:
    """Seconds of `python -m command`, with the code of `tree`."""
    place = {"PYTHONPATH": str(tree), "DS_ACCELERATOR": "cpu", "MLFLOW_DISABLE_TELEMETRY": "true"}
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", *command], cwd=tree, env=os.environ | place, check=True, capture_output=True)
    return time.perf_counter() - begin


def first_step(tree: Path) -> float:
    """Seconds from a worker's command to its first optimiser step."""
    with tempfile.TemporaryDirectory() as root:
        run(tree, "trainer", JOB, *ONE_STEP, f"run.root={root}", "run.name=start", "run.engine.ep=1")
        return float(json.loads((Path(root) / "start" / "first_step.json").read_text())["seconds_to_first_step"])


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("commit")
    options = parser.parse_args()
    starts = {
        "switchwork --help": lambda tree: run(tree, "launch.cli", "--help"),
        "switchwork train --dry-run": lambda tree: run(tree, "launch.cli", "train", JOB, "--dry-run"),
        "a worker's first step": first_step,
    }
    samples: dict[str, dict[str, list[float]]] = {name: {"now": [], "then": []} for name in starts}
    with worktree(options.commit) as then:
        for number in range(options.rounds + 1):  # the first round fills the caches, and does not count
            trees = [("now", CHECKOUT), ("then", then)]
            for side, tree in trees if number % 2 else reversed(trees):
                for name, start in starts.items():
                    seconds = start(tree)
                    if number:
                        samples[name][side].append(seconds)
    for name, sides in samples.items():
        print(f"{name}: {ratio(sides['now'], sides['then']):.2f} times as long as at {options.commit}")
        show(sides, 1.0, "s")
    write(
        options.json,
        samples | {"medians": {n: {s: statistics.median(v) for s, v in each.items()} for n, each in samples.items()}},
    )


if __name__ == "__main__":
    main()
