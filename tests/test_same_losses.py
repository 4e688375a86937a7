"""The losses of every objective over 20 steps are those that tests/same_losses.py wrote."""

import json
from functools import cache
from pathlib import Path
from typing import TypedDict

import pytest
from same_losses import CHECKOUT, FIXTURE, OBJECTIVES, losses_of, machine, train, write_corpus, write_job

QUICK = ("masked_lm", "gan")
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in OBJECTIVES]


class Stored(TypedDict):
    """The fixture: where it was made, and the losses of each job by name."""

    torch: str
    cpu_capability: str
    cpu: str
    threads: int
    losses: dict[str, dict[str, list[float]]]


@cache
def stored() -> Stored:
    content: Stored = json.loads(FIXTURE.read_text())
    return content


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the texts and the job files."""
    folder = tmp_path_factory.mktemp("same-losses")
    write_corpus(folder)
    for name in OBJECTIVES:
        write_job(folder, name)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_fixture(name: str, home: Path) -> None:
    if name == "distill" and not (home / "new" / "teacher").exists():
        train(CHECKOUT, home, "teacher", home / "new", home / "new")
    run = home / "new" / name
    if not run.exists():
        train(CHECKOUT, home, name, home / "new", home / "new")
    expected = stored()["losses"][name]
    losses = losses_of(run)
    if all(stored()[key] == value for key, value in machine().items()):
        assert losses == expected
    else:
        assert losses.keys() == expected.keys()
        for metric, values in expected.items():
            assert losses[metric] == pytest.approx(values, rel=1e-5), metric
