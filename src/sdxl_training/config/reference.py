"""Writes the two files that repeat the schema for readers: `src/config.yaml` and the editors' JSON schema."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sdxl_training.config.data import Data, Source
from sdxl_training.config.emit import yaml_inline
from sdxl_training.config.schema import Config

WIDTH = 112  # of 120: settings of a type that is not the default are commented out, which makes them longer
EXAMPLE_SOURCE = Source(path="path/to/pictures")
HEADER = """\
# yaml-language-server: $schema=sdxl_training/config/config.schema.json
# Every setting with its default, for Stable Diffusion XL. Only data.sources has no default.
# Copy what you change into a file of your own; what it leaves out has the value you see here. A file may also extend
# another one:   base: ../src/config.yaml
# Settings of another type of a family stand as comments below the default type.
# Written by `python -m sdxl_training.config` from the schema in sdxl_training/config/; a test holds the two together.
"""


def reference_yaml() -> str:
    """Return the complete example: each setting once, with its default and one sentence."""
    return HEADER + "".join(f"{line}\n" for line in _section(Config, None, "", top=True))


def editor_schema() -> str:
    """Return the JSON schema for editors. It requires nothing, since a base may supply it."""
    schema: dict[str, Any] = _relaxed(Config.model_json_schema())
    schema["properties"]["base"] = {"type": "string", "description": "A file that this one extends, seen from here."}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def _relaxed(part: Any) -> Any:
    """Drop what an editor cannot know: required keys, and that one type of a family was meant."""
    if isinstance(part, list):
        return [_relaxed(child) for child in part]
    if not isinstance(part, dict):
        return part
    names = {"oneOf": "anyOf"}
    return {
        names.get(key, key): _relaxed(child)
        for key, child in part.items()
        if key not in ("discriminator", "title", "in_words") and not (key == "required" and isinstance(child, list))
    }


def _section(
    section: type[BaseModel],
    values: BaseModel | None,
    indent: str,
    *,
    top: bool = False,
    others: bool = True,
    known: type[BaseModel] = BaseModel,
) -> Iterator[str]:
    """Yield a section's lines, `type` first.

    others: families also show the types that are not the default. known: the same settings there are not repeated.
    """
    for key, field in sorted(section.model_fields.items(), key=lambda item: item[0] != "type"):
        if key in known.model_fields and known.model_fields[key].description == field.description:
            continue
        value = getattr(values, key) if values is not None else field.default
        if top:
            yield ""
        if field.annotation is Data or value is PydanticUndefined:
            yield from _without_default(key, field, indent)
        elif isinstance(value, BaseModel):
            yield from _block(key, field, value, indent, others)
        else:
            yield from _setting(key, field, value, indent)


def _without_default(key: str, field: FieldInfo, indent: str) -> Iterator[str]:
    """The two places a user must fill: `data`, and the list of sources in it."""
    yield from _comment(str(field.description), indent)
    yield f"{indent}{key}:"
    if field.annotation is Data:
        yield from _section(Data, None, f"{indent}  ")
    else:
        first, *rest = _section(Source, EXAMPLE_SOURCE, f"{indent}    ")
        yield f"{indent}  - {first.lstrip()}"
        yield from rest


def _block(key: str, field: FieldInfo, value: BaseModel, indent: str, others: bool) -> Iterator[str]:
    yield from _comment(str(field.description), indent)
    yield f"{indent}{key}:"
    yield from _section(type(value), value, f"{indent}  ")
    for option in get_args(field.annotation) if others else ():
        if option is not type(value):
            first, *rest = _section(option, option(), "", others=False, known=type(value))
            yield f"{indent}  # {first}"
            yield from (f"{indent}  # {line}" for line in rest)


def _setting(key: str, field: FieldInfo, value: Any, indent: str) -> Iterator[str]:
    line = f"{indent}{key}: {yaml_inline(value)}  # {field.description}{_choices(field)}"
    if len(line) <= WIDTH:
        yield line
        return
    yield from _comment(f"{field.description}{_choices(field)}", indent)
    if isinstance(value, tuple):
        yield f"{indent}{key}:"
        yield from (f"{indent}  - {yaml_inline(item)}" for item in value)
    else:
        yield f"{indent}{key}: {yaml_inline(value)}"


def _choices(field: FieldInfo) -> str:
    options = get_args(field.annotation)
    if get_origin(field.annotation) is not Literal or len(options) == 1:
        return ""
    return f" ({' | '.join(map(str, options))})"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
