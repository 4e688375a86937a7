"""switchwork logs -f on Kubernetes, and the watches below it.

They last over tries, broken connections and servers that forget.
"""

import copy
import threading
import time

import pytest
from kube_api import KubeApi
from kube_cluster import Run, Submit
from kube_jobs import TO
from kube_operator import Operator

from cluster.on_kubernetes.logs import Printed


def test_logs_follow_the_driver_over_its_tries_and_broken_connections(
    kube: KubeApi, submit: Submit, switchwork: Run
) -> None:
    operator = Operator(kube, "team")
    job_id = submit(backoff_limit=1)

    def cluster() -> None:
        time.sleep(0.3)
        operator.initialise(job_id)
        first = operator.run(job_id)
        kube.break_log_after = 2
        kube.say(first, "step 1", "step 2", "step 3")
        time.sleep(1.5)
        owner = kube.get("batch", "jobs", "team", job_id)
        operator.phase(
            first, "Failed"
        )  # its node went; the Ray job goes on, and a second submitter prints it from the beginning
        kube.say(first, close=True)
        second = operator.submitter(job_id, owner)
        kube.say(second, "step 1", "step 2", "step 3", "step 4", "step 4", close=True)
        kube.forget()
        operator.phase(second, "Failed")
        operator.end(job_id, failed="error: worker 1 was lost")
        time.sleep(1.5)
        operator.retry(job_id)
        operator.initialise(job_id)
        third = operator.run(job_id)
        kube.say(third, "resumed from step 4", "step 4", "step 5", close=True)
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
def test_a_watch_whose_version_was_forgotten_lists_again(
    kube: KubeApi, submit: Submit, as_http: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.on_kubernetes.client import RAY, changes, connect

    submit()
    kube.gone_as_http = as_http
    cluster = connect(TO)
    news = changes(cluster, lambda **how: cluster.objects(RAY, "rayjobs", **how), quiet_s=1)
    kind, jobs = next(news)
    assert (kind, len(jobs)) == ("LISTED", 1)
    assert next(news) == ("QUIET", [])
    other = copy.deepcopy(jobs[0])
    other["metadata"]["name"] = "other"
    kube.create("ray.io", "rayjobs", other)
    kube.forget()
    found = next(listed for kind, listed in news if kind == "LISTED")
    assert kube.watches_refused >= 1
    assert {job["metadata"]["name"] for job in found} == {jobs[0]["metadata"]["name"], "other"}
    kube.set_status("ray.io", "rayjobs", "team", "other", jobDeploymentStatus="Running")
    kind, (changed,) = next(event for event in news if event[0] != "QUIET")
    assert (kind, changed["metadata"]["name"]) == ("MODIFIED", "other")


def test_a_second_submitter_shows_only_what_is_new() -> None:
    printed = Printed()
    printed.begin("job-1")
    first = ["waiting for the dashboard", "submitted", "step 1", "step 2", "step 2"]
    assert [text for text in first if printed.new(text)] == first
    printed.begin("job-1")
    assert [
        text
        for text in ["waiting for the dashboard", "again", "step 1", "step 2", "step 2", "step 3"]
        if printed.new(text)
    ] == ["again", "step 3"]
    printed.begin("job-2")
    assert [text for text in first if printed.new(text)] == first, "another Ray job has a log of its own"
