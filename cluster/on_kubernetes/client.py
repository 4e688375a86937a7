"""The official Kubernetes client, by our addresses.

It raises errors of one line, and its watches reconnect when the server has dropped their history.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import urllib3
import yaml
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

from cluster.on_kubernetes.objects import Event
from trainer.parsing import Json, one_line

RAY = ("ray.io", "v1")
KUEUE = ("kueue.x-k8s.io", "v1beta2")
_TIMEOUT_S = (5, 30)  # to connect, and between two bytes
_GONE = 410
_LONGEST_MESSAGE = 500


class _CoreApi(Protocol):
    """The calls of CoreV1Api that are made here, all with `_preload_content=False`.

    The client's own types do not know that a call can then return the raw response.
    """

    def list_namespaced_pod(self, namespace: str, **options: object) -> urllib3.BaseHTTPResponse: ...

    def list_namespaced_event(self, namespace: str, **options: object) -> urllib3.BaseHTTPResponse: ...

    def read_namespaced_pod_log(self, name: str, namespace: str, **options: object) -> urllib3.BaseHTTPResponse: ...


@dataclass(frozen=True)
class Namespace:
    """One namespace of one cluster, as the user's credentials see it."""

    address: str
    name: str
    api: client.ApiClient

    @property
    def core(self) -> _CoreApi:
        return cast(_CoreApi, client.CoreV1Api(self.api))

    @property
    def custom(self) -> client.CustomObjectsApi:
        return client.CustomObjectsApi(self.api)

    def create(self, group: tuple[str, str], plural: str, body: Json) -> Json:
        """Create an object; fields that its kind does not have are refused, not dropped."""
        options: Json = {"field_validation": "Strict", "_request_timeout": _TIMEOUT_S}
        with refusals(self, f"create {plural}"):
            created = self.custom.create_namespaced_custom_object(*group, self.name, plural, body, **options)
        return cast(Json, created)

    def get(self, group: tuple[str, str], plural: str, name: str) -> Json | None:
        """Read an object; None if there is none of that name."""
        options: Json = {"_request_timeout": _TIMEOUT_S}
        with refusals(self, f"read {plural}"):
            try:
                return cast(Json, self.custom.get_namespaced_custom_object(*group, self.name, plural, name, **options))
            except ApiException as error:
                if error.status == 404 and "not found" in _message(error):
                    return None
                raise

    def objects(self, group: tuple[str, str], plural: str, **options: object) -> Json:
        """Objects of one kind, with the list's resourceVersion.

        `options` are selectors, or the arguments of a watch, whose answer is then returned.
        """
        arguments: Json = {"_request_timeout": _TIMEOUT_S} | options
        return cast(Json, self.custom.list_namespaced_custom_object(*group, self.name, plural, **arguments))

    def patch(self, group: tuple[str, str], plural: str, name: str, change: Json) -> None:
        """Merge `change` into an object."""
        options: Json = {"field_validation": "Strict", "_request_timeout": _TIMEOUT_S}
        with refusals(self, f"change {plural}"):
            self.custom.patch_namespaced_custom_object(*group, self.name, plural, name, change, **options)

    def delete(self, group: tuple[str, str], plural: str, name: str, uid: str) -> None:
        """Delete an object and, in the background, all objects that it owns.

        The server refuses if the object of that name has another `uid` by now.
        """
        body = client.V1DeleteOptions(propagation_policy="Background", preconditions=client.V1Preconditions(uid=uid))
        options: Json = {"body": body, "_request_timeout": _TIMEOUT_S}
        with refusals(self, f"delete {plural}"):
            self.custom.delete_namespaced_custom_object(*group, self.name, plural, name, **options)

    def pods(self, **options: object) -> Json:
        """Pods as plain dicts, with the list's resourceVersion.

        `options` are selectors, or the arguments of a watch, whose answer is then returned.
        """
        answer = self.core.list_namespaced_pod(self.name, **_raw(options))
        return cast(Json, answer) if options.get("watch") else cast(Json, json.loads(accepted(answer).data))

    def events(self, about: str) -> list[Event]:
        """The events of the object named `about`, the oldest first."""
        with refusals(self, "list events"):
            options = _raw({"field_selector": f"involvedObject.name={about}"})
            answer = accepted(self.core.list_namespaced_event(self.name, **options))
            events: list[Event] = json.loads(answer.data)["items"]
        return sorted(events, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")

    def log(self, pod: str, container: str, **options: object) -> urllib3.BaseHTTPResponse:
        """The response with a container's log, to be read as it comes.

        Raises ApiException if there is no log.
        """
        return accepted(self.core.read_namespaced_pod_log(pod, self.name, container=container, **_raw(options)))


def _raw(options: dict[str, object]) -> dict[str, object]:
    """The arguments of a call that returns the raw response.

    The client's models would refuse fields that a newer server adds.
    """
    return {"_request_timeout": _TIMEOUT_S} | options | {"_preload_content": False}


def accepted(answer: urllib3.BaseHTTPResponse) -> urllib3.BaseHTTPResponse:
    """The raw response `answer`. Raises ApiException if the server refused the request."""
    if not 200 <= answer.status <= 299:
        raise ApiException(http_resp=answer)
    return answer


def connect(address: str) -> Namespace:
    """The namespace at k8s://CONTEXT/NAMESPACE; without NAMESPACE, the context's own.

    Raises ValueError if the kubeconfig has no such context.
    """
    wanted = address.removeprefix("k8s://").strip("/")
    own = _own_namespaces(address)
    if wanted in own:
        context = wanted
        namespace = own[wanted]
    else:
        context, _, namespace = wanted.rpartition("/")
    if context not in own:
        raise ValueError(
            f"--to: the kubeconfig has no context {context or wanted}; "
            f"use k8s://CONTEXT/NAMESPACE with one of {', '.join(sorted(own))}"
        )
    settings = client.Configuration()
    # The client's three retries per address take minutes when no server answers.
    settings.retries = urllib3.Retry(total=1, redirect=0, status=0)
    try:
        api = config.new_client_from_config(context=context, client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise ValueError(f"--to: the context {context} cannot be used ({_short(error)}); fix the kubeconfig") from None
    return Namespace(address=address, name=namespace, api=api)


def _own_namespaces(address: str) -> dict[str, str]:
    """The default namespace of each context in the kubeconfig."""
    try:
        contexts, _ = config.list_kube_config_contexts()
    except (config.ConfigException, OSError, yaml.YAMLError) as error:
        raise ValueError(
            f"--to: no contexts for {address} ({_short(error)}); "
            "put a kubeconfig at ~/.kube/config, or name it in KUBECONFIG"
        ) from None
    return {context["name"]: context["context"].get("namespace") or "default" for context in contexts}


class Listing(Protocol):
    """A function that lists objects; with the arguments of a watch it opens the watch."""

    def __call__(self, **options: object) -> Json: ...


def changes(cluster: Namespace, call: Listing, quiet_s: int = 5) -> Iterator[tuple[str, list[Json]]]:
    """Yield the objects that `call` lists, and then their changes without end.

    First comes ("LISTED", objects), then (ADDED | MODIFIED | DELETED, [object]) per change, and
    ("QUIET", []) after `quiet_s` seconds without news. A server that has dropped the history
    answers 410, and LISTED comes again.
    """
    while True:
        with refusals(cluster, "list"):
            listed = call()
        yield "LISTED", listed["items"]
        try:
            yield from _watch(call, listed["metadata"]["resourceVersion"], quiet_s)
        except ApiException as error:
            if error.status != _GONE:
                with refusals(cluster, "watch"):
                    raise
        except urllib3.exceptions.HTTPError:
            time.sleep(1)  # the connection broke; the next list shows whether the server still answers


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
def refusals(cluster: Namespace, deed: str) -> Iterator[None]:
    """Turns the API server's refusal of `deed`, or its silence, into a ValueError of one line."""
    try:
        yield
    except ApiException as error:
        raise ValueError(f"--to: {cluster.address}: {_explain(error, deed, cluster.name)}") from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise ValueError(
            f"--to: {cluster.address} does not answer ({_short(error)}); "
            "is the API server up, and this machine in its network?"
        ) from None


def _explain(error: ApiException, deed: str, namespace: str) -> str:
    message = _message(error)
    match error.status:
        case 401:
            return "the credentials were refused (401 Unauthorized); log in again, or fix the user of this context"
        case 403:
            return f"not allowed to {deed} ({message}); bind the Role switchwork-submitter of k8s/base to your user"
        case 404 if message.startswith("namespaces"):
            return f"there is no namespace {namespace}; create it: kubectl apply -k k8s/overlays/dev"
        case 404 if "not found" not in message or message.startswith("404 page"):
            return (
                f"cannot {deed}, as the cluster does not know this kind of object ({message}); "
                "install KubeRay 1.7 (and Kueue, for a queue)"
            )
        case 409:
            return f"{message}; look at `switchwork jobs` and try again"
        case _:
            return f"refused to {deed}: {message}"


def _message(error: ApiException) -> str:
    """The message of the server's Status object, else the body or the reason."""
    try:
        return _short(yaml.safe_load(error.body or "")["message"])
    except (yaml.YAMLError, TypeError, KeyError, AttributeError):
        return _short(error.body or error.reason or error.status)


def _short(text: object) -> str:
    return one_line(text, _LONGEST_MESSAGE)
