"""From a YAML file and `a.b=c` overrides to frozen dataclasses, with errors of one line that name field, value and fix."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml
from pydantic import GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema

T = TypeVar("T")
Json = dict[str, Any]
"""An object as JSON and YAML hold it."""
_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


@dataclass(frozen=True)
class OneOf:
    """Marks a field whose dataclasses stand in a table: `Annotated[Base, OneOf(table)]` is read and written as the union of them."""

    table: Iterable[type]
    """Read each time that it is needed, so that a table may grow; call `forget_adapters` when it has grown."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(Union[tuple(self.table)])  # noqa: UP007  (a union of what is known at run time only)


def forget_adapters() -> None:
    """Makes the next job be read by the tables as they are now."""
    _ADAPTERS.clear()


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `3e-4` as the number it is (YAML 1.1 wants `3.0e-4`) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"line {node.start_mark.line + 1}: key {key!r} is given twice; keep one")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def one_line(problem: object, longest: int | None = None) -> str:
    """The text of `problem` (an error, mostly) on one line, cut after `longest` characters."""
    return " ".join(str(problem).split())[:longest]


def read_job(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The job file at `path` as nested dicts, with each `a.b=c` of `overrides` put in (c is read as YAML)."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"job file {path}: no such file; name a YAML file such as launch/configs/switch_lm_quickstart.yaml"
        )
    try:
        job = yaml.load(file.read_text(), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"job file {path}: not YAML: {one_line(error)}") from None
    if not isinstance(job, dict):
        raise ValueError(
            f"job file {path}: holds {type(job).__name__}; it must be a mapping with the keys run and cluster"
        )
    for override in overrides:
        _override(job, override)
    return job


def _override(job: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: expected a.b=c, such as run.stop.steps=100")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: {text!r} is not YAML; quote it") from None
    *parents, last = key.split(".")
    node = job
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {parent} is {node!r}, which has no fields")
    node[last] = value


def parse(cls: type[T], values: Any, where: str = "") -> T:
    """`values` as a `cls` (a dataclass of dataclasses). Raises ValueError with one line for the first thing that is wrong with them.

    Unknown keys are refused at every level. A union of dataclasses is told apart by `name`; left out, it is the default's.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'the job'}: got {values!r}; it takes a mapping of fields")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints, prefix = typing.get_type_hints(cls, include_extras=True), f"{where}." if where else ""
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            raise ValueError(
                f"{prefix}{key}: unknown key; {f'did you mean {near[0]}?' if near else 'known keys: ' + ', '.join(fields)}"
            )
    inner = {key: _nested(hints[key], value, _default(fields[key]), f"{prefix}{key}") for key, value in values.items()}
    try:
        return _adapter(cls).validate_python(inner)
    except ValidationError as error:
        raise ValueError(
            "; ".join(dict.fromkeys(_explain(problem, prefix) for problem in error.errors(include_url=False)))
        ) from None


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested dicts, lists and scalars: what YAML, JSON and a worker take."""
    return dict(_adapter(type(config)).dump_python(config, mode="json"))


def _adapter(cls: Any) -> TypeAdapter[Any]:
    """pydantic's reader and writer of `cls`, made once: that takes longer than all its work."""
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def _nested(hint: Any, value: Any, default: Any, where: str) -> Any:
    """`value` with every mapping that stands for a dataclass parsed as such; all else is left to pydantic."""
    if isinstance(value, list | tuple):
        return [_nested(hint, each, None, f"{where}.{index}") for index, each in enumerate(value)]
    options = list(_dataclasses_in(hint))
    if not options or not isinstance(value, Mapping):
        return value
    if len(options) == 1:
        return parse(options[0], value, where)
    by_name = {tag: option for option in options for tag in typing.get_args(typing.get_type_hints(option)["name"])}
    name = value.get("name", getattr(default, "name", None))
    if name not in by_name:
        raise ValueError(f"{where}.name: got {name!r}; use one of {', '.join(by_name)}")
    return parse(by_name[name], value, where)


def _dataclasses_in(hint: Any) -> Iterator[Any]:
    parts = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        yield hint
    if tables := [part for part in parts if isinstance(part, OneOf)]:
        parts = tuple(tables[0].table)
    for part in parts:
        yield from _dataclasses_in(part)


def _default(field: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _explain(problem: Any, prefix: str) -> str:
    """One clause: which field, which value, what it should have been."""
    name = prefix + ".".join(str(part) for part in problem["loc"][:1])
    match problem["type"]:
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{name}: missing; give it a value"
        case "value_error":
            return _located(str(problem["ctx"]["error"]), prefix.removesuffix("."))
        case _:
            return f"{name}: got {problem['input']!r}; {problem['msg'][0].lower() + problem['msg'][1:]}"


def _located(message: str, where: str) -> str:
    """A dataclass's own complaint, with the place in the job in front: it may begin with its own name (`moe.jitter: ...`) or say none."""
    above, _, own = where.rpartition(".")
    if not own or message.startswith(f"{where}."):
        return message
    if message.startswith((f"{own}.", f"{own}:")):
        return f"{above}.{message}" if above else message
    return f"{where}: {message}"
