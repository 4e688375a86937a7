"""Pod templates of a job's head, workers and submitter, as plain dicts of the Kubernetes API."""

from cluster.config.kubernetes import KubernetesConfig
from trainer.parsing import Json

_USER = 1000  # the user of k8s/Dockerfile


def head_pod(config: KubernetesConfig, own_env: dict[str, str]) -> Json:
    """The pod that runs Ray's head and the driver."""
    container = _container("ray-head", config, {"cpu": str(config.head_cpus), "memory": config.head_memory}, own_env)
    spec = _pod_spec(config, container)
    if config.autoscaling is None:
        spec["automountServiceAccountToken"] = (
            False  # only Ray's autoscaler, next to the head, asks Kubernetes for pods
        )
    return _template(spec, "head")


def worker_pod(config: KubernetesConfig, cpus: int, gpus: int) -> Json:
    """The pod of `config.workers_per_pod` workers, with `cpus` cores and `gpus` GPUs in all."""
    resources = {"cpu": str(cpus), "memory": config.memory} | ({config.gpu_resource: str(gpus)} if gpus else {})
    container = _container("ray-worker", config, resources, {})
    container["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})
    spec = _pod_spec(config, container) | {"automountServiceAccountToken": False}
    spec["volumes"].append(
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": config.shared_memory}}
    )
    if config.node_selector:
        spec["nodeSelector"] = dict(config.node_selector)
    if config.tolerations:
        spec["tolerations"] = [_without_nulls(vars(toleration)) for toleration in config.tolerations]
    return _template(spec, "worker")


def submitter_pod(config: KubernetesConfig) -> Json:
    """The pod that submits the job to the head and prints the driver's log.

    KubeRay adds its command.
    """
    size = {"cpu": "500m", "memory": "512Mi"}
    container = {
        "name": "ray-job-submitter",
        "image": config.image,
        "imagePullPolicy": config.image_pull_policy,
        "resources": {"requests": size, "limits": {"cpu": "1", "memory": "1Gi"}},
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    spec = _identity(config) | {
        "containers": [container],
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
    }
    return _template(spec, "submitter")


def _template(spec: Json, component: str) -> Json:
    return {
        "metadata": {"labels": {"app.kubernetes.io/name": "switchwork", "app.kubernetes.io/component": component}},
        "spec": spec,
    }


def _pod_spec(config: KubernetesConfig, container: Json) -> Json:
    return _identity(config) | {"containers": [container], "volumes": _volumes(config), "restartPolicy": "Never"}


def _identity(config: KubernetesConfig) -> Json:
    """The user, ServiceAccount, pull secrets and priority of a pod."""
    group = {"runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER, "fsGroupChangePolicy": "OnRootMismatch"}
    identity: Json = {"securityContext": group | {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}}
    if config.service_account:
        identity["serviceAccountName"] = config.service_account
    if config.image_pull_secrets:
        identity["imagePullSecrets"] = [{"name": name} for name in config.image_pull_secrets]
    if config.priority and not config.queue:
        identity["priorityClassName"] = config.priority
    return identity


def _container(name: str, config: KubernetesConfig, resources: dict[str, str], own_env: dict[str, str]) -> Json:
    """A container with requests equal to its limits: a pod keeps its resources while it trains."""
    return {
        "name": name,
        "image": config.image,
        "imagePullPolicy": config.image_pull_policy,
        "env": _environment(config, own_env),
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": container_security(),
        "volumeMounts": _mounts(config),
        "terminationMessagePolicy": "FallbackToLogsOnError",  # so that the status of a failed pod holds its last lines
    }


def container_security() -> Json:
    """A container's security context that passes the Pod Security Standard `restricted`."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _environment(config: KubernetesConfig, own: dict[str, str]) -> list[Json]:
    values = {"PYTHONUNBUFFERED": "1", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(config.start_timeout_s)}
    values |= config.env | own
    secrets = [_from_secret(variable.name, variable.secret, variable.key) for variable in config.secret_env]
    if (store := config.object_store) is not None:
        secrets += [_from_secret(key, store.secret, key) for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
        if store.endpoint:
            values["AWS_ENDPOINT_URL"] = store.endpoint
    plain: list[Json] = [{"name": name, "value": value} for name, value in values.items()]
    return plain + secrets


def _from_secret(name: str, secret: str, key: str) -> Json:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _volumes(config: KubernetesConfig) -> list[Json]:
    volumes: list[Json] = []
    for n, claim in enumerate(config.claims):
        source: Json = {"claimName": claim.claim}
        if claim.read_only:
            source["readOnly"] = True
        volumes.append({"name": f"claim-{n}", "persistentVolumeClaim": source})
    for n, volume in enumerate(config.secret_volumes):
        volumes.append({"name": f"secret-{n}", "secret": {"secretName": volume.secret, "defaultMode": 0o440}})
    return volumes


def _mounts(config: KubernetesConfig) -> list[Json]:
    mounts: list[Json] = []
    for n, claim in enumerate(config.claims):
        mounts.append({"name": f"claim-{n}", "mountPath": claim.path, "readOnly": claim.read_only})
    for n, volume in enumerate(config.secret_volumes):
        mounts.append({"name": f"secret-{n}", "mountPath": volume.path, "readOnly": True})
    return mounts


def _without_nulls(values: Json) -> Json:
    return {name: value for name, value in values.items() if value is not None}
