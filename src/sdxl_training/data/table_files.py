"""Tables that name pictures: JSON lines, CSV, TSV and Parquet. Arrow reads them: a second for a million rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from sdxl_training.data.listing import COLUMNS_SETTING
from sdxl_training.data.remote import is_address, read_range
from sdxl_training.records import UserError

ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")
PICTURE_COLUMNS = ("file_name", "path", "image", "filename")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
TAG_COLUMNS = ("tags",)
FIRST_LINES = 1000  # of JSON lines, that are asked for names of columns
EXAMPLES = 10

Chooser = Callable[[Sequence[str]], "Columns"]
Opener = Callable[[], BinaryIO]


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of a table's columns: of the picture's file, of its captions, each an alternative, and of its tags."""

    picture: str
    captions: tuple[str, ...]
    tags: str | None

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [self.picture, *self.captions, *([] if self.tags is None else [self.tags])]


def choose_columns(there: Sequence[str], picture: str | None, captions: Sequence[str], tags: str | None) -> Columns:
    """Return which of the columns that are there hold what: those given, else those of a usual name.

    Raises UserError where one that was given is not there, or where the names do not tell.
    """
    for name in (picture, *captions, tags):
        if name is not None and name not in there:
            raise UserError(f"it has no column {name}, only {_listed(there)}. Correct the column's name.")
    picture = picture or _the_usual(there, PICTURE_COLUMNS, "the pictures' file names", "image")
    if picture is None:
        raise UserError(
            f"it has no column {' or '.join(PICTURE_COLUMNS)}, only {_listed(there)}. Name the one that holds the "
            f"pictures' file names: {COLUMNS_SETTING}.image."
        )
    caption = _the_usual(there, CAPTION_COLUMNS, "the captions", "captions") if not captions else None
    return Columns(
        picture,
        tuple(captions) or ((caption,) if caption else ()),
        tags or _the_usual(there, TAG_COLUMNS, "the tags", "tags"),
    )


def _the_usual(there: Sequence[str], usual: Sequence[str], what: str, setting: str) -> str | None:
    found = [name for name in usual if name in there]
    if len(found) > 1 and found[0] != PICTURE_COLUMNS[0]:  # file_name is what data set libraries write
        raise UserError(
            f"it has the columns {_listed(found)}, each of which may hold {what}. "
            f"Choose with {COLUMNS_SETTING}.{setting}."
        )
    return found[0] if found else None


def read_table(
    address: str, size: int, picture: str | None, captions: Sequence[str], tags: str | None
) -> tuple[pa.Table, Columns]:
    """Return the columns of a table that tell of pictures, and which is which.

    size: that of the file, in bytes. Each column is large_string or a list of large_string; that of the pictures is
    large_string without nulls. Raises OSError where the file cannot be read, UserError for what it says, with the line
    or row where that is known.
    """
    readers: dict[str, Callable[[Opener, Chooser], pa.Table]] = {
        ".jsonl": _read_jsonl,
        ".csv": partial(_read_csv, ","),
        ".tsv": partial(_read_csv, "\t"),
        ".parquet": _read_parquet,
    }
    ending = PurePosixPath(address).suffix
    reader = readers.get(ending.lower())
    if reader is None:
        raise UserError(f"its name ends in {ending or 'nothing'}; tables end in {_listed(ENDINGS)}. Convert it.")
    chosen: list[Columns] = []

    def choose(there: Sequence[str]) -> Columns:
        chosen.append(choose_columns(there, picture, captions, tags))
        return chosen[-1]

    table = reader(_opener(address, size), choose)
    columns = chosen[-1]
    if not table.num_rows:
        raise UserError("it has no rows. Add one for each picture.")
    arrays = {name: _as_text(table[name], name, name == columns.picture) for name in dict.fromkeys(columns.names)}
    if arrays[columns.picture].null_count:
        row = pc.index(arrays[columns.picture].is_null(), True).as_py() + 1
        raise UserError(f"row {row} names no picture: {columns.picture} is empty. Name it, or remove the row.")
    return pa.table(arrays).combine_chunks(), columns


def _opener(address: str, size: int) -> Opener:
    """Return what opens a table as often as its reader likes; from an address it is fetched once."""
    if not is_address(address):
        return lambda: Path(address).open("rb")
    data = read_range(address, 0, size)
    return lambda: io.BytesIO(data)


def _as_text(column: pa.ChunkedArray, name: str, is_name: bool) -> pa.ChunkedArray:
    """Return a column as large_string, or as a list of it. Raises UserError for other types."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    value = kind.value_type if is_list else kind
    if pa.types.is_null(value):
        return column.cast(pa.list_(pa.large_string()) if is_list else pa.large_string())
    if not (pa.types.is_string(value) or pa.types.is_large_string(value)) or (is_list and is_name):
        wanted = "texts" if is_name else "texts or lists of texts"
        raise UserError(f"its column {name} holds no {wanted} but {column.type}. Name another column.")
    return column.cast(pa.list_(pa.large_string()) if is_list else pa.large_string())


# JSON lines


def _read_jsonl(open_file: Opener, choose: Chooser) -> pa.Table:
    with open_file() as file:
        first = [_object(line, number) for number, line in enumerate(islice(file, FIRST_LINES), 1) if line.strip()]
    columns = choose(list(dict.fromkeys(key for row in first for key in row)))
    names = list(dict.fromkeys(columns.names))
    options = pyarrow.json.ParseOptions(
        pa.schema([(name, pa.string()) for name in names]), unexpected_field_behavior="ignore"
    )
    try:
        with open_file() as file:
            table = pyarrow.json.read_json(file, parse_options=options)
        table.validate(full=True)
        return table.select(names)
    except (pa.ArrowException, KeyError):  # lists of captions, or something wrong: which, and in which line?
        return _read_lines(open_file, names, columns.picture)


def _read_lines(open_file: Opener, names: Sequence[str], picture: str) -> pa.Table:
    """Return these columns, those that are not the picture's as lists. Raises UserError with the line."""
    values: dict[str, list[object]] = {name: [] for name in names}
    with open_file() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _object(line, number)
            for name in names:
                value = row.get(name)
                if name == picture:
                    good, wanted = value is None or isinstance(value, str), "a text"
                else:
                    value = [value] if isinstance(value, str) else value
                    good = value is None or (isinstance(value, list) and all(isinstance(text, str) for text in value))
                    wanted = "a text or a list of texts"
                if not good:
                    raise UserError(f"line {number}: {name} must be {wanted}. Correct the line.")
                values[name].append(value)
    try:
        return pa.table(
            {
                name: pa.array(column, pa.large_string() if name == picture else pa.list_(pa.large_string()))
                for name, column in values.items()
            }
        )
    except UnicodeEncodeError as error:
        raise UserError(f"it spells half a character ({error.object[error.start]!r}). Correct it.") from error


def _object(line: bytes, number: int) -> dict[str, object]:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"line {number} is not UTF-8 text (byte {error.start}). Save the table as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"line {number} is not JSON ({error}). Each line is an object; correct this one.") from error
    if not isinstance(row, dict):
        raise UserError(f"line {number} is not an object but {type(row).__name__}. Write one object a line.")
    return row


# CSV and Parquet


def _read_csv(delimiter: str, open_file: Opener, choose: Chooser) -> pa.Table:
    """Read a table whose first row names the columns. An empty cell holds nothing, unless it is in quotes."""
    try:
        with io.TextIOWrapper(open_file(), newline="", encoding="utf-8-sig") as file:
            there = next(csv.reader(file, delimiter=delimiter), [])
    except UnicodeDecodeError as error:
        raise UserError(f"it is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except csv.Error as error:
        raise UserError(f"its first row cannot be read ({error}). It names the columns; correct it.") from error
    names = list(dict.fromkeys(choose(there).names))
    convert = pyarrow.csv.ConvertOptions(
        include_columns=names,
        column_types=dict.fromkeys(names, pa.string()),
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
        null_values=[""],
    )
    try:
        with open_file() as file:
            return pyarrow.csv.read_csv(
                file,
                pyarrow.csv.ReadOptions(use_threads=False),  # with threads, errors do not name the row
                pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert,
            )
    except (pa.ArrowException, KeyError) as error:
        raise UserError(f"it cannot be read: {error}. Correct it, and save it as UTF-8.") from error


def _read_parquet(open_file: Opener, choose: Chooser) -> pa.Table:
    try:
        with open_file() as source, pq.ParquetFile(source) as file:
            return file.read(list(dict.fromkeys(choose(file.schema_arrow.names).names)))
    except pa.ArrowException as error:
        raise UserError(f"it cannot be read: {error}. Write it anew.") from error


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:EXAMPLES])
    return shown + (f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else "")
