"""The JSON Schema of job files, for completion and checks in editors.

It is derived from the dataclasses that read job files. The docstrings under the fields are the
descriptions. As in trainer/parsing.py, unknown keys are errors at every level, and `name` tells
which member of a union is meant.
"""

import ast
import dataclasses
import functools
import inspect
import textwrap

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from launch.config import JobConfig


def job_schema() -> JsonSchemaValue:
    """The schema (draft 2020-12) of the files that `switchwork train` accepts."""
    schema = TypeAdapter(JobConfig).json_schema(schema_generator=_Generator)
    _require_names(schema, schema["$defs"])
    return {"$schema": GenerateJsonSchema.schema_dialect, "title": "Switchwork job"} | schema


class _Generator(GenerateJsonSchema):
    """pydantic's generator, with the rules and descriptions that trainer/parsing.py adds."""

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        generated = super().dataclass_schema(schema)
        target = self.resolve_ref_schema(generated)
        target["additionalProperties"] = False
        cls: type = schema["cls"]
        target["description"] = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0]
        for name, text in docstrings(cls).items():
            target["properties"].get(name, {})["description"] = text
        for field in dataclasses.fields(cls):
            if field.default_factory is not dataclasses.MISSING and field.name in target["properties"]:
                target["properties"][field.name]["default"] = self.encode_default(field.default_factory())
        return generated


def _require_names(node: object, definitions: JsonSchemaValue) -> None:
    """Require `name` in a union of several dataclasses, except in the default's own class."""
    if isinstance(node, list):
        for item in node:
            _require_names(item, definitions)
    if not isinstance(node, dict):
        return
    names = [_name(choice, definitions) for choice in node.get("anyOf", [])]
    if sum(name is not None for name in names) > 1:
        default = (node.get("default") or {}).get("name")
        node["anyOf"] = [
            {**choice, "required": ["name"]} if name not in (None, default) else choice
            for choice, name in zip(node["anyOf"], names)
        ]
    for value in node.values():
        _require_names(value, definitions)


def _name(choice: JsonSchemaValue, definitions: JsonSchemaValue) -> str | None:
    """The constant `name` of a dataclass; None for a choice that has none."""
    fields = definitions.get(str(choice.get("$ref", "")).removeprefix("#/$defs/"), {}).get("properties", {})
    name: str | None = fields.get("name", {}).get("const")
    return name


@functools.cache
def docstrings(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and of its base classes."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                texts[field.target.id] = inspect.cleandoc(str(text.value.value))
    return texts
