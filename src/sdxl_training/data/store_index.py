"""The store's table in memory: one small record an entry and a sorted index, no Python object an entry.

Shape legend: N entries or keys asked for; M distinct keys; a key is two u64, so keys are (N, 2).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdxl_training.data.store_format import Keys, Records

Rows = NDArray[np.int64]

# What is kept in memory of an entry: 40 bytes, and 16 in the index. Its origin stays on disk.
ENTRY = np.dtype(
    [
        ("high", "<u8"),  # first half of the key
        ("low", "<u8"),
        ("offset", "<u8"),
        ("stored", "<u4"),
        ("crc", "<u4"),
        ("shard", "<u4"),  # number within this Store
        ("layout", "<u4"),  # number within this Store; DEAD is added where the bytes are damaged or missing
    ]
)
DEAD = 2**31


class KeyIndex(NamedTuple):
    """Living rows from some row on, one a key, sorted by key. reach: the first row that was not looked at."""

    high_M: NDArray[np.uint64]
    rows_M: Rows
    reach: int

    @classmethod
    def of(cls, entries_N: Records, first: int) -> KeyIndex:
        """Return the index of the entries from row `first` on; a third of a second a million."""
        rows = first + np.flatnonzero(entries_N["layout"][first:] < DEAD)
        keys = keys_of(entries_N[rows])
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal keys the latest comes last
        keys = keys[order]
        last = np.ones(len(keys), np.bool_)
        last[:-1] = (keys[1:] != keys[:-1]).any(axis=1)
        return cls(keys[last, 0], rows[order][last], len(entries_N))

    def keys(self, entries_N: Records) -> Keys:
        """Return the keys (M, 2)."""
        return keys_of(entries_N[self.rows_M])

    def find(self, entries_N: Records, keys_N2: Keys) -> Rows:
        """Return each key's row or -1. Keys that share their first half, which digests do not, take a pass each."""
        rows_N = np.full(len(keys_N2), -1, np.int64)
        if not len(self.rows_M):
            return rows_N
        sought = np.argsort(keys_N2[:, 0])  # in order, what is looked up lies near what was looked up before
        places_N = np.empty(len(keys_N2), np.int64)
        places_N[sought] = np.searchsorted(self.high_M, keys_N2[sought, 0])
        while len(sought):
            sought = sought[places_N[sought] < len(self.high_M)]
            sought = sought[self.high_M[places_N[sought]] == keys_N2[sought, 0]]
            rows = self.rows_M[places_N[sought]]
            hit = entries_N["low"][rows] == keys_N2[sought, 1]
            rows_N[sought[hit]] = rows[hit]
            sought = sought[~hit]
            places_N[sought] += 1
        return rows_N


def keys_of(entries_N: Records) -> Keys:
    """Return the keys (N, 2) of entries."""
    return np.stack((entries_N["high"], entries_N["low"]), axis=1)
