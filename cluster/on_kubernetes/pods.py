"""Pod templates of a job's head, workers and submitter: what they run, get, mount and may do. Plain dicts, as Kubernetes' API has them."""

from cluster.config.kubernetes import KubernetesConfig
from trainer.parsing import Json

_USER = 1000  # the user of k8s/Dockerfile


def head_pod(config: KubernetesConfig, own_env: dict[str, str]) -> Json:
    """The pod that runs Ray's head and the driver."""
    container = _container("ray-head", config, {"cpu": str(config.head_cpus), "memory": config.head_memory}, own_env)
    spec = _pod_spec(config, container)
    if config.autoscaling is None:
        spec["automountServiceAccountToken"] = False  # Ray's autoscaler, beside the head, asks Kubernetes for pods
    return _template(spec, "head")


def worker_pod(config: KubernetesConfig, cpus: int, gpus: int) -> Json:
    """The pod of `config.workers_per_pod` workers, which get `cpus` cores and `gpus` GPUs together."""
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
    """The pod that hands the job to the head and prints what the driver prints; KubeRay adds its command."""
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
    """Who the pod is, for the nodes and for Kubernetes."""
    group = {"runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER, "fsGroupChangePolicy": "OnRootMismatch"}
    found: Json = {"securityContext": group | {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}}
    if config.service_account:
        found["serviceAccountName"] = config.service_account
    if config.image_pull_secrets:
        found["imagePullSecrets"] = [{"name": name} for name in config.image_pull_secrets]
    if config.priority and not config.queue:
        found["priorityClassName"] = config.priority
    return found


def _container(name: str, config: KubernetesConfig, resources: dict[str, str], own_env: dict[str, str]) -> Json:
    """Requests equal limits: nothing is taken from a pod while it trains."""
    return {
        "name": name,
        "image": config.image,
        "imagePullPolicy": config.image_pull_policy,
        "env": _environment(config, own_env),
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": container_security(),
        "volumeMounts": _mounts(config),
        "terminationMessagePolicy": "FallbackToLogsOnError",  # so that a failed pod's status has its own last words
    }


def container_security() -> Json:
    """What a container may do in a namespace that enforces the standard `restricted`."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _environment(config: KubernetesConfig, own: dict[str, str]) -> list[Json]:
    values = (
        {"PYTHONUNBUFFERED": "1", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(config.start_timeout_s)}
        | config.env
        | own
    )
    references = [(each.name, each.secret, each.key) for each in config.secret_env]
    if (store := config.object_store) is not None:
        references += [(key, store.secret, key) for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
        values |= {"AWS_ENDPOINT_URL": store.endpoint} if store.endpoint else {}
    plain = [{"name": name, "value": value} for name, value in values.items()]
    return plain + [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}} for name, secret, key in references
    ]


def _volumes(config: KubernetesConfig) -> list[Json]:
    claims = [
        {
            "name": f"claim-{n}",
            "persistentVolumeClaim": {"claimName": each.claim} | ({"readOnly": True} if each.read_only else {}),
        }
        for n, each in enumerate(config.claims)
    ]
    secrets = [
        {"name": f"secret-{n}", "secret": {"secretName": each.secret, "defaultMode": 0o440}}
        for n, each in enumerate(config.secret_volumes)
    ]
    return claims + secrets


def _mounts(config: KubernetesConfig) -> list[Json]:
    claims = [
        {"name": f"claim-{n}", "mountPath": each.path, "readOnly": each.read_only}
        for n, each in enumerate(config.claims)
    ]
    return claims + [
        {"name": f"secret-{n}", "mountPath": each.path, "readOnly": True}
        for n, each in enumerate(config.secret_volumes)
    ]


def _without_nulls(values: Json) -> Json:
    return {name: value for name, value in values.items() if value is not None}
