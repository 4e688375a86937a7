"""What all tests share: one thread a process, no network, and small jobs on small texts."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import json
from pathlib import Path
from typing import Any

import pytest
from kube_cluster import job_status, kube, submit, switchwork  # noqa: F401  (fixtures)

ALPHABET = "the quick brown fox jumps over a lazy dog while seven wizards mix potions for the king of spades ".split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four json-lines files of 60 short documents each, all different."""
    folder = tmp_path_factory.mktemp("corpus")
    for shard in range(4):
        lines = []
        for number in range(60):
            words = [
                ALPHABET[(number * 7 + shard * 3 + position * (1 + number % 5)) % len(ALPHABET)]
                for position in range(30 + number % 17)
            ]
            lines.append(json.dumps({"text": f"{shard}-{number} " + " ".join(words)}))
        (folder / f"part-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test in its own folder, where the command then makes `runs`."""
    monkeypatch.chdir(tmp_path)


def tiny_job(corpus: Path, **run: Any) -> dict[str, Any]:
    """A job that trains in a second a step or less: two layers, four experts."""
    job: dict[str, Any] = {
        "objective": {
            "name": "moe_lm",
            "data": {
                "source": {"name": "files", "paths": [f"{corpus}/*.jsonl"]},
                "seq_len": 32,
                "lanes": 8,
                "window": 16,
                "max_eval_samples": 16,
                "prefetch": 0,
            },
            "model": {
                "layers": 2,
                "d_model": 32,
                "heads": 2,
                "ffn": 64,
                "moe": {"experts": 4, "ffn": 64, "capacity_factor": 1.25},
            },
            "sample_tokens": 8,
        },
        "batch": {"global_batch": 16, "micro_batch": 4},
        "optimizer": {"lr": 0.01, "schedule": {"name": "cosine", "warmup_steps": 2}},
        "stop": {"steps": 10},
        "log_every": 1,
        "device": "cpu",
        "threads": 1,
    }
    return job | run
