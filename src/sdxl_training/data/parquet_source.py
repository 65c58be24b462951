"""Pictures in the rows of Parquet files, and of the .arrow files that Hugging Face datasets keep on disk.

A picture is a column of bytes, or Hugging Face's struct of `bytes` and `path`. What a row costs is told in `rows`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from os import fsdecode
from typing import Any

import pyarrow as pa

from sdxl_training.data.decoding import UnreadablePicture, read_header
from sdxl_training.data.listing import COLUMNS_SETTING as SETTING
from sdxl_training.data.listing import FILES, PICTURES, pictures_of
from sdxl_training.data.quick_headers import AT_FIRST, parse_start
from sdxl_training.data.remote import base_of, list_files, shown
from sdxl_training.data.rows import DAMAGE, image_bytes, open_rows, unpacked
from sdxl_training.data.sidecars import Sidecar, decode_text, sidecar_of, tags_of
from sdxl_training.records import UserError

SUFFIXES = (".parquet", ".arrow")
IMAGE_NAMES = ("image", "jpg", "png", "webp")
CAPTION_NAMES = ("caption", "captions", "text", "prompt", "txt")
TAGS_NAME = "tags"
SIDECAR_NAME = "json"  # what becomes of a WebDataset's .json members in Parquet


@dataclass(frozen=True, slots=True)
class ParquetSource:
    """Pictures in one .parquet (or local .arrow) file, in those of a folder, or in those of a pattern.

    address: a path or an address. image_column: found by its name or type where it is not given. caption_columns: each
    a text or a list of texts, all of them alternatives; found by name where they are not given. tags_column: texts or
    lists of them; the one called tags where it is not given.
    """

    address: str
    image_column: str | None = None
    caption_columns: tuple[str, ...] | None = None
    tags_column: str | None = None

    @property
    def identity(self) -> str:
        """Return the source's place and settings as text."""
        place = {"base": shown(self._base), "address": shown(self.address)}
        columns = {"image": self.image_column, "captions": self.caption_columns}
        # Only where it is given: the index of those who never named it stays.
        tags = {} if self.tags_column is None else {"tags": self.tags_column}
        return json.dumps({"kind": "rows", **place, **columns, **tags})

    def list_files(self) -> pa.Table:
        """Return the files there are, schema FILES; the first file's columns are checked.

        Raises UserError where there is no file, or where it is not plain which columns are meant.
        """
        files = list_files(self.address, SUFFIXES)
        try:
            with closing(open_rows(self._base + fsdecode(files[0].name))) as rows:
                find_columns(rows.schema, self.image_column, self.caption_columns, self.tags_column)
        except DAMAGE:
            pass  # of this one file, so `look` says it
        names, sizes, times = zip(*files, strict=True)
        nothing = [-1] * len(files)
        return pa.Table.from_arrays(
            [pa.array(column) for column in (names, sizes, times, nothing, nothing)], schema=FILES
        )

    def look(self, files: pa.Table) -> pa.Table:
        """Return the pictures in these files, schema PICTURES; of a damaged file those before the damage, and a reason.

        Files are unpacked whole, a few rows at a time; of pictures only the headers are read. A row whose length is
        -1 says that the disk or the network failed: nothing of the file is known, look again.
        """
        tables = [self._look_at(name) for name in files.column("file").to_pylist()]
        return pa.concat_tables([PICTURES.empty_table(), *tables])

    def read(self, file: str, start: int, length: int) -> bytes:
        """Return the picture in row `start`. Raises UnreadablePicture where it cannot be had.

        Threads of one process take turns.
        """
        address, name = self._base + file, self.path(f"{file}/{start}")
        try:
            data = unpacked.read(address, self.image_column, find_image, start)
        except (*DAMAGE, UserError) as error:
            raise UnreadablePicture(name, f"its row cannot be read: {shown(str(error))}") from error
        if data is None or len(data) != length:
            raise UnreadablePicture(name, f"its row has other contents than when it was looked at ({length} bytes)")
        return data

    def path(self, name: str) -> str:
        """Return the path or address of a file, or of a picture as if its file were a folder of rows."""
        return shown(self._base) + name

    @property
    def _base(self) -> str:
        return base_of(self.address, SUFFIXES)

    def _look_at(self, file: bytes) -> pa.Table:
        address = self._base + fsdecode(file)
        unpacked.forget(address)
        tables: list[pa.Table] = []
        row = 0
        problem = None
        try:
            with closing(open_rows(address)) as rows:
                columns = find_columns(rows.schema, self.image_column, self.caption_columns, self.tags_column)
                for batch in rows.batches([columns.image, *columns.texts], range(len(rows.starts) - 1)):
                    tables.append(pictures_of(list(_pictures(batch, columns, file, row, self.path(fsdecode(file))))))
                    row += batch.num_rows
            if row == 0:
                problem = "it has no rows"
        except UserError as error:
            problem = str(error)
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk or the network, not the content
                reason = f"the file cannot be read: {error.strerror}"
                return pictures_of([_unusable(file, 0, reason) | {"name": file, "length": -1}])
            problem = f"it is damaged, so rows from {row} on are missing ({error}). Copy it anew"
        if problem is not None:
            tables.append(pictures_of([_unusable(file, 0, problem) | {"name": file}]))
        return pa.concat_tables(tables)


# Columns


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns are read: of pictures, of captions, of tags, and of JSON that holds both."""

    image: str
    captions: tuple[str, ...] = ()
    tags: str | None = None
    sidecar: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """All but the pictures."""
        return (*self.captions, *(name for name in (self.tags, self.sidecar) if name is not None))


def find_columns(
    schema: pa.Schema, image: str | None = None, captions: Sequence[str] | None = None, tags: str | None = None
) -> Columns:
    """Return the columns to read, guessed by name where they are not given.

    Pictures: the one of IMAGE_NAMES, else the one Hugging Face picture column. Captions: the one of CAPTION_NAMES;
    `tags` and `json` beside it, and a text column `tags` in its place. Raises UserError, with all columns, where a
    column is missing or of another type or where several may be meant.
    """
    types = {field.name: _plain(field.type) for field in schema}
    image = find_image(schema, image)
    if captions is None:
        known = [name for name in CAPTION_NAMES if name in types and _holds_texts(types[name]) and name != tags]
        if len(known) > 1:
            wanted = f"Name those you want in {SETTING}.captions."
            raise UserError(f"{_either(known, 'captions')}. {wanted} {_listed(schema)}")
        if not known and tags is None and SIDECAR_NAME not in types and _is_text(types.get(TAGS_NAME, pa.null())):
            known = [TAGS_NAME]
        captions = known
    for setting, names in (("captions", captions), ("tags", [] if tags is None else [tags])):
        for name in names:
            if name not in types or not _holds_texts(types[name]):
                raise UserError(f"{SETTING}.{setting}: there is no column {name} with texts. {_listed(schema)}")
    if tags in captions:
        raise UserError(f"{SETTING}.tags: {tags} is among {SETTING}.captions, too. Name it in one of them.")
    if tags is None and TAGS_NAME not in captions and _holds_texts(types.get(TAGS_NAME, pa.null())):
        tags = TAGS_NAME
    sidecar = types.get(SIDECAR_NAME) if SIDECAR_NAME not in (*captions, tags) else None
    is_sidecar = sidecar is not None and (_is_text(sidecar) or pa.types.is_struct(sidecar))
    return Columns(image, tuple(captions), tags, SIDECAR_NAME if is_sidecar else None)


def find_image(schema: pa.Schema, image: str | None) -> str:
    """Return the column of pictures, as `find_columns` does."""
    types = {field.name: field.type for field in schema}
    if image is not None:
        if image in types and _holds_pictures(types[image]):
            return image
        raise UserError(f"{SETTING}.image: there is no column {image} with the bytes of pictures. {_listed(schema)}")
    known = [name for name in IMAGE_NAMES if name in types and _holds_pictures(types[name])]
    known = known or [name for name, kind in types.items() if pa.types.is_struct(kind) and _holds_pictures(kind)]
    if len(known) != 1:
        raise UserError(f"{_either(known, 'pictures')}. Name it in {SETTING}.image. {_listed(schema)}")
    return known[0]


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _holds_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return _is_bytes(kind)


def _holds_texts(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return _is_text(_plain(kind.value_type) if is_list else kind)


def _either(names: Sequence[str], what: str) -> str:
    return (
        f"any of the columns {', '.join(names)} may hold the {what}" if names else f"no column is known to hold {what}"
    )


def _listed(schema: pa.Schema) -> str:
    return "Columns: " + ", ".join(f"{field.name} ({str(field.type)[:60]})" for field in schema) + "."


# Rows


def _pictures(
    batch: pa.RecordBatch, columns: Columns, file: bytes, first: int, path: str
) -> Iterator[dict[str, object]]:
    """Yield rows of PICTURES for a batch that begins at row `first`."""
    paths = _paths(batch.column(columns.image))
    texts = {name: _cells(batch.column(name)) for name in columns.texts}
    for i, cell in enumerate(image_bytes(batch.column(columns.image))):
        row = _unusable(file, first + i, "")
        try:
            if not cell.is_valid:
                raise ValueError(_without_bytes(paths[i]))
            data = cell.as_buffer()
            row["length"] = data.size
            header = parse_start(data[:AT_FIRST].to_pybytes()) or read_header(io.BytesIO(data), path)
            sidecar = _sidecar({name: cells[i] for name, cells in texts.items()}, columns)
        except UnreadablePicture as error:
            yield row | {"reason": error.reason}
            continue
        except ValueError as error:
            yield row | {"reason": str(error)}
            continue
        row["height"], row["width"] = header.size_hw
        row |= {"orientation": header.orientation, "mode": header.mode, "format": header.format, "reason": None}
        row |= {"captions": sidecar.captions or None, "tags": sidecar.tags or None, "focus": sidecar.focus}
        yield row


def _unusable(file: bytes, row: int, reason: str) -> dict[str, object]:
    name = file + b"/" + str(row).encode()
    return {"file": file, "name": name, "start": row, "length": 0, "height": 0, "width": 0, "reason": reason}


def _paths(column: pa.Array) -> list[object]:
    has_path = pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0
    return column.flatten()[column.type.get_field_index("path")].to_pylist() if has_path else [None] * len(column)


def _without_bytes(path: object) -> str:
    if path is None:
        return "the row has no picture"
    return (
        f"the row has no bytes, only the path {path}; write the dataset with its pictures in it "
        "(datasets: push_to_hub or to_parquet with embed_external_files)"
    )


def _cells(column: pa.Array) -> list[Any]:
    """Return a column of texts as bytes, lists of bytes or None: not every file keeps to UTF-8. Others as they are."""
    kind = _plain(column.type)
    if _is_text(kind):
        return list(column.cast(kind).cast(pa.large_binary()).to_pylist())
    if _holds_texts(kind):
        return list(column.cast(pa.large_list(pa.large_binary())).to_pylist())
    return list(column.to_pylist())


def _sidecar(cells: dict[str, Any], columns: Columns) -> Sidecar:
    """Return what a row says beside its picture; its columns come before what its JSON says. Raises ValueError."""
    captions: list[str] = []
    for name in columns.captions:
        captions += _texts(cells[name], name)
    tags: tuple[str, ...] = ()
    if columns.tags is not None and cells[columns.tags] is not None:
        texts = _texts(cells[columns.tags], columns.tags)
        tags = tags_of(texts if isinstance(cells[columns.tags], list) else texts[0])
    if columns.sidecar is None or cells[columns.sidecar] is None:
        return Sidecar(tuple(captions), tags)
    value = cells[columns.sidecar]
    try:
        inner = sidecar_of(json.loads(value) if isinstance(value, bytes) else value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its column {columns.sidecar}: {error}") from error
    return Sidecar(tuple(captions) or inner.captions, tags or inner.tags, inner.focus)


def _texts(cell: bytes | list[bytes | None] | None, column: str) -> list[str]:
    """Return the texts of a cell without those that are null."""
    parts = cell if isinstance(cell, list) else [cell]
    try:
        return [decode_text(part) for part in parts if part is not None]
    except ValueError as error:
        raise ValueError(f"its column {column} {error}") from error
