"""The smaller parts of `cluster.kubernetes`: tolerations, environment, volumes, the object store.

The checks are those of Kubernetes itself, made before anything is sent.
"""

import re
from dataclasses import dataclass
from typing import Literal

_DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?")
_UNITS = (
    {None: 1}
    | {f"{letter}i": 1024**n for n, letter in enumerate("KMGTP", 1)}
    | {letter: 1000**n for n, letter in enumerate("kMGTP", 1)}
)


def size_in_bytes(text: str, field: str) -> float:
    """Bytes of a Kubernetes quantity such as 64Gi. Raises ValueError that names `field`."""
    quantity = _QUANTITY.fullmatch(text)
    if not quantity or float(quantity[1]) <= 0:
        raise ValueError(f"{field}: got {text!r}; write a size above 0 such as 512Mi, 64Gi or 1Ti")
    return float(quantity[1]) * _UNITS[quantity[2]]


def check_name(value: str | None, field: str) -> None:
    """Raises ValueError if `value` cannot name an object of Kubernetes."""
    if value is not None and not _DNS_1123.fullmatch(value):
        raise ValueError(
            f"{field}: {value!r} is not a valid name in Kubernetes; "
            "use lower-case letters, digits, '-' and '.', with a letter or digit at both ends"
        )


def check_variable(name: str, field: str) -> None:
    """Raises ValueError if `name` cannot name an environment variable, or is a reserved one."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(
            f"{field}: {name!r} is not a valid name of an environment variable; use letters, digits and '_'"
        )
    if name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "SWITCHWORK_JOB", "SWITCHWORK_AUTOSCALING"):
        raise ValueError(f"{field}: {name} is set by KubeRay or by Switchwork itself; leave it out")


def check_path(path: str, field: str) -> None:
    """Raises ValueError if `path` is not absolute, or is one that the image or Ray needs."""
    is_absolute = re.fullmatch(r"(/[^/:]+)+", path)
    if not is_absolute or path.split("/")[1] in ("dev", "proc", "sys", "app") or path in ("/tmp", "/tmp/ray"):
        raise ValueError(
            f"{field}: {path!r} cannot be a volume's path; "
            "use an absolute path such as /storage, outside /app, /dev, /proc, /sys, and not /tmp"
        )


@dataclass(frozen=True, kw_only=True)
class Toleration:
    """A node taint that the pods tolerate."""

    key: str | None = None
    """Key of the taint; null, with operator Exists, tolerates every taint."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """Whether the taint's value must be equal, or its key need only exist."""
    value: str | None = None
    """Value of the taint, for operator Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; null: every effect."""

    def __post_init__(self) -> None:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError(
                f"value is {self.value!r} with operator Exists, which compares no value; "
                "use operator Equal, or leave value out"
            )
        if self.operator == "Equal" and not self.key:
            raise ValueError("key: missing; name the taint's key, or use operator Exists for every taint")


@dataclass(frozen=True, kw_only=True)
class SecretEnv:
    """An environment variable whose value is in a Secret; the job file holds only the reference."""

    name: str
    """Name of the variable."""
    secret: str
    """Name of the Secret, in the job's namespace."""
    key: str
    """The Secret's key that holds the value."""

    def __post_init__(self) -> None:
        check_variable(self.name, "name")
        check_name(self.secret, "secret")


@dataclass(frozen=True, kw_only=True)
class SecretVolume:
    """A Secret whose keys appear as files."""

    secret: str
    """Name of the Secret, in the job's namespace."""
    path: str
    """Folder in which the Secret's keys appear, read-only."""

    def __post_init__(self) -> None:
        check_name(self.secret, "secret")
        check_path(self.path, "path")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A PersistentVolumeClaim, mounted in the head and worker pods.

    Pods on more than one node need a ReadWriteMany claim.
    """

    claim: str
    """Name of the claim, in the job's namespace."""
    path: str
    """Folder in which the claim appears."""
    read_only: bool = False
    """Whether the claim is mounted read-only, for data that no job may change."""

    def __post_init__(self) -> None:
        check_name(self.claim, "claim")
        check_path(self.path, "path")


@dataclass(frozen=True, kw_only=True)
class ObjectStore:
    """The store that s3:// URLs lead to, and the Secret with its keys."""

    secret: str
    """The Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the store."""
    endpoint: str | None = None
    """URL of the store, such as http://object-store:8333; null: Amazon's own."""

    def __post_init__(self) -> None:
        check_name(self.secret, "secret")
        if self.endpoint is not None and not re.match(r"https?://", self.endpoint):
            raise ValueError(f"endpoint is {self.endpoint!r}; use a URL that begins with http:// or https://")
