"""Which category a tag belongs to: said in the configuration, by a table, or by the tag itself."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdxl_training.records import UserError

GENERAL = "general"
BOORU_NUMBERS = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "5": "meta", "9": "rating"}
"""What the numbers mean that Danbooru and taggers trained on it write in place of a category."""
NAME_COLUMNS, CATEGORY_COLUMNS = ("tag", "name", "tag_name"), ("category", "type")
PLACE = "tag_weighting.categories.file"


def categories_of(
    names: Sequence[str], said: Mapping[str, str], table: Mapping[str, str], prefixes: Sequence[str]
) -> list[str]:
    """Return the category of each tag: what is said of it, else the table's, else its own prefix, else general.

    names: lower case. said, table: category by tag. prefixes: categories that a tag may begin with, before a colon. In
    a table a tag may have underscores in place of blanks.
    """
    folded = {_folded(tag): category for source in (table, said) for tag, category in source.items()}
    known = {prefix.lower() for prefix in prefixes}

    def category(name: str) -> str:
        if (found := folded.get(name) or folded.get(_folded(name))) is not None:
            return found
        prefix, colon, rest = name.partition(":")
        return prefix.strip() if colon and rest and prefix.strip() in known else GENERAL

    return [category(name) for name in names]


def read_categories(path: Path) -> dict[str, str]:
    """Return the category of each tag of a CSV, TSV or JSON file.

    JSON: an object from tag to category. CSV and TSV: columns tag (or name) and category (or type), named in the first
    line; without such a line the first column is the tag and the second its category. A category may be a booru's
    number for it. Raises UserError for what is neither, with its line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{PLACE} = {path}: cannot be read ({error.strerror or error}). Correct the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{PLACE} = {path}: is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    if path.suffix.lower() == ".json":
        return _from_json(path, text)
    if path.suffix.lower() not in (".csv", ".tsv"):
        raise UserError(f"{PLACE} = {path}: must end in .csv, .tsv or .json. Convert it, or correct the ending.")
    return _from_rows(path, text, "\t" if path.suffix.lower() == ".tsv" else ",")


def _from_json(path: Path, text: str) -> dict[str, str]:
    try:
        said = json.loads(text)
    except ValueError as error:
        raise UserError(f"{PLACE} = {path}: is no JSON ({error}). Correct it there.") from error
    if not isinstance(said, dict):
        raise UserError(f'{PLACE} = {path}: must be an object from tag to category, such as {{"smile": "face"}}.')
    return {tag: _category(category, f"{path}, tag {tag}") for tag, category in said.items()}


def _from_rows(path: Path, text: str, delimiter: str) -> dict[str, str]:
    reader = csv.reader(text.splitlines(), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise UserError(
            f"{PLACE} = {path}, line {reader.line_num}: cannot be read ({error}). A tag with quotes is written "
            'between quotes, its own doubled: """hi""".'
        ) from error
    header = [name.strip().lower() for name in rows[0][1]] if rows else []
    tag = next((header.index(name) for name in NAME_COLUMNS if name in header), None)
    category = next((header.index(name) for name in CATEGORY_COLUMNS if name in header), None)
    if (tag is None) != (category is None):
        raise UserError(
            f"{PLACE} = {path}: its first line names {', '.join(rows[0][1])}; name the columns tag and category, or "
            "leave the line out where the first column is the tag and the second its category."
        )
    first = 0 if tag is None else 1
    tag, category = (0, 1) if tag is None or category is None else (tag, category)
    found: dict[str, str] = {}
    for number, row in rows[first:]:
        if len(row) <= max(tag, category):
            raise UserError(f"{PLACE} = {path}, line {number}: lacks the tag or its category. Add it, or take it out.")
        found[row[tag]] = _category(row[category], f"{path}, line {number}")
    return found


def _category(said: object, place: str) -> str:
    """Return a category as it is written, or what a booru's number for it means."""
    name = str(said).strip() if isinstance(said, str | int) and not isinstance(said, bool) else ""
    if not name:
        raise UserError(f"{PLACE} = {place}: has no category. Add it, or take it out.")
    return BOORU_NUMBERS.get(name, name)


def _folded(tag: str) -> str:
    return tag.strip().lower().replace("_", " ")
