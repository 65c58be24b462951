"""The tag column kept beside the index: made once, read again as long as pictures, captions and settings stay."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from sdxl_training.data.atomic import write_atomically
from sdxl_training.data.index_files import generation_of
from sdxl_training.data.pictures import IndexedSource, Pictures
from sdxl_training.data.tag_column import TagColumn, tag_column

VERSION, KEY = b"2", b"made_from"
CHECKSUM_BYTES = 16
SCHEMA = pa.schema([("tags", pa.large_list(pa.dictionary(pa.int32(), pa.large_string())))])

log = logging.getLogger(__name__)


def kept_tag_column(folder: Path, pictures: Pictures, added: Sequence[Sequence[str]]) -> TagColumn:
    """Return the tags of all pictures from the file in this folder, which is made anew where it is of something else.

    added: see `tag_column`. A file that is damaged is made anew. Raises UserError where it cannot be written.
    """
    made_from = _made_from(pictures, added)
    path = folder / f"tags-{_name(pictures)}.arrow"
    found = _read(path, made_from)
    if found is None:
        found = tag_column(pictures, added)
        pa.default_memory_pool().release_unused()  # what counting took; writing takes as much again
        _write(path, found, made_from)
    pa.default_memory_pool().release_unused()  # what writing and reading took
    return found


def _name(pictures: Pictures) -> str:
    identities = json.dumps([source.source.identity for source in pictures.sources])
    return hashlib.blake2b(identities.encode(), digest_size=8).hexdigest()


def _made_from(pictures: Pictures, added: Sequence[Sequence[str]]) -> bytes:
    """Return a digest of all that decides the column: indexes, which rows take part, how captions are read."""
    digest = hashlib.blake2b(VERSION, digest_size=16)
    for source, rows, own in zip(pictures.sources, pictures.rows, added, strict=True):
        digest.update(json.dumps([generation_of(source.table), _reading(source), list(own)]).encode())
        digest.update(np.ascontiguousarray(rows).tobytes())
    return digest.digest()


def _reading(source: IndexedSource) -> list[object]:
    rules = asdict(source.rules)
    return [rules[name] for name in ("separator", "kind", "weights", "lines")]


def _read(path: Path, made_from: bytes) -> TagColumn | None:
    """Return the column of a file: a checksum, since Arrow reads flipped bits as other tags, and an Arrow file."""
    if not path.exists():
        return None
    try:
        payload = pa.py_buffer(path.read_bytes())
    except OSError as error:
        log.warning("%s cannot be read (%s): the tags are counted again", path, error)
        return None
    if _checksum(payload[CHECKSUM_BYTES:]) != payload[:CHECKSUM_BYTES].to_pybytes():
        log.warning("%s is damaged: the tags are counted again", path)
        return None
    with pa.ipc.open_file(payload[CHECKSUM_BYTES:]) as reader:
        if reader.schema.metadata[KEY] != made_from:
            return None
        column = reader.read_all()["tags"].combine_chunks()
    tags = column.values
    return TagColumn(tags.dictionary.to_pylist(), column.offsets.to_numpy(), tags.indices.to_numpy().copy())


def _write(path: Path, column: TagColumn, made_from: bytes) -> None:
    names = pa.array(column.names_K, pa.large_string())
    lists = pa.LargeListArray.from_arrays(
        pa.array(column.offsets), pa.DictionaryArray.from_arrays(pa.array(column.tag_T), names)
    )
    sink = pa.BufferOutputStream()
    schema = SCHEMA.with_metadata({KEY: made_from})
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(pa.table([lists], schema=schema))
    body = sink.getvalue()
    write_atomically(path, b"".join([_checksum(body), body]))


def _checksum(body: pa.Buffer) -> bytes:
    return hashlib.blake2b(body, digest_size=CHECKSUM_BYTES).digest()
