"""A stand-in for the KubeRay operator, which moves RayJobs through their states.

It plays Kueue and the kubelets too, as far as a job's status shows them. Its rules are those of
KubeRay 1.7's validation; its objects, labels, names and owners are those that KubeRay makes.
"""

import re
import threading
import time
from typing import Any

from kube_api import Json, KubeApi

FINALIZER = "ray.io/rayjob-finalizer"


class Operator:
    """Act on the jobs of one namespace.

    Changes that take time in a real cluster happen when a test says so; deletions are followed at
    once.
    """

    def __init__(self, api: KubeApi, namespace: str):
        self.api = api
        self.namespace = namespace
        self.clusters = 0
        threading.Thread(target=self._let_go, daemon=True).start()

    def job(self, name: str) -> Json:
        return self.api.get("ray.io", "rayjobs", self.namespace, name)

    def status(self, name: str, **fields: Any) -> None:
        self.api.set_status("ray.io", "rayjobs", self.namespace, name, **fields)

    def initialise(self, name: str, pods: str = "Running") -> None:
        """Move from New to Initializing, with a RayCluster whose pods are in the phase `pods`.

        An invalid job moves to ValidationFailed, a suspended one to Suspended.
        """
        job = self.job(name)
        if problem := validation_problem(job):
            self.status(name, jobDeploymentStatus="ValidationFailed", reason="ValidationFailed", message=problem)
            self.event("RayJob", name, "Warning", "InvalidRayJobSpec", f"{self.namespace}/{name}: {problem}")
            return
        if job["spec"]["suspend"]:
            self.status(name, jobDeploymentStatus="Suspended")
            return
        job["metadata"]["finalizers"] = [FINALIZER]
        self.api.update("ray.io", "rayjobs", job)
        self.clusters += 1
        cluster = f"{name}-{self.clusters:05x}"
        owned = self._make("ray.io", "rayclusters", cluster, job, {"spec": job["spec"]["rayClusterSpec"]})
        labels = {"ray.io/cluster": cluster, "ray.io/is-ray-node": "yes"}
        self._make("", "secrets", cluster, owned, {})
        self._make("", "services", f"{cluster}-head-svc", owned, {})
        spec = job["spec"]["rayClusterSpec"]
        templates = [("head", spec["headGroupSpec"]["template"])]
        templates += [
            (f"worker-{n}", spec["workerGroupSpecs"][0]["template"])
            for n in range(spec["workerGroupSpecs"][0]["replicas"])
        ]
        for suffix, template in templates:
            self._pod(f"{cluster}-{suffix}", owned, template["spec"], labels, pods)
        self.status(name, jobDeploymentStatus="Initializing", jobId=f"{name}-{self.clusters}", rayClusterName=cluster)

    def run(self, name: str, submitter: str = "Running") -> str:
        """Initializing to Running: the submitter's Job and pod, whose name is returned."""
        job = self.job(name)
        owned = self._make("batch", "jobs", name, job, {})
        pod = self.submitter(name, owned, submitter)
        self.status(name, jobDeploymentStatus="Running", jobStatus="RUNNING", dashboardURL="head:8265")
        return pod

    def submitter(self, name: str, owner: Json, phase: str = "Running") -> str:
        """A pod of the submitter's Job: a new one for the same Ray job if the old one was lost."""
        job = self.job(name)
        number = (
            sum(1 for pod in self.api.select("", "pods", self.namespace, f"batch.kubernetes.io/job-name={name}"))
            + self.clusters * 10
        )
        spec = job["spec"]["submitterPodTemplate"]["spec"]
        container = {
            **spec["containers"][0],
            "env": [{"name": "RAY_JOB_SUBMISSION_ID", "value": job["status"]["jobId"]}],
        }
        pod = f"{name}-sub{number}"
        self._pod(
            pod,
            owner,
            spec | {"containers": [container]},
            {"batch.kubernetes.io/job-name": name, "job-name": name},
            phase,
        )
        return pod

    def end(self, name: str, failed: str | None = None) -> None:
        """Move from Running to Complete, or, with Ray's message `failed`, to Retrying or Failed.

        Retrying comes as long as there are tries left.
        """
        if failed is None:
            self.status(
                name,
                jobDeploymentStatus="Complete",
                jobStatus="SUCCEEDED",
                succeeded=1,
                message="Job finished successfully.",
            )
            return
        job = self.job(name)
        count = job["status"].get("failed", 0) + 1
        again = count <= job["spec"]["backoffLimit"]
        deployment = "Retrying" if again else "Failed"
        self.status(
            name, jobDeploymentStatus=deployment, jobStatus="FAILED", failed=count, reason="AppFailed", message=failed
        )

    def retry(self, name: str) -> None:
        """Retrying to New: the old cluster and submitter go."""
        job = self.job(name)
        self.api.delete("ray.io", "rayclusters", self.namespace, job["status"]["rayClusterName"])
        self.api.delete("batch", "jobs", self.namespace, name)
        self.status(name, jobDeploymentStatus="", jobStatus="", rayClusterName="", jobId="", message="", reason="")

    def phase(self, pod: str, phase: str, **status: Any) -> None:
        """What a kubelet or the scheduler reports of a pod."""
        self.api.set_status("", "pods", self.namespace, pod, phase=phase, **status)

    def event(self, kind: str, about: str, level: str, reason: str, message: str) -> None:
        """An event about an object."""
        number = len(self.api.objects["", "events"])
        fields = {"involvedObject": {"kind": kind, "name": about}, "type": level, "reason": reason, "message": message}
        body = {
            "metadata": {"name": f"{about}.{number:x}", "namespace": self.namespace},
            "lastTimestamp": f"2026-01-01T00:{number:02d}:00Z",
        }
        self.api.create("", "events", body | fields)

    def workload(self, name: str, **status: Any) -> str:
        """Kueue's record of a queued job, and its name."""
        job = self.job(name)
        spec = {"queueName": job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], "active": True, "podSets": []}
        made = self._make("kueue.x-k8s.io", "workloads", f"rayjob-{name}-0a1b2", job, {"spec": spec})
        self.api.set_status("kueue.x-k8s.io", "workloads", self.namespace, made["metadata"]["name"], **status)
        return str(made["metadata"]["name"])

    def _pod(self, name: str, owner: Json, spec: Json, labels: dict[str, str], phase: str) -> None:
        pod = self._make("", "pods", name, owner, {"spec": spec}, labels)
        self.api.set_status("", "pods", self.namespace, pod["metadata"]["name"], phase=phase)

    def _make(
        self, group: str, plural: str, name: str, owner: Json, body: Json, labels: dict[str, str] | None = None
    ) -> Json:
        reference = {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
        }
        metadata = {
            "name": name,
            "namespace": self.namespace,
            "labels": labels or {},
            "ownerReferences": [reference | {"controller": True}],
        }
        return self.api.create(group, plural, {"metadata": metadata, **body})

    def _let_go(self) -> None:
        """Remove the finalizer from every job that is being deleted.

        The operator does so a little later, after it has stopped the Ray job.
        """
        seen: set[str] = set()
        while not self.api.closing:
            time.sleep(0.3)
            with self.api.news:
                for job in self.api.select("ray.io", "rayjobs", self.namespace):
                    if "deletionTimestamp" not in job["metadata"]:
                        continue
                    if job["metadata"]["uid"] in seen:
                        job["metadata"]["finalizers"] = []
                        self.api.update("ray.io", "rayjobs", job)
                    seen.add(job["metadata"]["uid"])


def validation_problem(job: Json) -> str:
    """KubeRay 1.7's reason to refuse a job that the API server accepted; empty if there is none."""
    spec = job["spec"]
    name = job["metadata"]["name"]
    shutdown = spec.get("shutdownAfterJobFinishes", False)
    if len(name) > 47:
        return "The RayJob metadata is invalid: RayJob name should be no more than 47 characters"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        return "The RayJob metadata is invalid: RayJob name should be a valid DNS1035 label"
    kept = "The RayJob spec is invalid: a RayJob with shutdownAfterJobFinishes set to false"
    if spec.get("suspend") and not shutdown:
        return f"{kept} is not allowed to be suspended"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown:
        return f"{kept} cannot have TTLSecondsAfterFinished"
    if "rayClusterSpec" not in spec and "clusterSelector" not in spec:
        return "The RayJob spec is invalid: one of RayClusterSpec or ClusterSelector must be set"
    if spec.get("activeDeadlineSeconds", 1) <= 0:
        return "The RayJob spec is invalid: activeDeadlineSeconds must be a positive integer"
    return _cluster_problem(spec["rayClusterSpec"])


def _cluster_problem(spec: Json) -> str:
    groups = [
        ("Head", spec["headGroupSpec"]),
        *((group["groupName"], group) for group in spec.get("workerGroupSpecs", [])),
    ]
    for name, group in groups:
        if not group["template"]["spec"]["containers"]:
            return f"The RayJob spec is invalid: {name} should have at least one container"
        if "labels" in group["rayStartParams"]:
            return (
                f"rayStartParams['labels'] is not supported for {name} group; "
                "please use the top-level Labels field instead"
            )
        restart = group["template"]["spec"].get("restartPolicy", "Never")
        if spec.get("autoscalerOptions", {}).get("version") == "v2" and restart != "Never":
            return f"restartPolicy for {name} Pod should be Never or unset when using autoscaler V2"
    if spec.get("authOptions", {}).get("mode") == "token" and tuple(
        map(int, spec.get("rayVersion", "0").split(".")[:2])
    ) < (2, 52):
        return f"authOptions.mode is 'token' but minimum Ray version is 2.52.0, got {spec.get('rayVersion')}"
    return ""


def admission_problem(job: Json) -> str:
    """What Kueue's webhook refuses of a job with a queue; empty if nothing."""
    spec = job["spec"]
    if "kueue.x-k8s.io/queue-name" not in job["metadata"].get("labels", {}):
        return ""
    if not spec.get("shutdownAfterJobFinishes"):
        return (
            "spec.shutdownAfterJobFinishes: Invalid value: false: "
            "a kueue managed job should delete the cluster after finishing"
        )
    if spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
        return (
            "spec.rayClusterSpec.enableInTreeAutoscaling: Invalid value: true: "
            "a kueue managed job should not use autoscaling"
        )
    return ""
