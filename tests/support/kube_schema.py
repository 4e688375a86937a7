"""How a Kubernetes API server treats an object of a CustomResourceDefinition.

Unknown fields, defaults, and the words of its refusals.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

CRDS = Path(__file__).parents[1] / "crds"
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}


@functools.cache
def crd(plural: str) -> dict[str, Any]:
    """The definition of `plural`, as tests/crds has it."""
    return dict(json.loads((CRDS / f"{plural}.json").read_text()))


def schema(plural: str, version: str) -> dict[str, Any]:
    """openAPIV3Schema of one version. Raises AssertionError if it is not served."""
    (found,) = [each for each in crd(plural)["spec"]["versions"] if each["name"] == version and each["served"]]
    return dict(found["schema"]["openAPIV3Schema"])


def check(manifest: dict[str, Any]) -> list[str]:
    """The objections under fieldValidation=Strict to a manifest of a kind in tests/crds."""
    group, _, version = manifest["apiVersion"].partition("/")
    (definition,) = [
        crd(path.stem) for path in CRDS.glob("*.json") if crd(path.stem)["spec"]["names"]["kind"] == manifest["kind"]
    ]
    assert definition["spec"]["group"] == group
    found = schema(definition["spec"]["names"]["plural"], version)
    unknown = unknown_fields(found, manifest)
    return [f'strict decoding error: unknown field "{path}"' for path in unknown] or problems(
        found, manifest
    ) + name_problems(manifest["metadata"]["name"])


def unknown_fields(part: dict[str, Any], value: Any, path: str = "") -> list[str]:
    """Paths of the fields that the schema does not have."""
    if isinstance(value, list):
        return [
            each for n, item in enumerate(value) for each in unknown_fields(part.get("items", {}), item, f"{path}[{n}]")
        ]
    if not isinstance(value, dict) or part.get("x-kubernetes-preserve-unknown-fields"):
        return []
    found = []
    known = part.get("properties", {})
    others = part.get("additionalProperties")
    for key, item in value.items():
        where = f"{path}.{key}" if path else key
        if where in ("apiVersion", "kind", "metadata"):
            continue
        if key in known:
            found += unknown_fields(known[key], item, where)
        elif others:
            found += unknown_fields(others if isinstance(others, dict) else {}, item, where)
        elif part.get("type") == "object":
            found.append(where)
    return found


def pruned(part: dict[str, Any], value: Any, path: str = "") -> Any:
    """`value` without unknown fields and nulls, as a server that is not strict keeps it."""
    if isinstance(value, list):
        return [pruned(part.get("items", {}), item, f"{path}[]") for item in value]
    if not isinstance(value, dict) or part.get("x-kubernetes-preserve-unknown-fields"):
        return value
    known = part.get("properties", {})
    others = part.get("additionalProperties")
    kept = {}
    for key, item in value.items():
        if not path and key in ("apiVersion", "kind", "metadata"):
            kept[key] = item
        elif item is not None and (key in known or others):
            kept[key] = pruned(known.get(key, others if isinstance(others, dict) else {}), item, f"{path}.{key}")
    return kept


def with_defaults(part: dict[str, Any], value: Any) -> Any:
    """`value` with the schema's defaults where a field is missing."""
    if isinstance(value, list):
        return [with_defaults(part.get("items", {}), item) for item in value]
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for key, inner in part.get("properties", {}).items():
        if key not in filled and "default" in inner:
            filled[key] = inner["default"]
        if key in filled:
            filled[key] = with_defaults(inner, filled[key])
    return filled


def problems(part: dict[str, Any], value: Any, path: str = "") -> list[str]:
    """Violations of the schema, in the server's words."""
    if wrong := _wrong_type(part, value):
        given = json.dumps(_go_type(value))
        return [f"{path}: Invalid value: {given}: {path} in body must be of type {wrong}: {given}"]
    found = _wrong_value(part, value, path)
    if isinstance(value, list):
        return found + [
            each for n, item in enumerate(value) for each in problems(part.get("items", {}), item, f"{path}[{n}]")
        ]
    if isinstance(value, dict):
        prefix = f"{path}." if path else ""
        found += [f"{prefix}{key}: Required value" for key in part.get("required", []) if key not in value]
        known = part.get("properties", {})
        others = part.get("additionalProperties")
        for key, item in value.items():
            if prefix or key != "metadata":
                found += problems(known.get(key, others if isinstance(others, dict) else {}), item, f"{prefix}{key}")
    return found


def name_problems(name: str) -> list[str]:
    """What every custom resource's name is held to."""
    if re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", name) and len(name) <= 253:
        return []
    words = (
        "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', "
        "and must start and end with an alphanumeric character"
    )
    return [f'metadata.name: Invalid value: "{name}": {words}']


def _wrong_type(part: dict[str, Any], value: Any) -> str:
    if part.get("x-kubernetes-int-or-string"):
        return "" if isinstance(value, int | str) and not isinstance(value, bool) else "integer,string"
    kind = part.get("type")
    if kind is None:
        return ""
    right = isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
    if right and part.get("format") == "int32" and not -(2**31) <= value < 2**31:
        return "int32"
    return "" if right else str(kind)


def _wrong_value(part: dict[str, Any], value: Any, path: str) -> list[str]:
    shown = json.dumps(value)
    found = []
    if "enum" in part and value not in part["enum"]:
        supported = ", ".join(json.dumps(choice) for choice in part["enum"])
        found.append(f"{path}: Unsupported value: {shown}: supported values: {supported}")
    if "minimum" in part and value < part["minimum"]:
        found.append(
            f"{path}: Invalid value: {shown}: {path} in body should be greater than or equal to {part['minimum']}"
        )
    if "maxLength" in part and len(value) > part["maxLength"]:
        found.append(f"{path}: Too long: may not be more than {part['maxLength']} bytes")
    if "pattern" in part and isinstance(value, str) and not re.search(part["pattern"], value):
        found.append(f"{path}: Invalid value: {shown}: {path} in body should match '{part['pattern']}'")
    return found


def _go_type(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
    return names.get(type(value), "null")
