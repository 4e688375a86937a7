"""HTTP in front of tests/support/kube_api.py: paths, verbs, tokens, watches in chunks, logs."""

import json
import re
import time
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from kube_api import KINDS, Json, KubeApi, Refused, User, _resource, matches

_PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))/namespaces/(?P<ns>[^/]+)"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>\w+))?"
)


class Handler(BaseHTTPRequestHandler):
    """One request; `api` is the server's."""

    api: ClassVar[KubeApi]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("get")

    def do_POST(self) -> None:
        self._answer("create")

    def do_PUT(self) -> None:
        self._answer("update")

    def do_PATCH(self) -> None:
        self._answer("patch")

    def do_DELETE(self) -> None:
        self._answer("delete")

    def _answer(self, verb: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        try:
            self._route(verb, body)
        except Refused as refusal:
            self._send(refusal.code, refusal.status)

    def _route(self, verb: str, body: Any) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        user = self._user()
        found = _PATH.fullmatch(url.path)
        group, plural = (found["group"] or "", found["plural"]) if found else ("", "")
        if (
            found is None
            or (group, plural) not in self.api.installed
            or (found["version"] or "v1") != KINDS[group, plural][0]
        ):
            self._send_text(404, "404 page not found\n")
            return
        namespace = found["ns"]
        name = found["name"]
        sub = found["sub"]
        if verb == "get" and not name:
            verb = "watch" if query.get("watch") in ("true", "True", "1") else "list"
        self._allow(user, verb, group, plural, sub, namespace, name)
        strict = query.get("fieldValidation") == "Strict"
        match verb, sub:
            case "get", "log":
                self._log(namespace, name, query)
            case "watch", None:
                self._watch((group, plural), namespace, query)
            case "list", None:
                self._list(group, plural, namespace, query)
            case "get", _:
                self._send(200, self.api.get(group, plural, namespace, name))
            case "create", None:
                body.setdefault("metadata", {})["namespace"] = namespace
                self._send(201, self.api.create(group, plural, body, strict))
            case "update" | "patch", _:
                self._send(
                    200,
                    self._change(
                        verb, group, plural, namespace, name, body, "status" if sub == "status" else "spec", strict
                    ),
                )
            case "delete", None:
                self._send(200, self.api.delete(group, plural, namespace, name, body))
            case _:
                raise Refused(
                    405, "MethodNotAllowed", "the server does not allow this method on the requested resource"
                )

    def _user(self) -> User:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.api.users:
            raise Refused(401, "Unauthorized", "Unauthorized")
        return self.api.users[token]

    def _allow(
        self, user: User, verb: str, group: str, plural: str, sub: str | None, namespace: str, name: str | None
    ) -> None:
        resource = f"{plural}/{sub}" if sub else plural
        self.api.used.add((verb, group, resource))
        if not user.may(verb, group, resource):
            named = f'{_resource(group, plural)} "{name}"' if name else _resource(group, plural)
            words = (
                f'User "{user.name}" cannot {verb} resource "{resource}" '
                f'in API group "{group}" in the namespace "{namespace}"'
            )
            raise Refused(403, "Forbidden", f"{named} is forbidden: {words}")

    def _change(
        self, verb: str, group: str, plural: str, namespace: str, name: str, body: Any, part: str, strict: bool
    ) -> Json:
        if verb == "update":
            return self.api.update(group, plural, body, part, strict)
        if self.headers["Content-Type"] != "application/merge-patch+json":
            raise Refused(
                415, "UnsupportedMediaType", f"this server merges patches only, not {self.headers['Content-Type']}"
            )
        with self.api.news:
            old = self.api.get(group, plural, namespace, name)
            return self.api.update(group, plural, _merged(old, body), part, strict)

    def _list(self, group: str, plural: str, namespace: str, query: dict[str, str]) -> None:
        with self.api.news:
            items = self.api.select(
                group, plural, namespace, query.get("labelSelector", ""), query.get("fieldSelector", "")
            )
            version, kind = KINDS[group, plural]
            head = {
                "apiVersion": f"{group}/{version}" if group else version,
                "kind": f"{kind}List",
                "metadata": {"resourceVersion": str(self.api.now)},
            }
        self._send(200, head | {"items": items})

    def _watch(self, kind: tuple[str, str], namespace: str, query: dict[str, str]) -> None:
        since = int(query.get("resourceVersion") or 0)
        gone = Refused(410, "Expired", f"too old resource version: {since} ({self.api.forgotten})")
        if since < self.api.forgotten:
            self.api.watches_refused += 1
            if self.api.gone_as_http:
                raise gone
        self._begin("application/json")
        until = time.monotonic() + float(query.get("timeoutSeconds") or 1800)
        for found in self.api.changes(kind, since, until):
            if found is None:
                self._chunk({"type": "ERROR", "object": gone.status})
                break
            _, deed, obj = found
            if obj["metadata"]["namespace"] == namespace and matches(
                obj, query.get("labelSelector", ""), query.get("fieldSelector", "")
            ):
                self._chunk({"type": deed, "object": obj})
        else:
            if query.get("allowWatchBookmarks") in ("true", "True"):
                version, name = KINDS[kind]
                about = {
                    "apiVersion": f"{kind[0]}/{version}" if kind[0] else version,
                    "kind": name,
                    "metadata": {"resourceVersion": str(self.api.now)},
                }
                self._chunk({"type": "BOOKMARK", "object": about})
        self._end()

    def _log(self, namespace: str, name: str, query: dict[str, str]) -> None:
        pod = self.api.get("", "pods", namespace, name)
        names = [each["name"] for each in pod["spec"]["containers"]]
        if query.get("container", names[0]) not in names:
            raise Refused(400, "BadRequest", f"container {query['container']} is not valid for pod {name}")
        if pod.get("status", {}).get("phase") == "Pending":
            raise Refused(
                400, "BadRequest", f'container "{names[0]}" in pod "{name}" is waiting to start: ContainerCreating'
            )
        follow = query.get("follow") in ("true", "True")
        stamps = query.get("timestamps") in ("true", "True")
        sent = 0
        self._begin("text/plain")
        while True:
            with self.api.news:
                log = self.api.logs.get(name)
                new = log.lines[sent:] if log else []
                ended = not follow or self.api.closing or (log is not None and log.closed)
                if not new and not ended:
                    self.api.news.wait(0.5)
            for stamp, text in new:
                if self.api.break_log_after is not None and sent >= self.api.break_log_after:
                    self.api.break_log_after = None
                    self.close_connection = True  # in the middle of a chunked answer, as when a node's network goes
                    return
                sent += 1
                self._chunk_bytes(f"{stamp} {text}\n".encode() if stamps else f"{text}\n".encode())
            if ended:
                break
        self._end()

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, event: Json) -> None:
        self._chunk_bytes(json.dumps(event).encode() + b"\n")

    def _chunk_bytes(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()

    def _end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, code: int, body: Json) -> None:
        self._send_text(code, json.dumps(body), "application/json")

    def _send_text(self, code: int, text: str, kind: str = "text/plain") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


def _merged(old: Any, change: Any) -> Any:
    """RFC 7386: null removes a key."""
    if not isinstance(change, dict):
        return change
    base = dict(old) if isinstance(old, dict) else {}
    for key, value in change.items():
        if value is None:
            base.pop(key, None)
        else:
            base[key] = _merged(base.get(key), value)
    return base
