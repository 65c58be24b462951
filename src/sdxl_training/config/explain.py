"""Turns what pydantic rejects into plain sentences with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from sdxl_training.config.problems import Problem, shown
from sdxl_training.config.schema import Config
from sdxl_training.config.tree import Node, Path

# Names of the same things in other trainers.
SYNONYMS = {
    "accumulation_steps": "training.accumulation",
    "caption_dropout_rate": "data.captions.caption_dropout",
    "caption_dropout_probability": "data.captions.caption_dropout",
    "caption_extension": "data.captions.extension",
    "caption_prefix": "data.sources.0.add_tags.front",
    "caption_separator": "data.captions.separator",
    "caption_suffix": "data.sources.0.add_tags.back",
    "caption_tag_dropout_rate": "data.captions.tag_dropout",
    "clip_grad_norm": "training.max_grad_norm",
    "cond_dropout": "data.captions.caption_dropout",
    "ema_decay": "training.ema.decay",
    "enable_wildcard": "data.captions.alternatives",
    "grad_clip": "training.max_grad_norm",
    "gradient_accumulation": "training.accumulation",
    "gradient_accumulation_steps": "training.accumulation",
    "gradient_clip": "training.max_grad_norm",
    "gradient_clipping": "training.max_grad_norm",
    "image_dir": "data.sources.0.path",
    "keep_tags": "data.captions.keep_first",
    "keep_tokens": "data.captions.keep_first",
    "lr": "training.optimizer.learning_rate",
    "lr_scheduler": "training.schedule.type",
    "lr_warmup_steps": "training.schedule.warmup_steps",
    "max_bucket_reso": "data.buckets.max_side_px",
    "max_data_loader_n_workers": "data.workers",
    "max_embeddings_multiples": "data.captions.max_tokens",
    "max_token_length": "data.captions.max_tokens",
    "max_train_steps": "training.max_steps",
    "min_bucket_reso": "data.buckets.min_side_px",
    "min_snr_gamma": "training.loss_weight.gamma",
    "mixed_precision": "training.precision",
    "num_repeats": "data.sources.0.repeats",
    "num_workers": "data.workers",
    "output_name": "global_config.run_name",
    "prediction_type": "training.objective.type",
    "pretrained_model_name_or_path": "model.source",
    "proportion_empty_prompts": "data.captions.caption_dropout",
    "sample_every_n_steps": "global_config.previews.every_steps",
    "sample_prompts": "global_config.previews.prompts",
    "save_every_n_steps": "global_config.checkpoints.every_steps",
    "shuffle_caption": "data.captions.shuffle",
    "shuffle_tags": "data.captions.shuffle",
    "tokenizer_max_length": "data.captions.max_tokens",
    "train_batch_size": "training.batch_size",
    "train_data_dir": "data.sources.0.path",
    "ucg_rate": "data.captions.caption_dropout",
    "use_ema": "training.ema.type",
    "v_parameterization": "training.objective.type",
    "weighted_captions": "data.captions.weights",
    "zero_terminal_snr_schedule": "training.objective.zero_terminal_snr",
}
EPSILON_AT_SNR_0 = "epsilon cannot be trained at SNR 0, where the noise is the input itself; use type: v_prediction"

Schema = dict[str, Any]


def explain(error: ValidationError, tree: Node, *, complete: bool) -> dict[Path, Problem]:
    """Return one problem for each place that pydantic rejected in `tree`.

    With `complete` False a file could not be read, and what is missing may stand there: it is no problem yet.
    """
    schema = Config.model_json_schema()
    data = tree.plain()
    errors = [
        _place(details["loc"], details["type"], data)
        for details in error.errors()
        if complete or details["type"] != "missing"
    ]
    wrong_types = {path[:-1] for path, kind in errors if path[-1:] == ("type",) and kind == "literal_error"}
    shortened = {path[:depth] for path, _ in errors for depth in range(len(path))}
    problems: dict[Path, Problem] = {}
    for path, kind in errors:
        if path[:-1] in wrong_types and path[-1] != "type":
            continue  # an unknown type makes its siblings unknown, too: one problem, not several
        if kind == "too_short" and path in shortened:
            continue  # pydantic counts only the good items
        place, text = _sentence(schema, path, kind, tree)
        node = tree.get(place)
        value = shown(node) if node and kind != "extra_forbidden" else None
        problems.setdefault(path, Problem(tree.nearest(place).origin, ".".join(place), text, value))
    return problems


def _place(location: tuple[int | str, ...], kind: str, data: Any) -> tuple[Path, str]:
    """Return path and kind of an error; a pair that lacks an item is a list that is too short."""
    if kind == "missing" and isinstance(location[-1], int):
        return _path(location[:-1], data), "too_short"
    return _path(location, data), kind


def _path(location: tuple[int | str, ...], data: Any) -> Path:
    """Drop the types that pydantic inserts into a location after every family."""
    path: list[str] = []
    for part in location:
        if isinstance(data, dict) and part not in data and part == data.get("type"):
            continue
        path.append(str(part))
        if isinstance(data, list) and isinstance(part, int):
            data = data[part] if part < len(data) else None
        else:
            data = data.get(part) if isinstance(data, dict) else None
    return tuple(path)


def _sentence(schema: Schema, path: Path, kind: str, tree: Node) -> tuple[Path, str]:
    """Return the place to show and what to say about it."""
    if kind == "extra_forbidden":
        return path, _unknown_key(schema, path, tree)
    here = _at(schema, path, tree)
    if kind == "missing":
        return path, f"is required: {here['description'].rstrip('.')}"
    if kind == "union_tag_invalid":
        return (*path, "type"), _unknown_type([*here["discriminator"]["mapping"]], tree.get((*path, "type")))
    if kind == "literal_error" and "const" in here:
        return path, _unknown_type([here["const"]], tree.get(path))
    node = tree.get(path)
    if "properties" in here and node is not None and node.value is None:
        return path, "is empty; give it settings below, or delete the line"
    if kind == "string_type" and node is not None and isinstance(node.value, (int, float)):
        return path, "must be text; put it in quotes"
    return path, f"must be {in_words(here)}"


def _unknown_type(names: list[str], node: Node | None) -> str:
    if len(names) == 1:
        return f"must be {names[0]}, the only one there is"
    close = get_close_matches(str(node.value) if node else "", names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"must be {_one_of(names)}{hint}"


def _unknown_key(schema: Schema, path: Path, tree: Node) -> str:
    *parent, key = path
    family = _step_into(schema, tuple(parent), tree)
    if "oneOf" in family:
        node = tree.get((*parent, "type"))
        owners = [name for name, option in _options(schema, family).items() if key in option["properties"]]
        if owners and node:
            reason = f"; {EPSILON_AT_SNR_0}" if (node.value, key) == ("epsilon", "zero_terminal_snr") else ""
            return f"belongs to type: {_one_of(owners)}, not to {node.value}{reason}"
    if "." in key:
        return "unknown key; in a file write a dot as a section with its settings below"
    name = nearest_name(schema, path, list(_at(schema, tuple(parent), tree).get("properties", {})))
    return f"unknown key; did you mean {name}?" if name else "unknown key; delete it"


def nearest_name(schema: Schema, path: Path, siblings: list[str]) -> str | None:
    """Return the dotted name that was probably meant: another trainer's word, a sibling, or a name anywhere."""
    *parent, key = path
    if key.lower() in SYNONYMS:
        return SYNONYMS[key.lower()]
    if close := get_close_matches(key, siblings, n=1, cutoff=0.65):
        return ".".join([*parent, close[0]])
    names = list(dict.fromkeys(_names(schema, schema, ())))
    keys = {name.rsplit(".", 1)[-1] for name in names}
    close = get_close_matches(key, keys, n=1, cutoff=0.75)
    same_key = [name for name in names if name.rsplit(".", 1)[-1] in close]
    nearest = get_close_matches(".".join(path), same_key, n=1, cutoff=0.0)
    return nearest[0] if nearest else None


# --- walking the JSON schema ------------------------------------------------------------------------------------------


def _resolved(schema: Schema, part: Schema) -> Schema:
    """Follow a reference; what stands beside it (description, default) wins."""
    if "$ref" not in part:
        return part
    return {**schema["$defs"][part["$ref"].rsplit("/", 1)[-1]], **{k: v for k, v in part.items() if k != "$ref"}}


def _options(schema: Schema, family: Schema) -> dict[str, Schema]:
    mapping = family["discriminator"]["mapping"]
    return {name: _resolved(schema, {"$ref": reference}) for name, reference in mapping.items()}


def _step_into(schema: Schema, path: Path, tree: Node) -> Schema:
    """Return the schema at `path`, a family still undecided."""
    part = schema
    for depth, key in enumerate(path):
        part = _decided(schema, part, tree.get((*path[:depth], "type")))
        if "prefixItems" in part:
            part = part["prefixItems"][int(key)]
        elif part.get("type") == "array":
            part = part["items"]
        else:
            part = part.get("properties", {}).get(key) or part["additionalProperties"]
        part = _resolved(schema, part)
    return part


def _decided(schema: Schema, part: Schema, type_node: Node | None) -> Schema:
    if "oneOf" not in part or type_node is None:
        return part
    return _options(schema, part).get(str(type_node.value), part)


def _at(schema: Schema, path: Path, tree: Node) -> Schema:
    return _decided(schema, _step_into(schema, path, tree), tree.get((*path, "type")))


def _names(schema: Schema, part: Schema, path: Path) -> Iterator[str]:
    """Yield the dotted name of every knob of every type; list items are number 0."""
    part = _resolved(schema, part)
    if path:
        yield ".".join(path)
    for option in _options(schema, part).values() if "oneOf" in part else [part]:
        for key, child in option.get("properties", {}).items():
            yield from _names(schema, child, (*path, key))
    if "$ref" in part.get("items", {}):
        yield from _names(schema, part["items"], (*path, "0"))


# --- rules in words ---------------------------------------------------------------------------------------------------


def in_words(part: Schema) -> str:
    """Return what a JSON schema allows, as the end of a sentence that begins with "must be"."""
    if "anyOf" in part:
        return " or ".join(in_words(option) for option in part["anyOf"])
    if "oneOf" in part:
        return f"a mapping with {_one_of([f'type: {name}' for name in part['discriminator']['mapping']])}"
    if "enum" in part or "const" in part:
        return _one_of([str(value) for value in part.get("enum", [part.get("const")])])
    if "in_words" in part:
        return str(part["in_words"])
    kind = part.get("type")
    if kind in ("integer", "number"):
        return _number_in_words("a whole number" if kind == "integer" else "a number", part)
    if kind == "array":
        return _list_in_words(part)
    if kind == "object":
        named = isinstance(part.get("additionalProperties"), dict)
        return f"a mapping from names to {in_words(part['additionalProperties'])}" if named else "a mapping of settings"
    text = "text that is not empty" if part.get("minLength") else "text"
    return {"string": text, "boolean": "true or false", "null": "null"}[str(kind)]


def _number_in_words(noun: str, part: Schema) -> str:
    low, high = part.get("minimum"), part.get("maximum")
    above, below = part.get("exclusiveMinimum"), part.get("exclusiveMaximum")
    if low is not None and high is not None:
        noun = f"{noun} from {low} to {high}"
        low = high = None
    bounds = [
        f"{word} {bound}"
        for word, bound in (("of at least", low), ("above", above), ("of at most", high), ("below", below))
        if bound is not None
    ]
    if "multipleOf" in part:
        bounds.append(f"divisible by {part['multipleOf']}")
    return f"{noun} {' and '.join(bounds)}".rstrip()


def _list_in_words(part: Schema) -> str:
    least, most = part.get("minItems", 0), part.get("maxItems")
    count = f"exactly {least}" if least == most else f"at least {least}"
    return f"a list of {count} item{'' if least == 1 else 's'}" if least else "a list"


def _one_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
