"""The official Kubernetes client, with an address of ours, errors in one line, and watches that outlive the server's memory."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import urllib3
import yaml
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

from cluster.on_kubernetes.objects import Event
from trainer.parsing import Json

RAY = ("ray.io", "v1")
KUEUE = ("kueue.x-k8s.io", "v1beta2")
_TIMEOUT_S = (5, 30)  # to connect, and between two bytes
_GONE = 410


@dataclass(frozen=True)
class Namespace:
    """One namespace of one cluster, as the user's credentials see it."""

    address: str
    name: str
    api: client.ApiClient

    @property
    def core(self) -> Any:  # its types do not know that raw responses can be asked for
        return client.CoreV1Api(self.api)

    @property
    def custom(self) -> Any:
        return client.CustomObjectsApi(self.api)

    def create(self, group: tuple[str, str], plural: str, body: Json) -> Json:
        """Create an object; fields that its kind does not have are refused, not dropped."""
        with one_line(self, f"create {plural}"):
            return dict(
                self.custom.create_namespaced_custom_object(
                    *group, self.name, plural, body, field_validation="Strict", _request_timeout=_TIMEOUT_S
                )
            )

    def get(self, group: tuple[str, str], plural: str, name: str) -> Json | None:
        """An object, or None if there is none of that name."""
        with one_line(self, f"read {plural}"):
            try:
                return dict(
                    self.custom.get_namespaced_custom_object(
                        *group, self.name, plural, name, _request_timeout=_TIMEOUT_S
                    )
                )
            except ApiException as error:
                if error.status == 404 and "not found" in _said(error):
                    return None
                raise

    def objects(self, group: tuple[str, str], plural: str, **how: object) -> Json:
        """Objects of one kind, with the list's resourceVersion; `how` are selectors, or a watch's arguments, for which the answer is the watch's own."""
        listed: Json = self.custom.list_namespaced_custom_object(
            *group, self.name, plural, **{"_request_timeout": _TIMEOUT_S} | how
        )
        return listed

    def patch(self, group: tuple[str, str], plural: str, name: str, change: Json) -> None:
        """Merge `change` into an object."""
        with one_line(self, f"change {plural}"):
            self.custom.patch_namespaced_custom_object(
                *group, self.name, plural, name, change, field_validation="Strict", _request_timeout=_TIMEOUT_S
            )

    def delete(self, group: tuple[str, str], plural: str, name: str, uid: str) -> None:
        """Delete an object and, in the background, all that it owns; only if it is still the one with this `uid`."""
        options = client.V1DeleteOptions(propagation_policy="Background", preconditions=client.V1Preconditions(uid=uid))
        with one_line(self, f"delete {plural}"):
            self.custom.delete_namespaced_custom_object(
                *group, self.name, plural, name, body=options, _request_timeout=_TIMEOUT_S
            )

    def pods(self, **how: object) -> Json:
        """Pods with the list's resourceVersion, as plain dicts; with a watch's arguments the answer is the watch's own."""
        answer = self.core.list_namespaced_pod(
            self.name, **{"_request_timeout": _TIMEOUT_S} | how | {"_preload_content": False}
        )
        listed: Json = answer if how.get("watch") else json.loads(accepted(answer).data)
        return listed

    def events(self, about: str) -> list[Event]:
        """What was noted about the object named `about`, the oldest first."""
        with one_line(self, "list events"):
            how: Json = {
                "field_selector": f"involvedObject.name={about}",
                "_request_timeout": _TIMEOUT_S,
                "_preload_content": False,
            }
            events: list[Event] = json.loads(accepted(self.core.list_namespaced_event(self.name, **how)).data)["items"]
        return sorted(events, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")

    def log(self, pod: str, container: str, **how: object) -> urllib3.BaseHTTPResponse:
        """The response with a container's log, to be read as it comes. Raises ApiException if there is none."""
        answer = self.core.read_namespaced_pod_log(
            pod, self.name, container=container, **{"_request_timeout": _TIMEOUT_S} | how | {"_preload_content": False}
        )
        return accepted(answer)


def accepted(answer: urllib3.BaseHTTPResponse) -> urllib3.BaseHTTPResponse:
    """A raw response if the server granted it. The client's models would refuse what a newer server adds, so pods, events and logs come raw."""
    if not 200 <= answer.status <= 299:
        raise ApiException(http_resp=answer)
    return answer


def connect(address: str) -> Namespace:
    """The namespace at k8s://CONTEXT/NAMESPACE; without NAMESPACE the context's own. Raises ValueError if the kubeconfig has no such context."""
    wanted = address.removeprefix("k8s://").strip("/")
    try:
        contexts, _ = config.list_kube_config_contexts()
    except (config.ConfigException, OSError, yaml.YAMLError) as error:
        raise ValueError(
            f"--to: no contexts for {address} ({_line(error)}); put a kubeconfig at ~/.kube/config, or name it in KUBECONFIG"
        ) from None
    own = {each["name"]: each["context"].get("namespace") or "default" for each in contexts}
    context, namespace = (
        (wanted, own[wanted]) if wanted in own else (wanted.rpartition("/")[0], wanted.rpartition("/")[2])
    )
    if context not in own:
        raise ValueError(
            f"--to: the kubeconfig has no context {context or wanted}; use k8s://CONTEXT/NAMESPACE with one of {', '.join(sorted(own))}"
        )
    settings = client.Configuration()
    settings.retries = urllib3.Retry(
        total=1, redirect=0, status=0
    )  # its own three, for each address, take minutes when nobody is there
    try:
        api = config.new_client_from_config(context=context, client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise ValueError(f"--to: the context {context} cannot be used ({_line(error)}); mend the kubeconfig") from None
    return Namespace(address=address, name=namespace, api=api)


class Listing(Protocol):
    """Lists objects; with a watch's arguments it opens the watch."""

    def __call__(self, **how: object) -> Json: ...


def changes(cluster: Namespace, call: Listing, quiet_s: int = 5) -> Iterator[tuple[str, list[Json]]]:
    """What `call` lists, then how it changes, for ever: ("LISTED", objects), (ADDED | MODIFIED | DELETED, [object]), ("QUIET", []).

    QUIET comes after `quiet_s` seconds without news. A server forgets old versions and answers 410: then there is a new LISTED.
    """
    while True:
        with one_line(cluster, "list"):
            listed = call()
        yield "LISTED", listed["items"]
        try:
            yield from _watch(call, listed["metadata"]["resourceVersion"], quiet_s)
        except ApiException as error:
            if error.status != _GONE:
                with one_line(cluster, "watch"):
                    raise
        except urllib3.exceptions.HTTPError:
            time.sleep(1)  # the connection broke; listing says whether the server is still there


def _watch(call: Listing, version: str, quiet_s: int) -> Iterator[tuple[str, list[Json]]]:
    while True:
        stream = watch.Watch(return_type="object").stream(
            call, resource_version=version, timeout_seconds=quiet_s, allow_watch_bookmarks=True
        )
        for event in stream:
            version = event["raw_object"]["metadata"]["resourceVersion"]
            if event["type"] != "BOOKMARK":
                yield event["type"], [event["raw_object"]]
        yield "QUIET", []


@contextmanager
def one_line(cluster: Namespace, deed: str) -> Iterator[None]:
    """What the API server or the way to it has against `deed`, as a ValueError that says what to do."""
    try:
        yield
    except ApiException as error:
        raise ValueError(f"--to: {cluster.address}: {_meaning(error, deed, cluster.name)}") from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise ValueError(
            f"--to: {cluster.address} does not answer ({_line(error)}); is the API server up, and this machine in its network?"
        ) from None


def _meaning(error: ApiException, deed: str, namespace: str) -> str:
    said = _said(error)
    match error.status:
        case 401:
            return "the credentials were refused (401 Unauthorized); log in again, or mend the user of this context"
        case 403:
            return f"not allowed to {deed} ({said}); bind the Role switchwork-submitter of k8s/base to your user"
        case 404 if said.startswith("namespaces"):
            return f"there is no namespace {namespace}; create it: kubectl apply -k k8s/overlays/dev"
        case 404 if "not found" not in said or said.startswith("404 page"):
            return f"the cluster does not know this kind of object, to {deed} ({said}); install KubeRay 1.7 (and Kueue, for a queue)"
        case 409:
            return f"{said}; look at `switchwork jobs` and try again"
        case _:
            return f"refused to {deed}: {said}"


def _said(error: ApiException) -> str:
    """The message of the server's Status object, else the body or the reason."""
    try:
        return _line(yaml.safe_load(error.body or "")["message"])
    except (yaml.YAMLError, TypeError, KeyError, AttributeError):
        return _line(error.body or error.reason or error.status)


def _line(text: object) -> str:
    return " ".join(str(text).split())[:500]
