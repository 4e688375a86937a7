"""switchwork schema: the JSON schema of job files, for editors.

It accepts every job file that the command accepts, and refuses a wrong shape.
"""

import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import tiny_job

from cluster.config.kubernetes import KubernetesConfig
from launch.cli.__main__ import main
from launch.commands.schema import docstrings, job_schema
from trainer.config import RunConfig
from trainer.parsing import read_job

SCHEMA = job_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[1] / "launch" / "configs").glob("*.yaml"))
    if "run" in read_job(str(path))
]


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_job_files_are_valid(path: Path) -> None:
    VALIDATOR.validate(read_job(str(path)))


WRONG: list[tuple[list[str], Any]] = [
    (["run", "optimiser"], {}),
    (["run", "objective", "model", "moe", "expert"], 4),
    (["run", "batch", "global_batch"], "many"),
    (["run", "engine", "zero"], 4),
    (["run", "engine", "name"], "megatron"),
    (["run", "objective", "name"], "chatbot"),
    (["run", "objective", "model", "moe", "router", "name"], "oracle"),
    (["cluster", "workers"], None),
    (["cluster", "kubernetes", "tolerations"], [{"effect": "Sometimes"}]),
    (["cluster", "kubernetes", "image_pull_policy"], "Now"),
    (["extra"], 1),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=[".".join(path) for path, _ in WRONG])
def test_wrong_shapes_are_refused(path: list[str], value: Any, corpus: Path) -> None:
    good = {
        "run": tiny_job(corpus, engine={"name": "deepspeed", "zero": 1}),
        "cluster": {"workers": 2, "kubernetes": {}},
    }
    good["run"]["objective"]["model"]["moe"]["router"] = {"name": "switch"}
    VALIDATOR.validate(good)
    wrong = copy.deepcopy(good)
    node = wrong
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    assert not VALIDATOR.is_valid(wrong)


def test_a_union_is_told_apart_by_name_which_the_default_may_leave_out(corpus: Path) -> None:
    job: dict[str, Any] = {"run": tiny_job(corpus)}
    assert VALIDATOR.is_valid(job | {"run": job["run"] | {"engine": {"zero": 2}}}), "deepspeed is the default"
    del job["run"]["objective"]["name"]
    assert not VALIDATOR.is_valid(job), "an objective has no default"


def test_fields_are_described_by_the_docstrings_under_them() -> None:
    run = SCHEMA["$defs"]["RunConfig"]["properties"]
    assert run["seed"]["description"] == docstrings(RunConfig)["seed"]
    assert "order of the data" in run["seed"]["description"]
    kubernetes = SCHEMA["$defs"]["KubernetesConfig"]["properties"]
    assert {field.name for field in dataclasses.fields(KubernetesConfig)} == set(kubernetes)
    for name, field in kubernetes.items():
        assert field["description"], name


def test_the_command_prints_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["switchwork", "schema"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out) == SCHEMA
