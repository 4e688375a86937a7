"""The proof of distillation: Fieller's interval against Student's test, and a small proof in full.

The students differ in their teacher alone.
"""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from moe_variants import moe_job, variants_of
from rich.console import Console
from scipy.stats import ttest_1samp

from launch.prove.distill import DISTILLED, Options, prove, students, words
from launch.prove.paired import Difference, share
from trainer.objectives.language.config import DistillConfig, LanguageConfig


def options(folder: Path | str, **changes: Any) -> Options:
    given = {"seeds": 2, "alpha": 0.25, "kl_temperature": 1.0, "ablations": True, "processes": 2, "folder": str(folder)}
    return Options(**(given | changes))


def test_at_both_ends_of_the_interval_of_a_share_the_test_is_just_not_significant() -> None:
    parts = [0.021, 0.017, 0.030, 0.012]
    wholes = [0.055, 0.047, 0.068, 0.044]
    found = share(parts, wholes)
    assert found.mean == pytest.approx(sum(parts) / sum(wholes))
    assert found.low < found.mean < found.high
    for bound in (found.low, found.high):
        assert ttest_1samp(np.array(parts) - bound * np.array(wholes), 0).pvalue == pytest.approx(0.05, rel=1e-6)
    assert share(wholes, wholes) == Difference(1.0, pytest.approx(1.0), pytest.approx(1.0), 4)  # type: ignore[arg-type]


def test_no_share_is_told_of_a_gain_that_is_not_clear_of_zero() -> None:
    found = share([0.01, 0.02, 0.00], [0.05, -0.02, 0.01])
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert "not clear of zero" in words("distilled", "8 experts", found)
    assert "keeps 40% of the gain of 8 experts" in words("distilled", "8 experts", Difference(0.4, 0.3, 0.5, 4))


def test_students_differ_from_the_dense_model_in_their_teacher_alone(corpus: Path) -> None:
    dense = variants_of(corpus)["dense"]
    assert isinstance(dense.objective, LanguageConfig)
    found = {name: run.objective for name, run in students(dense, "there", options("x", alpha=0.5)).items()}
    lessons = {
        name: (each.teacher, each.alpha, each.init_from_teacher)
        for name, each in found.items()
        if isinstance(each, DistillConfig)
    }
    assert lessons == {
        DISTILLED: ("there", 0.5, True),
        "weights alone": ("there", 0.0, True),
        "KL alone": ("there", 0.5, False),
    }
    for objective in found.values():
        assert all(
            getattr(objective, field.name) == getattr(dense.objective, field.name)
            for field in fields(dense.objective)
            if field.name != "name"
        )
    assert list(students(dense, "there", options("x", ablations=False))) == [DISTILLED]


@pytest.mark.slow
def test_a_small_proof_in_full(corpus: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    folder = tmp_path / "proof"
    job.write_text(yaml.safe_dump({"run": moe_job(corpus)}))
    console = Console(width=160, record=True)
    prove(console, str(job), [], options(folder))
    results = json.loads((folder / "results.json").read_text())
    losses = {each["name"]: each["losses"] for each in results["variants"]}
    assert list(losses) == ["dense", "4 experts", DISTILLED, "weights alone", "KL alone"]
    for name, values in losses.items():
        for seed, value in enumerate(values):
            (run,) = (folder / "runs").glob(f"{name.replace(' ', '-')}-seed{seed}-*")
            assert json.loads((run / "summary.json").read_text())["eval"]["cross_entropy"] == value
            objective = yaml.safe_load((run / "resolved.yaml").read_text())["run"]["objective"]
            if name not in ("dense", "4 experts"):
                assert Path(objective["teacher"]).name.startswith(f"4-experts-seed{seed}-")
    assert len({value for values in losses.values() for value in values}) == 10, "two runs are the same"
    gains = {name: sum(losses["dense"]) - sum(values) for name, values in losses.items()}
    for name in (DISTILLED, "weights alone", "KL alone"):
        assert results["kept"][name]["mean"] == pytest.approx(gains[name] / gains["4 experts"])
    printed = console.export_text()
    assert "4 of 4 runs" in printed
    assert "6 of 6 runs" in printed
    assert f"{DISTILLED}: " in printed
    assert (folder / "proof.png").read_bytes().startswith(b"\x89PNG")
    again = Console(width=160, record=True)
    prove(again, str(job), [], options(folder))
    printed = again.export_text()
    assert "4 of 4 runs are there already" in printed
    assert "6 of 6 runs are there already" in printed
    assert json.loads((folder / "results.json").read_text())["variants"] == results["variants"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"seeds": 1}, "--seeds: 1"),
        ({"processes": 0}, "--processes: 0"),
        ({"alpha": 0.0}, "--alpha: 0"),
        ({"kl_temperature": 0.0}, "temperature 0"),
    ],
)
def test_wrong_proofs_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        options("x", **flags)
