"""Which rows of an index have certain words in their captions or tags: found by Arrow, without a Python text of each.

Shape legend: M rows of a source's index.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Match = Callable[[pa.Array], pa.BooleanArray]
"""texts -> which of them match, for example `partial(pc.match_substring, pattern="cat")`."""


def rows_with(table: pa.Table, match: Match) -> NDArray[np.bool_]:
    """Return which rows (M,) of a table (listing.PICTURES) have a caption or tag that matches."""
    matching_M = np.zeros(table.num_rows, bool)
    for name in ("captions", "tags"):
        for lists in table[name].chunks:
            found = pc.fill_null(match(pc.list_flatten(lists)), fill_value=False)
            matching_M[pc.list_parent_indices(lists).filter(found).to_numpy()] = True
    return matching_M
