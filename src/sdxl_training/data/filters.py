"""Which pictures of a source take part: by name, by tags, by size. Shape legend: M rows of the source's index."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdxl_training.data.text_search import rows_with

MARKUP = r"[()\[\]\\]"
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Filter:
    """What a picture must be to take part; without a limit every one does.

    names, except_names: patterns such as `cats/*.png` that the name relative to the source must, or must not, match (a
    star matches slashes, too). any_tag, no_tag: tags of which it must have at least one, or none. min_side_px: least
    shorter side. Tags are compared as they are written and, where captions have emphasis, without it.
    """

    names: tuple[str, ...] = ()
    except_names: tuple[str, ...] = ()
    any_tag: tuple[str, ...] = ()
    no_tag: tuple[str, ...] = ()
    min_side_px: int = 0

    def passes(
        self, table: pa.Table, among_M: Mask, tags: Callable[[int], Sequence[str]], emphasis: bool = False
    ) -> Mask:
        """Return which rows of a table (listing.PICTURES) pass; tags are read only of rows in `among_M`.

        tags: of a row. emphasis: whether brackets in captions are that, so that they may stand inside of tags.
        """
        passes_M = np.minimum(table["height"].to_numpy(), table["width"].to_numpy()) >= self.min_side_px
        if self.names:
            passes_M &= _matches(table["name"], self.names)
        if self.except_names:
            passes_M &= ~_matches(table["name"], self.except_names)
        if self.any_tag or self.no_tag:
            wanted, unwanted = set(self.any_tag), set(self.no_tag)
            maybe_M = self._may_have_tags(table, emphasis)
            for row in np.flatnonzero(passes_M & among_M & maybe_M):
                own = set(tags(int(row)))
                passes_M[row] = (not wanted or not own.isdisjoint(wanted)) and own.isdisjoint(unwanted)
            passes_M &= maybe_M | (not wanted)
        return np.asarray(passes_M)

    def _may_have_tags(self, table: pa.Table, emphasis: bool) -> Mask:
        """Return which rows have one of the filter's tags somewhere in their texts: of most, tags need not be read."""
        maybe_M = np.zeros(table.num_rows, bool)
        for tag in {*self.any_tag, *self.no_tag}:
            maybe_M |= rows_with(table, partial(pc.match_substring, pattern=tag))
        if emphasis:
            maybe_M |= rows_with(table, partial(pc.match_substring_regex, pattern=MARKUP))
        return maybe_M


EVERYTHING = Filter()


def _matches(names: pa.ChunkedArray, patterns: Sequence[str]) -> Mask:
    expressions = [re.compile(fnmatch.translate(pattern).encode("utf-8", "surrogateescape")) for pattern in patterns]
    found = (any(each.match(name) for each in expressions) for name in pc.cast(names, pa.binary()).to_pylist())
    return np.fromiter(found, dtype=bool, count=len(names))
