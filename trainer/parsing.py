"""Turns a YAML file and `a.b=c` overrides into frozen dataclasses.

Errors have one line, which names the field, its value and the fix.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, cast

import yaml
from pydantic import GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, ErrorDetails

T = TypeVar("T")
Json = dict[str, Any]
"""An object of JSON or YAML."""
_ADAPTERS: dict[type, TypeAdapter[object]] = {}


@dataclass(frozen=True)
class OneOf:
    """Marks a field as one of the dataclasses in a table.

    `Annotated[Base, OneOf(table)]` is read and written as the union of the dataclasses.
    """

    table: Iterable[type]
    """The dataclasses. The table may grow; `forget_adapters` must be called when it has grown."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(Union[tuple(self.table)])  # noqa: UP007  (only known at run time)


def forget_adapters() -> None:
    """Forget the tables' earlier state, so that the next job is read by their current one."""
    _ADAPTERS.clear()


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads `3e-4` as a number.

    YAML 1.1 requires `3.0e-4`.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
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
    """The text of `problem`, usually an error, on one line and cut after `longest` characters."""
    return " ".join(str(problem).split())[:longest]


def read_job(path: str, overrides: Sequence[str] = ()) -> Json:
    """The job file at `path` as nested dicts, after the `overrides` `a.b=c`, whose c is YAML."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"job file {path}: no such file; use a YAML file such as launch/configs/switch_lm_quickstart.yaml"
        )
    try:
        job = yaml.load(file.read_text(), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"job file {path}: not valid YAML ({one_line(error)}); correct it") from None
    if not isinstance(job, dict):
        raise ValueError(
            f"job file {path}: holds a {type(job).__name__}; write a mapping with the keys run and cluster"
        )
    for override in overrides:
        _override(job, override)
    return job


def _override(job: Json, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: not of the form a.b=c; write run.stop.steps=100, for example")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: {text!r} is not valid YAML; quote it") from None
    *parents, last = key.split(".")
    node = job
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {parent} is {node!r}, which has no fields; leave {last} out")
    node[last] = value


def parse(cls: type[T], values: object, where: str = "") -> T:
    """`values` as a `cls`, a dataclass that may contain other dataclasses.

    Unknown keys are refused at every level. `name` selects a member of a union of dataclasses;
    without it, the default's member is selected. `where` is the path of `values` in the job.
    Raises ValueError, with one line, for the first problem.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'the job'}: got {values!r}; write a mapping of fields")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls, include_extras=True)
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            raise ValueError(f"{prefix}{key}: unknown key; {_known(str(key), list(fields))}")
    inner = {key: _nested(hints[key], value, _default(fields[key]), f"{prefix}{key}") for key, value in values.items()}
    try:
        return _adapter(cls).validate_python(inner)
    except ValidationError as error:
        problems = dict.fromkeys(_explain(problem, prefix) for problem in error.errors(include_url=False))
        raise ValueError("; ".join(problems)) from None


def _known(key: str, names: Sequence[str]) -> str:
    """The advice for an unknown key."""
    close = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(names)}"


def plain(config: object) -> Json:
    """A config dataclass as nested dicts, lists and scalars, for YAML, JSON or a worker."""
    return dict(_adapter(type(config)).dump_python(config, mode="json"))


def _adapter(cls: type[T]) -> TypeAdapter[T]:
    """pydantic's reader and writer of `cls`, kept because it takes longer to make than to use."""
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = cast("TypeAdapter[object]", TypeAdapter(cls))
    return cast("TypeAdapter[T]", _ADAPTERS[cls])


def _nested(hint: object, value: object, default: object, where: str) -> object:
    """`value` with each mapping parsed whose hint is a dataclass; pydantic parses the rest."""
    if isinstance(value, list | tuple):
        return [_nested(hint, item, None, f"{where}.{index}") for index, item in enumerate(value)]
    options = list(_dataclasses_in(hint))
    if not options or not isinstance(value, Mapping):
        return value
    if len(options) == 1:
        return parse(options[0], value, where)
    by_name: dict[object, type] = {}
    for option in options:
        tags = typing.get_args(typing.get_type_hints(option)["name"])
        by_name |= dict.fromkeys(tags, option)
    name = value.get("name", getattr(default, "name", None))
    if name not in by_name:
        raise ValueError(f"{where}.name: got {name!r}; use one of {', '.join(map(str, by_name))}")
    return parse(by_name[name], value, where)


def _dataclasses_in(hint: object) -> Iterator[type]:
    parts = typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    if tables := [part for part in parts if isinstance(part, OneOf)]:
        parts = tuple(tables[0].table)
    for part in parts:
        yield from _dataclasses_in(part)


def _default(field: "dataclasses.Field[object]") -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _explain(problem: ErrorDetails, prefix: str) -> str:
    """One clause with the field, its value and the values that it accepts."""
    name = prefix + ".".join(str(part) for part in problem["loc"][:1])
    match problem["type"]:
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{name}: missing; give it a value"
        case "value_error":
            return _located(str(problem["ctx"]["error"]), prefix.removesuffix("."))
        case _:
            reason = problem["msg"][0].lower() + problem["msg"][1:]
            return f"{name}: got {problem['input']!r}; {reason}"


def _located(message: str, where: str) -> str:
    """A dataclass's own message, preceded by its path in the job.

    The message may begin with the last part of that path (`moe.jitter: ...`), or with none of it.
    """
    above, _, own = where.rpartition(".")
    if not own or message.startswith(f"{where}."):
        return message
    if message.startswith((f"{own}.", f"{own}:")):
        return f"{above}.{message}" if above else message
    return f"{where}: {message}"
