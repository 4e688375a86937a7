"""A small Kubernetes API server over HTTP, which behaves as the real one does towards a client.

It has uid, resourceVersion and generation; strict validation against the CRDs in tests/crds, else
silent pruning; the status sub-resource; conflicts; watches that time out, send bookmarks and answer
410 once their version was forgotten; owner references, finalizers and preconditions on deletion;
tokens and rules (401, 403); and pods' logs. Its own methods do the work of controllers, past the
rules.
"""

import copy
import itertools
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from typing import Any

import kube_schema

Json = dict[str, Any]
KINDS = {  # (group, plural): (version, kind)
    ("", "pods"): ("v1", "Pod"),
    ("", "events"): ("v1", "Event"),
    ("", "services"): ("v1", "Service"),
    ("", "secrets"): ("v1", "Secret"),
    ("", "configmaps"): ("v1", "ConfigMap"),
    ("batch", "jobs"): ("v1", "Job"),
    ("ray.io", "rayjobs"): ("v1", "RayJob"),
    ("ray.io", "rayclusters"): ("v1", "RayCluster"),
    ("kueue.x-k8s.io", "workloads"): ("v1beta2", "Workload"),
}
CUSTOM = {("ray.io", "rayjobs"), ("ray.io", "rayclusters"), ("kueue.x-k8s.io", "workloads")}


class Refused(Exception):
    """Becomes a Status object."""

    def __init__(self, code: int, reason: str, message: str):
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message

    @property
    def status(self) -> Json:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }


@dataclass
class PodLog:
    """What a pod has printed: (time stamp, line)."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    closed: bool = False


@dataclass(frozen=True)
class User:
    """Who a token belongs to, and what he may do; rules None: all."""

    name: str
    rules: list[Json] | None = None

    def may(self, verb: str, group: str, resource: str) -> bool:
        """Whether a rule of a Role allows it."""
        return self.rules is None or any(
            group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"]
            for rule in self.rules
        )


class KubeApi:
    """The objects, their history, and the server in front of them.

    A context manager; `url` is the server's address.
    """

    def __init__(self, namespaces: tuple[str, ...] = ("default", "team")):
        self.namespaces = namespaces
        self.installed = set(KINDS)  # take kinds away to have a cluster without KubeRay or Kueue
        self.users = {"good-token": User("alice")}
        self.used: set[tuple[str, str, str]] = set()
        self.objects: dict[tuple[str, str], dict[tuple[str, str], Json]] = {kind: {} for kind in KINDS}
        self.history: list[tuple[int, tuple[str, str], str, Json]] = []
        self.forgotten = 0
        self.gone_as_http = False
        self.watches_refused = 0
        self.logs: dict[str, PodLog] = {}
        self.break_log_after: int | None = None
        self.version = itertools.count(1)
        self.now = 0
        self.news = threading.Condition(threading.RLock())
        self.closing = False

    def __enter__(self) -> "KubeApi":
        from kube_http import Handler

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"api": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.closing = True
        with self.news:
            self.news.notify_all()
        self.server.shutdown()
        self.server.server_close()

    def create(self, group: str, plural: str, body: Json, strict: bool = False) -> Json:
        """Store a new object as the server would; what is stored is returned."""
        obj = copy.deepcopy(body)
        version, kind = KINDS[group, plural]
        metadata = obj.setdefault("metadata", {})
        namespace = metadata.setdefault("namespace", "default")
        if namespace not in self.namespaces:
            raise Refused(404, "NotFound", f'namespaces "{namespace}" not found')
        obj |= {"apiVersion": f"{group}/{version}" if group else version, "kind": kind}
        if (group, plural) in CUSTOM:
            obj = self._accepted(group, plural, obj, strict)
            obj.pop("status", None)
        with self.news:
            if (namespace, metadata["name"]) in self.objects[group, plural]:
                raise Refused(409, "AlreadyExists", f'{_resource(group, plural)} "{metadata["name"]}" already exists')
            obj["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": _now(), "generation": 1}
            return self._store(group, plural, "ADDED", obj)

    def get(self, group: str, plural: str, namespace: str, name: str) -> Json:
        """A copy of an object. Raises Refused (404)."""
        with self.news:
            if (namespace, name) not in self.objects[group, plural]:
                raise Refused(404, "NotFound", f'{_resource(group, plural)} "{name}" not found')
            return copy.deepcopy(self.objects[group, plural][namespace, name])

    def update(self, group: str, plural: str, obj: Json, part: str = "spec", strict: bool = False) -> Json:
        """Replace an object's spec and metadata, or with part="status" its status only.

        Raises Refused (409) if the object was changed meanwhile.
        """
        metadata = obj["metadata"]
        with self.news:
            old = self.get(group, plural, metadata["namespace"], metadata["name"])
            if "resourceVersion" in metadata and metadata["resourceVersion"] != old["metadata"]["resourceVersion"]:
                words = "the object has been modified; please apply your changes to the latest version and try again"
                raise Refused(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {_resource(group, plural)} "{metadata["name"]}": {words}',
                )
            if part == "status" or (group, plural) not in CUSTOM:
                new = old | {"status": obj.get("status", {})} if part == "status" else copy.deepcopy(obj)
            else:
                new = {**copy.deepcopy(obj), **({"status": old["status"]} if "status" in old else {})}
            if (group, plural) in CUSTOM:
                new = self._accepted(group, plural, new, strict)
            fixed = {key: old["metadata"][key] for key in ("uid", "creationTimestamp", "generation")}
            new["metadata"] = new["metadata"] | fixed
            new["metadata"]["generation"] += int(new.get("spec") != old.get("spec"))
            if "deletionTimestamp" in new["metadata"] and not new["metadata"].get("finalizers"):
                self._remove(group, plural, new)
                return new
            return self._store(group, plural, "MODIFIED", new)

    def set_status(self, group: str, plural: str, namespace: str, name: str, **status: Any) -> Json:
        """Merge fields into an object's status, as its controller does."""
        with self.news:
            obj = self.get(group, plural, namespace, name)
            obj["status"] = {**obj.get("status", {}), **status}
            return self.update(group, plural, obj, "status")

    def delete(self, group: str, plural: str, namespace: str, name: str, options: Json | None = None) -> Json:
        """Delete an object and what it owns; one with finalizers waits for them."""
        with self.news:
            obj = self.get(group, plural, namespace, name)
            for key, wanted in ((options or {}).get("preconditions") or {}).items():
                if wanted is not None and obj["metadata"][key] != wanted:
                    label = key.upper()
                    words = (
                        f"Precondition failed: {label} in precondition: {wanted}, "
                        f"{label} in object meta: {obj['metadata'][key]}"
                    )
                    raise Refused(
                        409,
                        "Conflict",
                        f'Operation cannot be fulfilled on {_resource(group, plural)} "{name}": {words}',
                    )
            if obj["metadata"].get("finalizers"):
                obj["metadata"].setdefault("deletionTimestamp", _now())
                return self._store(group, plural, "MODIFIED", obj)
            self._remove(group, plural, obj)
            return {
                "kind": "Status",
                "apiVersion": "v1",
                "metadata": {},
                "status": "Success",
                "details": {"name": name, "uid": obj["metadata"]["uid"]},
            }

    def select(self, group: str, plural: str, namespace: str, labels: str = "", fields: str = "") -> list[Json]:
        """Copies of the objects that match both selectors."""
        with self.news:
            found = [obj for (where, _), obj in self.objects[group, plural].items() if where == namespace]
        return [copy.deepcopy(obj) for obj in found if matches(obj, labels, fields)]

    def forget(self) -> None:
        """Compact the history: whoever watches from an older version is told 410."""
        with self.news:
            self.now = next(self.version)
            self.forgotten = self.now
            self.history.clear()

    def changes(self, kind: tuple[str, str], since: int, until: float) -> Iterator[tuple[int, str, Json] | None]:
        """Yield the events of `kind` after version `since`, as they happen, until time `until`.

        Yields None where that version was forgotten.
        """
        while True:
            with self.news:
                if since < self.forgotten:
                    yield None
                    return
                new = [
                    (version, deed, obj)
                    for version, which, deed, obj in self.history
                    if version > since and which == kind
                ]
                if not new:
                    left = until - time.monotonic()
                    if left <= 0 or self.closing:
                        return
                    self.news.wait(min(left, 0.5))
            for version, deed, obj in new:
                since = version
                yield version, deed, obj

    def say(self, pod: str, *lines: str, close: bool = False) -> None:
        """Have a pod print lines."""
        with self.news:
            log = self.logs.setdefault(pod, PodLog())
            log.lines += [
                (datetime.now(UTC).strftime(f"%Y-%m-%dT%H:%M:%S.%f{n:03d}Z"), text) for n, text in enumerate(lines)
            ]
            log.closed = log.closed or close
            self.news.notify_all()

    def _accepted(self, group: str, plural: str, obj: Json, strict: bool) -> Json:
        """The object as it will be kept: pruned, and filled with defaults.

        Raises Refused for an object that the server refuses.
        """
        version, kind = KINDS[group, plural]
        schema = kube_schema.schema(plural, version)
        name = obj["metadata"].get("name", "")
        if strict and (unknown := kube_schema.unknown_fields(schema, obj)):
            words = ", ".join(f'unknown field "{path}"' for path in unknown)
            raise Refused(
                400,
                "BadRequest",
                f'{kind} in version "{version}" cannot be handled as a {kind}: strict decoding error: {words}',
            )
        kept = kube_schema.with_defaults(schema, kube_schema.pruned(schema, obj))
        found = kube_schema.name_problems(name) + kube_schema.problems(schema, kept)
        if found:
            listed = found[0] if len(found) == 1 else f"[{', '.join(found)}]"
            raise Refused(422, "Invalid", f'{kind}.{group} "{name}" is invalid: {listed}')
        return dict(kept)

    def _store(self, group: str, plural: str, deed: str, obj: Json) -> Json:
        self.now = next(self.version)
        obj["metadata"]["resourceVersion"] = str(self.now)
        self.objects[group, plural][obj["metadata"]["namespace"], obj["metadata"]["name"]] = obj
        self.history.append((self.now, (group, plural), deed, copy.deepcopy(obj)))
        self.news.notify_all()
        return copy.deepcopy(obj)

    def _remove(self, group: str, plural: str, obj: Json) -> None:
        """Take the object away, and all that only it owns."""
        del self.objects[group, plural][obj["metadata"]["namespace"], obj["metadata"]["name"]]
        self.now = next(self.version)
        gone = copy.deepcopy(obj)
        gone["metadata"]["resourceVersion"] = str(self.now)
        self.history.append((self.now, (group, plural), "DELETED", gone))
        for (owned_group, owned_plural), objects in list(self.objects.items()):
            for (namespace, name), each in list(objects.items()):
                if (
                    any(owner["uid"] == obj["metadata"]["uid"] for owner in each["metadata"].get("ownerReferences", []))
                    and (namespace, name) in objects
                ):
                    self.delete(owned_group, owned_plural, namespace, name)
        self.news.notify_all()


def matches(obj: Json, labels: str, fields: str) -> bool:
    """Whether an object has the `key=value` pairs of both selectors."""
    for pair in filter(None, labels.split(",")):
        key, _, value = pair.partition("=")
        if obj["metadata"].get("labels", {}).get(key) != value:
            return False
    for pair in filter(None, fields.split(",")):
        key, _, value = pair.partition("=")
        node: Any = obj
        for step in key.split("."):
            node = (node or {}).get(step)
        if node != value:
            return False
    return True


def _resource(group: str, plural: str) -> str:
    return f"{plural}.{group}" if group else plural


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
