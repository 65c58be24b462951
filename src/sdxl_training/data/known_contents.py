"""What is known of the bytes of all pictures of a run, by picture number, over the files beside their indexes.

A picture that could not be decoded stays in the plan: a neighbour takes its place. So the order of the samples does not
depend on when somebody found out.

Shape legend: P pictures.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdxl_training.data.contents import Contents
from sdxl_training.data.pictures import Pictures
from sdxl_training.records import Quarantined


class KnownContents:
    """Content digests and failures of all pictures; shared with other processes through files."""

    def __init__(self, folder: Path, pictures: Pictures) -> None:
        self._pictures = pictures
        self._of = [Contents(folder, source.source.identity, source.table) for source in pictures.sources]

    def of(self, pictures: Pictures) -> KnownContents:
        """Return what is known of some of the pictures, under their new numbers."""
        chosen = copy(self)
        chosen._pictures = pictures
        return chosen

    def known(self, picture: int) -> bytes | None:
        """Return the digest of the picture's bytes, if somebody has read them."""
        contents, rows = self._place(picture)
        hashes, known = contents.hash_of(rows)
        return hashes[0].tobytes() if known[0] else None

    def learn(self, picture: int, content: bytes) -> None:
        """Remember the digest."""
        contents, rows = self._place(picture)
        contents.learn(rows, np.frombuffer(content, np.uint8)[None])

    def failure(self, picture: int) -> str | None:
        """Return why the picture cannot be read, decoded or encoded, if somebody has tried."""
        contents, rows = self._place(picture)
        return contents.failures.get(int(rows[0]))

    def fail(self, picture: int, reason: str) -> None:
        """Remember that the picture cannot be read, decoded or encoded."""
        contents, rows = self._place(picture)
        row = int(rows[0])
        if row not in contents.failures:
            contents.fail([row], [reason])

    def failures(self) -> list[Quarantined]:
        """Return the pictures that take part and cannot be read, decoded or encoded, by source and name."""
        found = []
        for contents, source, rows in zip(self._of, self._pictures.sources, self._pictures.rows, strict=True):
            failed = np.array(sorted(contents.failures), np.int64)
            taking_part = failed[np.isin(failed, rows)]
            found += [Quarantined(source.path(row), contents.failures[row]) for row in taking_part.tolist()]
        return found

    def columns(self) -> tuple[NDArray[np.uint64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Return digests (P, 2), which of them are known, and which pictures failed."""
        parts = [contents.hash_of(rows) for contents, rows in zip(self._of, self._pictures.rows, strict=True)]
        digests_P2 = np.concatenate([np.ascontiguousarray(hashes).view("<u8") for hashes, _ in parts])
        known_P = np.concatenate([known for _, known in parts])
        failed = [
            np.isin(rows, np.fromiter(contents.failures, np.int64, len(contents.failures)))
            for contents, rows in zip(self._of, self._pictures.rows, strict=True)
        ]
        return digests_P2, known_P, np.concatenate(failed)

    def refresh(self) -> bool:
        """Read what other processes have learnt since; return whether there was anything."""
        return sum(contents.refresh() for contents in self._of) > 0

    def _place(self, picture: int) -> tuple[Contents, NDArray[np.int64]]:
        return self._of[self._pictures.source_P[picture]], self._pictures.row_P[picture : picture + 1]
