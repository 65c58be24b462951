"""Pictures that are only an index: no file is behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sdxl_training.data.index_files import INDEX
from sdxl_training.data.pictures import IndexedSource, Pictures, SourceRules


@dataclass(frozen=True)
class Nowhere:
    """A source of no files."""

    identity: str = "nowhere"

    def path(self, name: str) -> str:
        return name


def index_of(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Return an index with a row for each mapping; what one leaves out is that of a plain square without caption."""
    plain = {"height": 64, "width": 64, "start": 0, "length": 1, "bytes": 1, "mtime_ns": 1}
    names = [b"%06d.png" % number for number in range(len(rows))]
    given = [{**plain, "file": name, "name": name, **row} for name, row in zip(names, rows, strict=True)]
    return pa.Table.from_pylist(given, schema=INDEX).combine_chunks()


def pictures_with(rows: Sequence[dict[str, Any]], rules: SourceRules | None = None) -> Pictures:
    """Return the pictures of such an index."""
    return Pictures([IndexedSource(Nowhere(), rules or SourceRules(), index_of(rows))])
