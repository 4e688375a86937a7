"""The manifests of k8s/: both overlays build, and every object passes its schema.

They keep the rules of a namespace that enforces "restricted".
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kube_schema
import kubernetes_validate
import pytest
import yaml
from kube_jobs import job_file, render

K8S = Path(__file__).parents[1] / "k8s"
OVERLAYS = ["dev", "gpu"]
NAMESPACED = {
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "Service",
    "StatefulSet",
    "Deployment",
    "NetworkPolicy",
    "Secret",
    "LocalQueue",
    "RayCluster",
}
OF_NO_NAMESPACE = {"Namespace", "ClusterQueue", "ResourceFlavor"}
VERSION = kubernetes_validate.latest_version()


def built(overlay: str) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of an overlay."""
    tool = shutil.which("kubectl")
    if tool is None:
        pytest.skip("kubectl, which has kustomize built in, is not installed")
    done = subprocess.run(
        [tool, "kustomize", str(K8S / "overlays" / overlay)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return list(yaml.safe_load_all(done.stdout))


def is_custom(manifest: dict[str, Any]) -> bool:
    return manifest["apiVersion"].partition("/")[0] in ("ray.io", "kueue.x-k8s.io")


def check(manifest: dict[str, Any]) -> None:
    """Raises if the manifest is not what its kind takes."""
    if is_custom(manifest):
        assert kube_schema.check(manifest) == []
    else:
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def pod_specs(manifest: Any) -> Iterator[dict[str, Any]]:
    """All pod specs in a manifest."""
    if isinstance(manifest, dict):
        if isinstance(manifest.get("containers"), list):
            yield manifest
        for value in manifest.values():
            yield from pod_specs(value)
    if isinstance(manifest, list):
        for value in manifest:
            yield from pod_specs(value)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_build_and_every_object_passes_its_schema(overlay: str) -> None:
    manifests = built(overlay)
    for manifest in manifests:
        check(manifest)
        wrong = manifest | {"spce": {}}
        with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
            check(wrong)
    kinds = {manifest["kind"] for manifest in manifests}
    assert kinds >= {"RayCluster", "ClusterQueue", "LocalQueue", "NetworkPolicy", "Role", "Deployment", "StatefulSet"}
    for manifest in manifests:
        expected = "switchwork" if manifest["kind"] in NAMESPACED else None
        assert manifest["kind"] in NAMESPACED | OF_NO_NAMESPACE
        assert manifest["metadata"].get("namespace") == expected, manifest["metadata"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_referred_to_is_there(overlay: str) -> None:
    manifests = built(overlay)
    there = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    by_hand = {("Secret", "mlflow-database"), ("Secret", "object-store")}
    assert by_hand <= there if overlay == "dev" else not by_hand & there, (
        "passwords of a real cluster are in no repository"
    )
    for manifest in manifests:
        for spec in pod_specs(manifest):
            mounted = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", [])}
            claimed = {template["metadata"]["name"] for template in manifest["spec"].get("volumeClaimTemplates", [])}
            assert mounted == {volume["name"] for volume in spec.get("volumes", [])} | claimed
            for container in spec["containers"] + spec.get("initContainers", []):
                secrets = {each["secretRef"]["name"] for each in container.get("envFrom", [])}
                secrets |= {
                    each["valueFrom"]["secretKeyRef"]["name"]
                    for each in container.get("env", [])
                    if "valueFrom" in each
                }
                assert {("Secret", name) for name in secrets} <= by_hand
                assert re.search(r":[\w.-]+$", container["image"]), container["image"]
    services = {
        manifest["metadata"]["name"]: manifest["spec"]["selector"]
        for manifest in manifests
        if manifest["kind"] == "Service"
    }
    labels = {
        m["metadata"]["name"]: m["spec"]["template"]["metadata"]["labels"]
        for m in manifests
        if m["kind"] in ("Deployment", "StatefulSet")
    }
    for name, selector in services.items():
        assert selector.items() <= labels[name].items()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted(overlay: str, tmp_path: Path, corpus: Path) -> None:
    jobs = render(job_file(tmp_path, corpus, {"autoscaling": {"max_workers": 2}}))
    specs = [spec for manifest in [*built(overlay), jobs] for spec in pod_specs(manifest)]
    assert len(specs) == 8
    for spec in specs:
        identity = spec["securityContext"]
        assert identity["runAsNonRoot"]
        assert identity["runAsUser"] > 0
        assert identity["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in spec["containers"] + spec.get("initContainers", []):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert set(container["resources"]) >= {"requests", "limits"}
    assert jobs["spec"]["rayClusterSpec"]["autoscalerOptions"]["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_network_rules_name_labels_that_pods_have() -> None:
    manifests = built("dev")
    labels = [
        manifest["spec"]["template"]["metadata"]["labels"]
        for manifest in manifests
        if manifest["kind"] in ("Deployment", "StatefulSet")
    ]
    labels += [
        {"ray.io/is-ray-node": "yes"},
        {"app.kubernetes.io/component": "submitter"},
        {"app.kubernetes.io/name": "kuberay-operator"},
    ]
    rules = [manifest["spec"] for manifest in manifests if manifest["kind"] == "NetworkPolicy"]
    selectors = [rule["podSelector"].get("matchLabels", {}) for rule in rules]
    peers = [
        peer
        for rule in rules
        for way in (*rule.get("ingress", []), *rule.get("egress", []))
        for peer in (*way.get("from", []), *way.get("to", []))
    ]
    selectors += [peer["podSelector"]["matchLabels"] for peer in peers]
    for selector in selectors:
        assert any(selector.items() <= each.items() for each in labels), selector


def test_the_image_is_pinned_and_not_root() -> None:
    lines = (K8S / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    arguments = dict(text.split("=", 1) for name, text in steps if name == "ARG")
    assert re.fullmatch(r"3\.11\.\d+-slim-bookworm", arguments["PYTHON"])
    assert [text for name, text in steps if name == "FROM"] == ["python:${PYTHON} AS packages", "python:${PYTHON}"]
    users = [text for name, text in steps if name == "USER"]
    assert users == ["1000:1000"], "the user of cluster/on_kubernetes/pods.py"
    for _, text in steps:
        for command in re.findall(r"pip install.*?(?=&&|$)", text):
            assert "constraints.txt" in command
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (K8S.parent / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert {"torch", "ray", "deepspeed", "mlflow", "kubernetes", "psycopg2-binary"} <= pinned


def test_ray_is_the_same_everywhere() -> None:
    (cluster,) = [manifest for manifest in built("dev") if manifest["kind"] == "RayCluster"]
    pins = dict(line.split("==") for line in (K8S.parent / "constraints.txt").read_text().splitlines() if "==" in line)
    assert cluster["spec"]["rayVersion"] == pins["ray"]
