"""The tags of all pictures of a run as numbers: a column of the index, made from captions or the tags beside them.

A tag counts once a picture. Upper and lower case are the same tag, as they are to CLIP. Captions are split by Arrow,
slice by slice, so that a million pictures take seconds and no list of their tags as text.

Shape legend: P pictures, K tags, T appearances (a tag on a picture).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdxl_training.data.buckets import Integers
from sdxl_training.data.caption_weights import parse_weights
from sdxl_training.data.pictures import IndexedSource, Pictures, SourceRules, first_texts, joined_texts

ROWS_AT_ONCE = 2**16
TEXT = pa.large_string()
TEXTS = pa.large_list(TEXT)


@dataclass(frozen=True, eq=False)
class TagColumn:
    """Tags of pictures. names_K: in order, lower case. tag_T[offsets[p] : offsets[p + 1]]: picture p's, ascending."""

    names_K: Sequence[str]
    offsets: Integers
    tag_T: NDArray[np.int32]


def tag_column(pictures: Pictures, added: Sequence[Sequence[str]]) -> TagColumn:
    """Return the tags of all pictures. added: those that each source adds to its captions."""
    found: list[pa.DictionaryArray] = []
    parents: list[NDArray[np.int32]] = []
    before = 0
    for source, rows, own in zip(pictures.sources, pictures.rows, added, strict=True):
        for first in range(0, len(rows), ROWS_AT_ONCE):
            lists = _with_added(_lists_of(source, rows[first : first + ROWS_AT_ONCE]), _plain(own, source.rules))
            folded = pc.utf8_lower(pc.utf8_trim_whitespace(pc.list_flatten(lists)))
            kept = pc.greater(pc.binary_length(folded), 0)
            found.append(folded.filter(kept).dictionary_encode())
            parents.append(before + pc.list_parent_indices(lists).filter(kept).to_numpy().astype(np.int32))
            before += len(lists)
    parts = pa.chunked_array(found, pa.dictionary(pa.int32(), pa.large_string())).unify_dictionaries().chunks
    found.clear()
    pa.default_memory_pool().release_unused()  # else Arrow keeps what splitting took, and a million tags need 1 GB
    return _numbered(parts, parents, len(pictures))


def _numbered(parts: list[pa.DictionaryArray], parents: Sequence[NDArray[np.int32]], pictures: int) -> TagColumn:
    """Number the tags in their order, and count each once a picture.

    parts: appearances, of one dictionary; emptied, so that they do not stay in memory. parents: the picture of each
    appearance, ascending.
    """
    if not parts:
        return TagColumn((), np.zeros(pictures + 1, np.int64), np.empty(0, np.int32))
    names = parts[0].dictionary
    order_K = pc.sort_indices(names).to_numpy()
    number_K = np.empty(len(names), np.int64)
    number_K[order_K] = np.arange(len(names))
    length_P = np.zeros(pictures, np.int64)
    tag_T, filled = np.empty(sum(map(len, parts)), np.int32), 0
    for parent_T in parents:
        index_T = parts.pop(0).indices.to_numpy()
        both_T = parent_T.astype(np.int64) * len(names) + number_K[index_T]
        both_T.sort()  # np.unique takes ten times as long
        once_T = both_T[np.diff(both_T, prepend=-1) > 0]
        owner_T, tag_of_T = np.divmod(once_T, len(names))
        tag_T[filled : filled + len(once_T)] = tag_of_T
        filled += len(once_T)
        length_P += np.bincount(owner_T, minlength=pictures)
    offsets = np.concatenate([[0], np.cumsum(length_P)])
    return TagColumn(names.take(pa.array(order_K)).to_pylist(), offsets, tag_T[:filled])


def _lists_of(source: IndexedSource, rows: Integers) -> pa.LargeListArray:
    """Return the tags of these rows as they are written, blanks and empty ones included."""
    rules = source.rules
    captions, beside = (source.table[name].chunk(0).take(rows) for name in ("captions", "tags"))
    if rules.weights or (rules.lines and rules.kind == "tags"):
        own = source.plain_tags if rules.weights else source.tags
        return pa.array([own(row) for row in rows.tolist()], TEXTS)
    if rules.kind == "prose":
        return pc.fill_null(beside.cast(TEXTS), pa.scalar([], TEXTS))
    texts = pc.coalesce(first_texts(captions), joined_texts(beside, rules.separator), pa.scalar("", TEXT))
    return pc.split_pattern(texts, rules.separator).cast(TEXTS)


def _plain(tags: Sequence[str], rules: SourceRules) -> list[str]:
    """Return tags without emphasis, where brackets are that: what they hold together are several tags."""
    if not rules.weights:
        return list(tags)
    texts = ("".join(text for text, _ in parse_weights(tag)) for tag in tags)
    return [part for text in texts for part in text.split(rules.separator)]


def _with_added(lists: pa.LargeListArray, added: Sequence[str]) -> pa.LargeListArray:
    """Return the lists with further tags at the end of each."""
    if not added:
        return lists
    more = pa.array([list(added)], TEXTS).take(pa.array(np.zeros(len(lists), np.int64)))
    offsets = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    lengths = np.diff(offsets)
    # Row r's tags, then the added ones, whose values follow all of the lists'.
    places = np.arange(offsets[-1]) + len(added) * np.repeat(np.arange(len(lists)), lengths)
    order = np.empty(offsets[-1] + len(added) * len(lists), np.int64)
    order[places] = np.arange(offsets[-1])
    order[np.setdiff1d(np.arange(len(order)), places, assume_unique=True)] = offsets[-1] + np.arange(
        len(added) * len(lists)
    )
    values = pa.concat_arrays([pc.list_flatten(lists), pc.list_flatten(more)]).take(pa.array(order))
    new_offsets = offsets + len(added) * np.arange(len(lists) + 1)
    return pa.LargeListArray.from_arrays(pa.array(new_offsets), values)
