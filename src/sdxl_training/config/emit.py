"""Values as YAML text that reads back to the same values."""

from __future__ import annotations

import re
from typing import Any

PLAIN_TEXT = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
OTHER_MEANINGS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def yaml_inline(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(str(key))}: {yaml_inline(child)}" for key, child in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(yaml_inline(child) for child in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return _number(value)
    return _text(value) if isinstance(value, str) else str(value)


def _number(value: float) -> str:
    text = re.sub(r"e([-+])0", r"e\1", repr(value))
    return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(text, text)


def _text(value: str) -> str:
    if PLAIN_TEXT.fullmatch(value) and value.lower() not in OTHER_MEANINGS:
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
