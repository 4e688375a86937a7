"""switchwork submit, jobs, stop, suspend and resume against an API server over HTTP.

The user has the rights of k8s/base and no more.
"""

import copy
import json
import threading
import time
from pathlib import Path

import pytest
import yaml
from kube_api import KubeApi, User
from kube_cluster import Run, Status, Submit, rules
from kube_jobs import TO, job_file
from kube_operator import Operator


def test_a_job_from_submit_to_its_end(kube: KubeApi, submit: Submit, job_status: Status, switchwork: Run) -> None:
    operator = Operator(kube, "team")
    job_id = submit()
    assert job_status(job_id)[0] == "PENDING"
    assert "is KubeRay running" in job_status(job_id)[1]
    operator.initialise(job_id)
    assert job_status(job_id) == ("PENDING", "the RayCluster is starting")
    pod = operator.run(job_id)
    assert job_status(job_id) == ("RUNNING", f"try 1 of 1 on RayCluster {job_id}-00001")
    kube.say(pod, "step 1", "step 2")
    assert switchwork("logs", job_id, "--to", TO)[1] == "step 1\nstep 2\n"
    assert [json.loads(line) for line in switchwork("logs", job_id, "--to", TO, "--json")[1].splitlines()] == [
        {"line": "step 1"},
        {"line": "step 2"},
    ]
    operator.end(job_id)
    assert job_status(job_id) == ("SUCCEEDED", "all done")
    second = submit(suspend=True)
    listed = json.loads(switchwork("jobs", "--to", TO, "--json")[1])
    assert {(each["id"], each["state"]) for each in listed} == {(job_id, "SUCCEEDED"), (second, "SUSPENDED")}
    assert f"SUCCEEDED  {job_id}" in switchwork("jobs", "--to", "k8s://lab")[1], "without a namespace the context's own"


def test_stop_removes_what_the_job_made_and_nothing_else(kube: KubeApi, submit: Submit, switchwork: Run) -> None:
    operator = Operator(kube, "team")
    first = submit("run.name=first")
    second = submit("run.name=second")
    by_hand = copy.deepcopy(operator.job(first))
    by_hand["metadata"] = {"name": "by-hand", "namespace": "team"}
    kube.create("ray.io", "rayjobs", by_hand)
    kube.create("", "secrets", {"metadata": {"name": "object-store", "namespace": "team"}})
    for job_id in (first, second):
        operator.initialise(job_id)
        operator.run(job_id)
    before = {(kind, name) for kind, objects in kube.objects.items() for _, name in objects}
    assert switchwork("stop", first, "--to", TO) == (0, "", "")
    after = {(kind, name) for kind, objects in kube.objects.items() for _, name in objects}
    assert before - after == {(kind, name) for kind, name in before if name.startswith(first)}
    assert {kind for kind, _ in before - after} == {
        ("ray.io", "rayjobs"),
        ("ray.io", "rayclusters"),
        ("batch", "jobs"),
        ("", "pods"),
        ("", "services"),
        ("", "secrets"),
    }
    code, _, complaint = switchwork("stop", "by-hand", "--to", TO)
    assert (code, "not made by `switchwork submit`" in complaint, complaint.count("\n")) == (2, True, 1)
    code, _, complaint = switchwork("status", first, "--to", TO)
    assert (code, first in complaint, complaint.count("\n")) == (2, True, 1)


def test_a_job_of_the_same_name_that_came_meanwhile_is_not_removed(kube: KubeApi, submit: Submit) -> None:
    from cluster.on_kubernetes.client import RAY, connect

    job_id = submit()
    with pytest.raises(ValueError, match="Precondition failed: UID"):
        connect(TO).delete(RAY, "rayjobs", job_id, "another-uid")
    assert kube.get("ray.io", "rayjobs", "team", job_id)


def test_suspend_and_resume(kube: KubeApi, submit: Submit, job_status: Status, switchwork: Run) -> None:
    operator = Operator(kube, "team")
    job_id = submit(suspend=True)
    operator.initialise(job_id)
    assert job_status(job_id) == ("SUSPENDED", "suspended; `switchwork resume` lets it continue")
    assert switchwork("resume", job_id, "--to", TO, "--json")[:2] == (
        0,
        json.dumps({"id": job_id, "done": "resume"}) + "\n",
    )
    assert operator.job(job_id)["spec"]["suspend"] is False
    assert switchwork("suspend", job_id, "--to", TO)[0] == 0
    assert operator.job(job_id)["spec"]["suspend"] is True


def test_a_queued_job_is_suspended_through_kueue(
    kube: KubeApi, submit: Submit, job_status: Status, switchwork: Run
) -> None:
    operator = Operator(kube, "team")
    job_id = submit(queue="team")
    code, _, complaint = switchwork("suspend", job_id, "--to", TO)
    assert (code, "no Workload" in complaint) == (2, True)
    name = operator.workload(job_id)
    assert switchwork("suspend", job_id, "--to", TO)[0] == 0
    assert kube.get("kueue.x-k8s.io", "workloads", "team", name)["spec"]["active"] is False
    assert operator.job(job_id)["spec"]["suspend"] is False, "that field is Kueue's"
    assert job_status(job_id) == ("SUSPENDED", "suspended; `switchwork resume` queues it again")
    assert switchwork("resume", job_id, "--to", TO)[0] == 0
    assert kube.get("kueue.x-k8s.io", "workloads", "team", name)["spec"]["active"] is True


def test_fields_that_the_kind_does_not_have_are_refused_not_dropped(kube: KubeApi, submit: Submit) -> None:
    from cluster.on_kubernetes.client import RAY, connect

    body = copy.deepcopy(kube.get("ray.io", "rayjobs", "team", submit()))
    body["metadata"] = {"name": "other"}
    body["spec"]["retries"] = 3
    with pytest.raises(ValueError, match=r'unknown field "spec\.retries"'):
        connect(TO).create(RAY, "rayjobs", body)
    del body["spec"]["retries"]
    body["spec"]["backoffLimit"] = "three"
    with pytest.raises(ValueError, match=r"spec\.backoffLimit in body must be of type integer"):
        connect(TO).create(RAY, "rayjobs", body)
    assert len(kube.select("ray.io", "rayjobs", "team")) == 1


def test_what_a_cluster_refuses_is_one_line_soon(
    kube: KubeApi, switchwork: Run, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_file(tmp_path, corpus, {})
    cases = [
        ("k8s://away/team", "does not answer"),
        ("k8s://nowhere/team", "no context nowhere"),
        ("k8s://expired/team", "log in again"),
        ("k8s://lab/nobody", "no namespace nobody"),
        ("ftp://lab", "k8s://CONTEXT/NAMESPACE"),
    ]
    assert "a Ray head suspends no jobs" in switchwork("suspend", "some-job", "--to", "http://head:8265")[2]
    for to, words in cases:
        begin = time.monotonic()
        code, _, complaint = switchwork("submit", job, "--to", to)
        assert (code, complaint.count("\n"), complaint[:7]) == (2, 1, "error: "), complaint
        assert words in complaint
        assert time.monotonic() - begin < 15
    assert switchwork("jobs", "--to", "k8s://arn:aws:eks:eu:1:cluster/lab/default")[0] == 0, (
        "a context's name may have slashes"
    )
    kube.installed -= {("ray.io", "rayjobs")}
    assert "install KubeRay 1.7" in switchwork("submit", job, "--to", TO)[2]
    kube.installed |= {("ray.io", "rayjobs")}
    kube.users["good-token"] = User("alice", [])
    complaint = switchwork("submit", job, "--to", TO)[2]
    assert 'User "alice" cannot create resource "rayjobs"' in complaint
    assert "switchwork-submitter" in complaint
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    assert "KUBECONFIG" in switchwork("jobs", "--to", TO)[2]


def test_render_prints_the_manifest_and_asks_nobody(
    kube: KubeApi, switchwork: Run, tmp_path: Path, corpus: Path
) -> None:
    job = job_file(tmp_path, corpus, {})
    code, printed, _ = switchwork("submit", job, "--to", TO, "--render")
    assert code == 0
    assert yaml.safe_load(printed)["metadata"]["namespace"] == "team"
    assert kube.used == set()
    kube.create("ray.io", "rayjobs", yaml.safe_load(printed), strict=True)
    code, _, complaint = switchwork("submit", job, "--to", "http://head:8265", "--render")
    assert (code, "--render" in complaint) == (2, True)
    assert switchwork("submit", job, "cluster.kubernetes.image=null", "--to", TO)[0] == 2
    assert kube.used == set(), "a job that cannot run is refused before anything is sent"


def test_the_role_of_the_submitter_allows_what_the_commands_need_and_nothing_more(
    kube: KubeApi, submit: Submit, switchwork: Run
) -> None:
    operator = Operator(kube, "team")
    job_id = submit("run.name=first")
    queued = submit("run.name=queued", queue="team")
    operator.workload(queued)
    operator.initialise(job_id)
    kube.say(operator.run(job_id), "step 1")
    for command in (
        ["jobs"],
        ["status", job_id],
        ["status", queued],
        ["logs", job_id],
        ["suspend", job_id],
        ["suspend", queued],
        ["stop", job_id],
    ):
        assert switchwork(*command, "--to", TO)[0] == 0, command
    operator.initialise(queued)
    pod = operator.run(queued, "Succeeded")
    kube.say(pod, "step 1", close=True)
    threading.Timer(1.0, operator.end, [queued]).start()
    assert switchwork("logs", queued, "-f", "--to", TO)[0] == 0
    allowed = {
        (verb, group, resource)
        for rule in rules()
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert kube.used == allowed
