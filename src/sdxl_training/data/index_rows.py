"""Rows of an index by the files they are of: which are still right, and how old and new ones become one index.

Shape legend: F files as listed, G files as the index has them (each with its pictures, which follow each other), N
pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdxl_training.data.contents import column_of_hashes, hashes_of
from sdxl_training.data.index_files import INDEX, read_rows

STAMPS = ("bytes", "mtime_ns", "caption_bytes", "caption_mtime_ns")
SLICE = 2**16  # rows that are put together at a time

Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of INDEX, here or in a file, where they stay until they are needed."""

    rows: pa.Table | Path

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Return some columns of all rows."""
        return self._read(list(names)) if isinstance(self.rows, Path) else self.rows.select(names)

    def take(self, rows_N: Numbers) -> pa.Table:
        """Return these rows."""
        table = self._read(None) if isinstance(self.rows, Path) else self.rows
        if len(rows_N) and np.array_equal(rows_N, np.arange(rows_N[0], rows_N[0] + len(rows_N))):
            return table.slice(rows_N[0], len(rows_N))
        return table.take(pa.array(rows_N))

    def _read(self, names: list[str] | None) -> pa.Table:
        table = read_rows(self.rows, names)
        if table is None:
            raise ValueError(f"{self.rows} is gone")
        return table


@dataclass(frozen=True, slots=True)
class Groups:
    """The rows of some pieces by file. piece_G, start_G, count_G: where a file's rows are; stamps_G4: of the file."""

    pieces: Sequence[Piece]
    files: pa.ChunkedArray
    piece_G: Numbers
    start_G: Numbers
    count_G: Numbers
    stamps_G4: Numbers
    has_reason_G: Mask

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Groups:
        """Find the files of these pieces; in each, a file's rows follow each other."""
        found = [_groups_in(piece) for piece in pieces] or [_groups_in(Piece(INDEX.empty_table()))]
        files, starts, counts, stamps, reasons = zip(*found, strict=True)
        return cls(
            pieces,
            pa.chunked_array(files, pa.binary()),
            np.repeat(np.arange(len(found)), [len(start_G) for start_G in starts]),
            *(np.concatenate(columns) for columns in (starts, counts, stamps, reasons)),
        )

    def find(self, files: pa.ChunkedArray) -> Numbers:
        """Return the number of each file, of its first one where it has several; -1 where it is not there."""
        if self.files.equals(files):
            return np.arange(len(files))
        places: Numbers = pc.index_in(files, value_set=self.files).fill_null(-1).to_numpy().astype(np.int64)
        return places


@dataclass(frozen=True, slots=True)
class Comparison:
    """The files there are beside those that are known. place_F: in `known`, -1: new. same_F: not changed since."""

    files: pa.Table
    known: Groups
    place_F: Numbers
    same_F: Mask

    @classmethod
    def of(cls, files: pa.Table, known: Groups) -> Comparison:
        """Compare by name, then by stamps."""
        place_F = known.find(files["file"])
        same_F = place_F >= 0
        same_F[same_F] = (known.stamps_G4[place_F[same_F]] == stamps_of(files)[same_F]).all(axis=1)
        return cls(files, known, place_F, same_F)

    def unusable(self) -> Mask:
        """Which files are not changed and hold what could not be used; it may be by now, without a sign of it."""
        unusable_F = self.same_F.copy()
        unusable_F[self.same_F] = self.known.has_reason_G[self.place_F[self.same_F]]
        return unusable_F


def is_unchanged(stored: pa.Table, files: pa.Table) -> bool:
    """Whether an index has a row for each of these files and nothing is to be looked at: what is so on most starts."""
    if stored.num_rows != files.num_rows or stored["reason"].null_count < stored.num_rows:
        return False
    return all(stored[name].equals(files[name]) for name in ("file", *STAMPS))


def differs(stored: pa.Table, compared: Comparison, fresh: Sequence[Piece]) -> bool:
    """Whether an index must be rewritten: for other files or stamps, or because a second look told something else."""
    place_F, known = compared.place_F, compared.known
    if len(known.files) != len(place_F) or not np.array_equal(place_F, np.arange(len(place_F))):
        return True
    if not compared.same_F.all():
        return True
    place_G = place_F[compared.unusable()]
    before = Piece(stored).take(_expand(known.start_G[place_G], known.count_G[place_G])).drop_columns(["content_hash"])
    tables = [piece.columns(before.column_names) for piece in fresh]
    return not before.equals(pa.concat_tables(tables) if tables else before.slice(0, 0))


def merged(compared: Comparison, fresh: Groups) -> Iterator[pa.Table]:
    """Yield the rows of all files in their order: those of a fresh look where there was one, else those known.

    Where only the caption has changed, the content hash stays. A file of which nothing was found has no rows.
    """
    files, known = compared.files["file"], compared.known
    fresh_F = fresh.find(files)
    is_fresh_F = fresh_F >= 0
    gone_F = ~is_fresh_F & ~compared.same_F

    def choose(of_known_G: Numbers, of_fresh_G: Numbers) -> Numbers:
        chosen_F = np.zeros(len(files), np.int64)
        chosen_F[is_fresh_F] = of_fresh_G[fresh_F[is_fresh_F]]
        chosen_F[~is_fresh_F & ~gone_F] = of_known_G[compared.place_F[~is_fresh_F & ~gone_F]]
        return chosen_F

    pieces = [*known.pieces, *fresh.pieces]
    piece_F = choose(known.piece_G, fresh.piece_G + len(known.pieces))
    start_F, count_F = choose(known.start_G, fresh.start_G), choose(known.count_G, fresh.count_G)
    hashes = _kept_hashes(compared, is_fresh_F & (count_F == 1))
    first = 0
    while first < len(count_F):
        stop = max(int(np.searchsorted(np.cumsum(count_F[first:]), SLICE, side="right")) + first, first + 1)
        counts = count_F[first:stop]
        rows_N, piece_N = _expand(start_F[first:stop], counts), np.repeat(piece_F[first:stop], counts)
        table = _put_together(pieces, piece_N, rows_N)
        yield _with_hashes(table, hashes, np.repeat(np.arange(first, stop), counts))
        first = stop


def _put_together(pieces: Sequence[Piece], piece_N: Numbers, rows_N: Numbers) -> pa.Table:
    """Return row `rows_N[i]` of piece `piece_N[i]` for each i."""
    numbers = np.unique(piece_N)
    tables = [pieces[number].take(rows_N[piece_N == number]) for number in numbers]
    if not tables:
        return INDEX.empty_table()
    table = pa.concat_tables(tables)
    order_N = np.concatenate([np.flatnonzero(piece_N == number) for number in numbers])
    if np.array_equal(order_N, np.arange(len(order_N))):
        return table
    place_N = np.empty_like(order_N)
    place_N[order_N] = np.arange(len(order_N))
    return table.combine_chunks().take(pa.array(place_N))


def _kept_hashes(compared: Comparison, wanted_F: Mask) -> dict[int, bytes]:
    """Return by file the content hashes of pictures that are known, though their captions are new."""
    known = compared.known
    wanted_F = wanted_F & (compared.place_F >= 0)
    place_G = compared.place_F[wanted_F]
    alike = (known.stamps_G4[place_G, :2] == stamps_of(compared.files)[wanted_F, :2]).all(axis=1)
    alike &= known.count_G[place_G] == 1
    numbers_F, place_G = np.flatnonzero(wanted_F)[alike], place_G[alike]
    kept: dict[int, bytes] = {}
    for number in np.unique(known.piece_G[place_G]):
        here = known.piece_G[place_G] == number
        hashes_N16 = hashes_of(known.pieces[number].columns(["content_hash"]))[known.start_G[place_G[here]]]
        kept.update(zip(numbers_F[here].tolist(), map(bytes, hashes_N16), strict=True))
    return kept


def _with_hashes(table: pa.Table, hashes: dict[int, bytes], file_N: Numbers) -> pa.Table:
    if not hashes:
        return table
    rows = [(row, hashes[file]) for row, file in enumerate(file_N.tolist()) if file in hashes]
    if not rows:
        return table
    hashes_N16 = hashes_of(table)
    hashes_N16[[row for row, _ in rows]] = np.frombuffer(b"".join(kept for _, kept in rows), np.uint8).reshape(
        len(rows), -1
    )
    return table.set_column(table.num_columns - 1, INDEX.field("content_hash"), column_of_hashes(hashes_N16))


def _expand(start_F: Numbers, count_F: Numbers) -> Numbers:
    """Return the numbers start, start + 1 ... of each file, one file after the other."""
    before_F = np.cumsum(count_F) - count_F
    rows_N: Numbers = np.repeat(start_F - before_F, count_F) + np.arange(count_F.sum())
    return rows_N


def _groups_in(piece: Piece) -> tuple[pa.Array, Numbers, Numbers, Numbers, Mask]:
    """Return of each file in a piece: name, first row, number of rows, stamps, whether one of its rows has a reason."""
    keys = piece.columns(["file", *STAMPS, "reason"]).combine_chunks()
    file = keys["file"]
    if not keys.num_rows:
        none = np.empty(0, np.int64)
        return pa.array([], pa.binary()), none, none, none.reshape(0, 4), none.astype(bool)
    changes = pc.not_equal(file.slice(1), file.slice(0, len(file) - 1)).to_numpy()
    start_G = np.concatenate([[0], np.flatnonzero(changes) + 1])
    count_G = np.diff(start_G, append=len(file))
    has_reason_G = np.logical_or.reduceat(keys["reason"].is_valid().to_numpy(), start_G)
    names = file if len(start_G) == len(file) else file.take(pa.array(start_G))
    return names.combine_chunks(), start_G, count_G, stamps_of(keys)[start_G], has_reason_G


def stamps_of(table: pa.Table) -> Numbers:
    """Return the stamps of files as int64 (N, 4)."""
    return np.stack([table[name].to_numpy() for name in STAMPS], axis=1)
