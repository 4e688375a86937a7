"""switchwork submit, jobs, status, logs, stop, suspend and resume against an API server over HTTP, with the rights of k8s/base and no more."""

import copy
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube_api import KubeApi, User
from kube_operator import Operator
from test_cluster_rayjob import job_file

from launch.cli import main
from trainer.world import free_port

Run = Callable[..., tuple[int, str, str]]
TO = "k8s://lab/team"
ROLE = Path(__file__).parents[1] / "k8s" / "base" / "namespace" / "rbac.yaml"
QUEUED = {"queue": "team"}


def rules() -> list[dict[str, Any]]:
    """What the Role switchwork-submitter allows."""
    (role,) = [each for each in yaml.safe_load_all(ROLE.read_text()) if each["kind"] == "Role" and each["metadata"]["name"] == "switchwork-submitter"]
    return list(role["rules"])


@pytest.fixture(scope="module")
def used() -> set[tuple[str, str, str]]:
    """What all tests of this file asked of API servers: (verb, group, resource)."""
    found: set[tuple[str, str, str]] = set()
    return found


@pytest.fixture
def api(used: set[tuple[str, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeApi]:
    """An API server, with a kubeconfig whose context lab has the rights of the submitter's Role."""
    with KubeApi() as server:
        server.users["good-token"] = User("alice", rules())
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {"server": server.url}}, {"name": "away", "cluster": {"server": f"http://127.0.0.1:{free_port()}"}}],
            "users": [{"name": "alice", "user": {"token": "good-token"}}, {"name": "mallory", "user": {"token": "bad-token"}}],
            "contexts": [
                {"name": "lab", "context": {"cluster": "lab", "user": "alice", "namespace": "team"}},
                {"name": "arn:aws:eks:eu:1:cluster/lab", "context": {"cluster": "lab", "user": "alice"}},
                {"name": "expired", "context": {"cluster": "lab", "user": "mallory"}},
                {"name": "away", "context": {"cluster": "away", "user": "alice"}},
            ],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        yield server
        used |= server.used


@pytest.fixture
def switchwork(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command, in this process: exit code, what it printed, what it complained of."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["switchwork", *arguments])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def submit(switchwork: Run, tmp_path: Path, corpus: Path) -> Callable[..., str]:
    """Submits a job with these fields of cluster.kubernetes, and returns its id."""

    def run(*overrides: str, **kubernetes: Any) -> str:
        code, printed, complaint = switchwork("submit", job_file(tmp_path, corpus, kubernetes), "--to", TO, *overrides)
        assert (code, complaint) == (0, "")
        return printed.strip()

    return run


@pytest.fixture
def status(switchwork: Run) -> Callable[[str], tuple[str, str]]:
    """State and message of a job."""

    def run(job_id: str) -> tuple[str, str]:
        code, printed, complaint = switchwork("status", job_id, "--to", TO, "--json")
        assert code == 0, complaint
        found = json.loads(printed)
        assert found["id"] == job_id
        assert "\n" not in found["message"]
        return found["state"], found["message"]

    return run


Status = Callable[[str], tuple[str, str]]
Submit = Callable[..., str]


def test_a_job_from_submit_to_its_end(api: KubeApi, submit: Submit, status: Status, switchwork: Run) -> None:
    operator, job_id = Operator(api, "team"), submit()
    assert status(job_id)[0] == "PENDING"
    assert "is KubeRay running" in status(job_id)[1]
    operator.initialise(job_id)
    assert status(job_id) == ("PENDING", "the RayCluster comes up")
    pod = operator.run(job_id)
    assert status(job_id) == ("RUNNING", f"try 1 of 1 on RayCluster {job_id}-00001")
    api.say(pod, "step 1", "step 2")
    assert switchwork("logs", job_id, "--to", TO)[1] == "step 1\nstep 2\n"
    operator.end(job_id)
    assert status(job_id) == ("SUCCEEDED", "all done")
    second = submit(suspend=True)
    listed = json.loads(switchwork("jobs", "--to", TO, "--json")[1])
    assert {(each["id"], each["state"]) for each in listed} == {(job_id, "SUCCEEDED"), (second, "SUSPENDED")}
    assert f"SUCCEEDED  {job_id}" in switchwork("jobs", "--to", "k8s://lab")[1], "without a namespace the context's own"


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        (
            [("QuotaReserved", "False", "Pending", "couldn't assign flavors to pod set workers: insufficient quota for nvidia.com/gpu, 2 more needed")],
            "2 more needed",
        ),
        ([("QuotaReserved", "False", "Inadmissible", "LocalQueue team doesn't exist")], "LocalQueue team doesn't exist"),
        ([("Evicted", "True", "Preempted", "Preempted to accommodate a workload of higher priority")], "Preempted to accommodate"),
        ([], "waits in queue team"),
    ],
)
def test_waiting_for_quota(api: KubeApi, submit: Submit, status: Status, conditions: list[tuple[str, ...]], words: str) -> None:
    operator, job_id = Operator(api, "team"), submit(**QUEUED)
    fields = ("type", "status", "reason", "message")
    listed = [dict(zip(fields, each)) | {"lastTransitionTime": "2026-01-01T00:00:00Z"} for each in conditions]
    operator.workload(job_id, conditions=listed)
    state, message = status(job_id)
    assert state == "PENDING"
    assert words in message
    assert "queue team" in message


WAITING = {
    "image": (
        {"containerStatuses": [{"image": "registry.lab/x:1", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off: not found"}}}]},
        None,
        ["cannot get its image registry.lab/x:1", "Back-off: not found"],
    ),
    "secret": (
        {"containerStatuses": [{"state": {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}}}]},
        None,
        ["cannot be set up", 'secret "hub" not found'],
    ),
    "nodes": (
        {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: 3 Insufficient nvidia.com/gpu."}]},
        None,
        ["cannot be scheduled", "3 Insufficient nvidia.com/gpu"],
    ),
    "nodes, by event": ({}, ("FailedScheduling", "0/3 nodes: untolerated taint"), ["cannot be scheduled", "untolerated taint"]),
    "storage": ({}, ("FailedMount", 'persistentvolumeclaim "storage" not found'), ["waits for its storage", '"storage" not found']),
    "fetching": ({}, ("Pulling", "Pulling image"), ["its image is fetched"]),
    "crashes": (
        {
            "containerStatuses": [
                {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": {"exitCode": 1, "message": "a\nNo module named ray\n"}}}
            ]
        },
        None,
        ["fails again and again", "exit code 1: No module named ray"],
    ),
}


@pytest.mark.parametrize("case", WAITING)
def test_waiting_for_pods(api: KubeApi, submit: Submit, status: Status, case: str) -> None:
    reported, event, words = WAITING[case]
    operator, job_id = Operator(api, "team"), submit()
    operator.initialise(job_id, pods="Pending")
    assert "is starting" in status(job_id)[1]
    pod = f"{job_id}-00001-worker-0"
    operator.phase(f"{job_id}-00001-head", "Running")
    operator.phase(pod, "Pending", **reported)
    if event:
        operator.event("Pod", pod, "Warning", *event)
    state, message = status(job_id)
    assert state == "PENDING"
    for word in [f"pod {pod}", *words]:
        assert word in message


def test_what_a_job_died_of(api: KubeApi, submit: Submit, status: Status) -> None:
    operator, job_id = Operator(api, "team"), submit()
    operator.initialise(job_id)
    operator.run(job_id)
    worker = f"{job_id}-00001-worker-1"
    operator.phase(worker, "Failed", containerStatuses=[{"state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}])
    assert f"pod {worker} failed: out of memory" in status(job_id)[1]
    said = "Job entrypoint command failed with exit code 1, last available logs:\nTraceback (most recent call last):\nerror: run.root: cannot write\n"
    operator.end(job_id, failed=said)
    assert status(job_id) == ("FAILED", f"AppFailed: pod {worker}: out of memory (OOMKilled; raise memory): error: run.root: cannot write")


def test_what_the_operator_refuses_is_told(api: KubeApi, submit: Submit, status: Status) -> None:
    operator, job_id = Operator(api, "team"), submit()
    job = operator.job(job_id)
    job["spec"] |= {"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 60}
    api.update("ray.io", "rayjobs", job)
    operator.initialise(job_id)
    state, message = status(job_id)
    assert state == "INVALID"
    assert "cannot have TTLSecondsAfterFinished" in message


def test_logs_follow_the_driver_over_its_tries_and_broken_connections(api: KubeApi, submit: Submit, switchwork: Run) -> None:
    operator, job_id = Operator(api, "team"), submit(backoff_limit=1)

    def cluster() -> None:
        time.sleep(0.3)
        operator.initialise(job_id)
        first = operator.run(job_id)
        api.break_log_after = 2
        api.say(first, "step 1", "step 2", "step 3")
        time.sleep(1.5)
        owner = api.get("batch", "jobs", "team", job_id)
        operator.phase(first, "Failed")  # its node went; the Ray job goes on, and a second submitter prints it from the beginning
        api.say(first, close=True)
        second = operator.submitter(job_id, owner)
        api.say(second, "step 1", "step 2", "step 3", "step 4", "step 4", close=True)
        api.forget()
        operator.phase(second, "Failed")
        operator.end(job_id, failed="error: worker 1 was lost")
        time.sleep(1.5)
        operator.retry(job_id)
        operator.initialise(job_id)
        third = operator.run(job_id)
        api.say(third, "resumed from step 4", "step 4", "step 5", close=True)
        operator.phase(third, "Succeeded")
        operator.end(job_id)

    events = threading.Thread(target=cluster)
    events.start()
    code, printed, _ = switchwork("logs", job_id, "-f", "--to", TO)
    events.join()
    assert code == 0
    driver = [line for line in printed.splitlines() if not line.startswith("[")]
    assert driver == ["step 1", "step 2", "step 3", "step 4", "step 4", "resumed from step 4", "step 4", "step 5"]
    said = [line for line in printed.splitlines() if line.startswith("[")]
    assert said[0].startswith("[PENDING: ")
    assert any(line.startswith("[RETRYING: try 1 of 2 failed") for line in said)
    assert said[-1] == "[SUCCEEDED: all done]"


@pytest.mark.parametrize("as_http", [False, True], ids=["410 in the stream", "410 as the answer"])
def test_a_watch_whose_version_was_forgotten_lists_again(api: KubeApi, submit: Submit, as_http: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.kubernetes_client import RAY, changes, connect

    submit()
    api.gone_as_http = as_http
    cluster = connect(TO)
    news = changes(cluster, lambda **how: cluster.objects(RAY, "rayjobs", **how), quiet_s=1)
    kind, jobs = next(news)
    assert (kind, len(jobs)) == ("LISTED", 1)
    assert next(news) == ("QUIET", None)
    other = copy.deepcopy(jobs[0])
    other["metadata"]["name"] = "other"
    api.create("ray.io", "rayjobs", other)
    api.forget()
    found = next(listed for kind, listed in news if kind == "LISTED")
    assert api.watches_refused >= 1
    assert {job["metadata"]["name"] for job in found} == {jobs[0]["metadata"]["name"], "other"}
    api.set_status("ray.io", "rayjobs", "team", "other", jobDeploymentStatus="Running")
    kind, changed = next(event for event in news if event[0] != "QUIET")
    assert (kind, changed["metadata"]["name"]) == ("MODIFIED", "other")


def test_stop_removes_what_the_job_made_and_nothing_else(api: KubeApi, submit: Submit, switchwork: Run) -> None:
    operator, first, second = Operator(api, "team"), submit("run.name=first"), submit("run.name=second")
    by_hand = copy.deepcopy(operator.job(first))
    by_hand["metadata"] = {"name": "by-hand", "namespace": "team"}
    api.create("ray.io", "rayjobs", by_hand)
    api.create("", "secrets", {"metadata": {"name": "object-store", "namespace": "team"}})
    for job_id in (first, second):
        operator.initialise(job_id)
        operator.run(job_id)
    before = {(kind, name) for kind, objects in api.objects.items() for _, name in objects}
    assert switchwork("stop", first, "--to", TO) == (0, "", "")
    after = {(kind, name) for kind, objects in api.objects.items() for _, name in objects}
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
    assert (code, "not made by switchwork" in complaint, complaint.count("\n")) == (2, True, 1)
    code, _, complaint = switchwork("status", first, "--to", TO)
    assert (code, first in complaint, complaint.count("\n")) == (2, True, 1)


def test_a_job_of_the_same_name_that_came_meanwhile_is_not_removed(api: KubeApi, submit: Submit) -> None:
    from cluster.kubernetes_client import RAY, connect

    job_id = submit()
    with pytest.raises(ValueError, match="Precondition failed: UID"):
        connect(TO).delete(RAY, "rayjobs", job_id, "another-uid")
    assert api.get("ray.io", "rayjobs", "team", job_id)


def test_suspend_and_resume(api: KubeApi, submit: Submit, status: Status, switchwork: Run) -> None:
    operator, job_id = Operator(api, "team"), submit(suspend=True)
    operator.initialise(job_id)
    assert status(job_id) == ("SUSPENDED", "suspended; `switchwork resume` lets it go on")
    assert switchwork("resume", job_id, "--to", TO, "--json")[:2] == (0, json.dumps({"id": job_id, "done": "resume"}) + "\n")
    assert operator.job(job_id)["spec"]["suspend"] is False
    assert switchwork("suspend", job_id, "--to", TO)[0] == 0
    assert operator.job(job_id)["spec"]["suspend"] is True


def test_a_queued_job_is_suspended_through_kueue(api: KubeApi, submit: Submit, status: Status, switchwork: Run) -> None:
    operator, job_id = Operator(api, "team"), submit(**QUEUED)
    code, _, complaint = switchwork("suspend", job_id, "--to", TO)
    assert (code, "no Workload" in complaint) == (2, True)
    name = operator.workload(job_id)
    assert switchwork("suspend", job_id, "--to", TO)[0] == 0
    assert api.get("kueue.x-k8s.io", "workloads", "team", name)["spec"]["active"] is False
    assert operator.job(job_id)["spec"]["suspend"] is False, "that field is Kueue's"
    assert status(job_id) == ("SUSPENDED", "suspended; `switchwork resume` queues it again")
    assert switchwork("resume", job_id, "--to", TO)[0] == 0
    assert api.get("kueue.x-k8s.io", "workloads", "team", name)["spec"]["active"] is True


def test_fields_that_the_kind_does_not_have_are_refused_not_dropped(api: KubeApi, submit: Submit) -> None:
    from cluster.kubernetes_client import RAY, connect

    body = copy.deepcopy(api.get("ray.io", "rayjobs", "team", submit()))
    body["metadata"] = {"name": "other"}
    body["spec"]["retries"] = 3
    with pytest.raises(ValueError, match=r'unknown field "spec\.retries"'):
        connect(TO).create(RAY, "rayjobs", body)
    del body["spec"]["retries"]
    body["spec"]["backoffLimit"] = "three"
    with pytest.raises(ValueError, match=r"spec\.backoffLimit in body must be of type integer"):
        connect(TO).create(RAY, "rayjobs", body)
    assert len(api.select("ray.io", "rayjobs", "team")) == 1


def test_what_a_cluster_refuses_is_one_line_soon(api: KubeApi, switchwork: Run, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_file(tmp_path, corpus, {})
    cases = [
        ("k8s://away/team", "does not answer"),
        ("k8s://nowhere/team", "no context nowhere"),
        ("k8s://expired/team", "log in again"),
        ("k8s://lab/nobody", "no namespace nobody"),
        ("ftp://lab", "k8s://CONTEXT/NAMESPACE"),
    ]
    for to, words in cases:
        begin = time.monotonic()
        code, _, complaint = switchwork("submit", job, "--to", to)
        assert (code, complaint.count("\n"), complaint[:7]) == (2, 1, "error: "), complaint
        assert words in complaint
        assert time.monotonic() - begin < 15
    assert switchwork("jobs", "--to", "k8s://arn:aws:eks:eu:1:cluster/lab/default")[0] == 0, "a context's name may have slashes"
    api.installed -= {("ray.io", "rayjobs")}
    assert "install KubeRay 1.7" in switchwork("submit", job, "--to", TO)[2]
    api.installed |= {("ray.io", "rayjobs")}
    api.users["good-token"] = User("alice", [])
    complaint = switchwork("submit", job, "--to", TO)[2]
    assert 'User "alice" cannot create resource "rayjobs"' in complaint
    assert "switchwork-submitter" in complaint
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    assert "KUBECONFIG" in switchwork("jobs", "--to", TO)[2]


def test_render_prints_the_manifest_and_asks_nobody(api: KubeApi, switchwork: Run, tmp_path: Path, corpus: Path) -> None:
    job = job_file(tmp_path, corpus, {})
    code, printed, _ = switchwork("submit", job, "--to", TO, "--render")
    assert code == 0
    assert api.used == set()
    api.create("ray.io", "rayjobs", yaml.safe_load(printed), strict=True)
    code, _, complaint = switchwork("submit", job, "--to", "http://head:8265", "--render")
    assert (code, "--render" in complaint) == (2, True)
    assert switchwork("submit", job, "cluster.kubernetes.image=null", "--to", TO)[0] == 2
    assert api.used == set(), "a job that cannot run is refused before anything is sent"


def test_the_role_of_the_submitter_allows_what_the_command_needs_and_nothing_more(used: set[tuple[str, str, str]]) -> None:
    """Last of this file: the servers have noted what all the tests above asked for."""
    allowed = {(verb, group, resource) for rule in rules() for group in rule["apiGroups"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert used == allowed
