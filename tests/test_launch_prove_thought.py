"""The proof of the chain of thought at small size: texts, runs, answers, table and picture.

Its intervals are checked too.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from kube_cluster import Run
from scipy.stats import ttest_rel

from launch.prove.thought import _level

pytestmark = pytest.mark.usefixtures("in_tmp_path")

SMALL = [
    "run.stop.steps=4",
    "run.batch={global_batch: 8, micro_batch: 8}",
    "run.objective.model={layers: 1, d_model: 16, heads: 2, ffn: 16}",
    "run.log_every=2",
    "run.objective.data.held_out=0.3",
]


def test_the_lead_is_taken_item_by_item() -> None:
    direct = [False] * 30 + [True] * 10
    thought = [True] * 25 + [False] * 5 + [True] * 10

    def rows(right: list[bool]) -> list[dict[str, Any]]:
        return [{"item": item, "right": each, "group": "3 steps"} for item, each in enumerate(right)]

    level = _level(3, {"direct": rows(direct), "chain_of_thought": rows(thought)})
    expected = ttest_rel([*map(int, thought)], [*map(int, direct)]).confidence_interval(0.95)
    assert level.lead == pytest.approx(25 / 40)
    assert (level.low, level.high) == pytest.approx(
        (expected.low, expected.high), abs=0.01
    )  # normal beside Student's t


@pytest.mark.slow
def test_the_proof_runs_through_and_keeps_what_is_there(tmp_path: Path, switchwork: Run) -> None:
    arguments = [
        "prove",
        "thought",
        *SMALL,
        "--steps",
        "2",
        "--problems",
        "20",
        "--shots",
        "1",
        "--folder",
        str(tmp_path / "thought"),
    ]
    code, printed, complaint = switchwork(*arguments)
    assert code == 0, complaint
    assert "chain of thought: " in printed
    results = json.loads((tmp_path / "thought" / "results.json").read_text())
    assert [level["steps"] for level in results["levels"]] == [1, 2]
    assert (tmp_path / "thought" / "proof.png").stat().st_size > 10_000
    code, again, _ = switchwork(*arguments)
    assert (code, "2 of 2 runs are there already" in again) == (0, True)
