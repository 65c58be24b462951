"""Which pictures of a source take part: by name, by tags, by size. Shape legend: M rows of the source's index."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Filter:
    """What a picture must be to take part; without a limit every one does.

    names, except_names: patterns such as `cats/*.png` that the name relative to the source must, or must not, match (a
    star matches slashes, too). any_tag, no_tag: tags of which it must have at least one, or none. min_side_px: least
    shorter side.
    """

    names: tuple[str, ...] = ()
    except_names: tuple[str, ...] = ()
    any_tag: tuple[str, ...] = ()
    no_tag: tuple[str, ...] = ()
    min_side_px: int = 0

    def passes(self, table: pa.Table, among_M: Mask, tags: Callable[[int], Sequence[str]]) -> Mask:
        """Return which rows of a table (listing.PICTURES) pass; tags are read only of rows in `among_M`."""
        passes_M = np.minimum(table["height"].to_numpy(), table["width"].to_numpy()) >= self.min_side_px
        if self.names:
            passes_M &= _matches(table["name"], self.names)
        if self.except_names:
            passes_M &= ~_matches(table["name"], self.except_names)
        if self.any_tag or self.no_tag:
            wanted, unwanted = set(self.any_tag), set(self.no_tag)
            for row in np.flatnonzero(passes_M & among_M):
                own = set(tags(int(row)))
                passes_M[row] = (not wanted or not own.isdisjoint(wanted)) and own.isdisjoint(unwanted)
        return np.asarray(passes_M)


EVERYTHING = Filter()


def _matches(names: pa.ChunkedArray, patterns: Sequence[str]) -> Mask:
    expressions = [re.compile(fnmatch.translate(pattern).encode("utf-8", "surrogateescape")) for pattern in patterns]
    found = (any(each.match(name) for each in expressions) for name in pc.cast(names, pa.binary()).to_pylist())
    return np.fromiter(found, dtype=bool, count=len(names))
