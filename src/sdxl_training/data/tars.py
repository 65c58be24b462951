"""Pictures in tar files, as WebDataset packs them: 000.jpg, 000.txt, 000.json make one sample. Read in place.

Python's tarfile takes damage in the middle for the end, so headers are read here: blocks of 512 bytes, after
POSIX.1-1988 (ustar), POSIX.1-2001 (pax) and GNU tar. Names stay bytes.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import fsdecode
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from sdxl_training.data.decoding import PictureHeader, UnreadablePicture, read_header
from sdxl_training.data.listing import FILES, PICTURES, pictures_of
from sdxl_training.data.quick_headers import AT_FIRST, parse_start
from sdxl_training.data.range_file import RangeFile
from sdxl_training.data.remote import base_of, list_files, open_seekable, read_range, shown
from sdxl_training.data.sidecars import read_caption_file
from sdxl_training.data.walk import EXTENSIONS, IGNORED_FOLDER
from sdxl_training.records import UserError

PLAIN = (".tar",)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
UNPACK = "it is compressed, so no picture can be read without all before it; unpack it to a plain .tar"
JSON = ".json"
BLOCK = 512
WINDOW = 16 << 10  # bytes of a picture fetched at a time
MAX_TEXT = 1 << 20  # bytes of a caption, or of a member's own header
KINDS_SHOWN = 5

# Types of members, one byte of their headers.
REGULAR, LINKS, WITHOUT_CONTENT = (b"0", b"\0", b"7"), (b"1", b"2"), (b"1", b"2", b"3", b"4", b"5", b"6")
LONG_NAME, PAX, SPARSE = b"L", b"x", b"S"
FOR_OTHERS = (b"K", b"g")  # the target of a link; what holds for all members


@dataclass(frozen=True, slots=True)
class TarSource:
    """Pictures in one .tar, in those of a folder, or in those of a pattern: shard-{0000..0127}.tar.

    address: a path or an address. caption_extension: of the member with a picture's caption; where a picture has none,
    its .json counts. Members of one sample share the name up to its first dot.
    """

    address: str
    caption_extension: str = ".txt"

    @property
    def identity(self) -> str:
        """Return the source's place and settings as text."""
        place = {"base": shown(self._base), "address": shown(self.address)}
        return json.dumps({"kind": "tar", **place, "captions": self._extension})

    def list_files(self) -> pa.Table:
        """Return the tars there are, schema FILES. Raises UserError where there is none or none can be read."""
        files = list_files(self.address, PLAIN + COMPRESSED, serving=PLAIN)
        if all(_is_compressed(file.name) for file in files):
            raise UserError(f"{fsdecode(files[0].name)}: {UNPACK}.")
        names, sizes, times = zip(*files, strict=True)
        nothing = [-1] * len(files)
        return pa.Table.from_arrays(
            [pa.array(column) for column in (names, sizes, times, nothing, nothing)], schema=FILES
        )

    def look(self, files: pa.Table) -> pa.Table:
        """Return the pictures in these tars, schema PICTURES; of a damaged tar those before the damage, and a reason.

        Each tar is read once, in one direction. A tar that could not be read to its end because of the disk or the
        network is one row whose length is -1: nothing of it is known, and it should be looked at again.
        """
        tables = [self._look_at(name) for name in files.column("file").to_pylist()]
        return pa.concat_tables([PICTURES.empty_table(), *tables])

    def read(self, file: str, start: int, length: int) -> bytes:
        """Return a picture's bytes. Raises UnreadablePicture where they cannot be had."""
        try:
            return read_range(self._base + file, start, length)
        except OSError as error:
            raise UnreadablePicture(self.path(file), f"the file cannot be read: {error.strerror}") from error

    def path(self, name: str) -> str:
        """Return the path or address of a tar, or of a picture as if its tar were a folder."""
        return shown(self._base) + name

    @property
    def _base(self) -> str:
        return base_of(self.address, PLAIN + COMPRESSED)

    @property
    def _extension(self) -> str:
        return "." + self.caption_extension.removeprefix(".").lower()

    def _look_at(self, tar: bytes) -> pa.Table:
        if _is_compressed(tar):
            return pictures_of([_unusable(tar, tar, UNPACK)])
        try:
            with open_seekable(self._base + fsdecode(tar)) as file:
                contents = read_contents(file, self._extension, self.path(fsdecode(tar)))
        except OSError as error:
            return pictures_of([_unusable(tar, tar, f"the file cannot be read: {error.strerror}") | {"length": -1}])
        return pictures_of(list(contents.rows(tar)))


class Member(NamedTuple):
    """A file in a tar and where its content lies; `problem` says why that cannot be used."""

    name: bytes
    start: int
    length: int
    problem: str | None = None


class DamagedTar(Exception):  # noqa: N818 - a state of the file
    """From here on a tar cannot be read; the message says why."""


@dataclass(slots=True)
class Contents:
    """What a tar holds. Sample names and member names lack a leading "./".

    pictures: member -> its header, or why it cannot be used. captions: sample -> what it says as columns of PICTURES,
    or why it cannot be used. problems: why the tar as a whole, or a part, cannot be used.
    """

    pictures: dict[bytes, tuple[Member, PictureHeader | str]] = field(default_factory=dict)
    captions: dict[bytes, Caption] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def rows(self, tar: bytes) -> Iterator[dict[str, object]]:
        """Yield rows of PICTURES: the pictures in order, then one row for the tar where something is wrong with it."""
        for member, header in self.pictures.values():
            caption = self.captions.get(_sample(member.name)[0])
            row: dict[str, object] = {"file": tar, "name": tar + b"/" + member.name}
            row |= {"start": member.start, "length": member.length, "height": 0, "width": 0}
            problem = header if isinstance(header, str) else caption.problem if caption else None
            if problem is not None or isinstance(header, str):
                yield row | {"reason": problem}
                continue
            row["height"], row["width"] = header.size_hw
            row |= {"orientation": header.orientation, "mode": header.mode, "format": header.format}
            yield row | dict(caption.columns if caption else {})
        if self.problems:
            yield _unusable(tar, tar, "; ".join(self.problems))


@dataclass(frozen=True, slots=True)
class Caption:
    """A sample's caption. rank: which member it is from; the lowest counts."""

    rank: int
    columns: Mapping[str, object] = field(default_factory=dict)
    problem: str | None = None


def read_contents(file: BinaryIO, caption_extension: str, path: str) -> Contents:
    """Read an open tar once from its beginning to its end, of pictures only the headers.

    caption_extension: begins with a dot, lower case. Raises OSError where the file cannot be read; damage is among the
    contents' problems.
    """
    contents = Contents()
    ranks = {extension: rank for rank, extension in enumerate(dict.fromkeys((caption_extension, JSON)))}
    others: Counter[str] = Counter()
    masks: list[bytes] = []
    try:
        for member in members(file):
            member = member._replace(name=_plain(member.name))
            if _is_hidden(member.name):
                continue
            sample, extension = _sample(member.name)
            if extension in EXTENSIONS:
                _add_picture(contents, member, file, path)
            elif extension in ranks:
                caption = _caption(member, file, ranks[extension])
                contents.captions[sample] = _better(contents.captions.get(sample), caption)
            elif "." + extension.rpartition(".")[2] in EXTENSIONS:
                masks.append(member.name)
            else:
                others[extension or "no extension"] += 1
    except DamagedTar as error:
        contents.problems.append(str(error))
    if masks:
        contents.problems.append(
            f"{len(masks)} pictures such as {fsdecode(masks[0])} are left out: behind a name with two dots is not the "
            "picture of a sample but another of its fields. If it is one, rename it"
        )
    if not contents.pictures and not contents.problems:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in others.most_common(KINDS_SHOWN))
        contents.problems.append(f"no picture in it, only {kinds}" if kinds else "no picture in it")
    return contents


def _add_picture(contents: Contents, member: Member, file: BinaryIO, path: str) -> None:
    if member.name in contents.pictures:
        first, _ = contents.pictures[member.name]
        contents.pictures[member.name] = first, "its name stands in the tar more than once; rename one of them"
        return
    contents.pictures[member.name] = member, member.problem or _header(member, file, path)


def _header(member: Member, file: BinaryIO, path: str) -> PictureHeader | str:
    """Return a picture's header, or why it is none."""
    quick = parse_start(_read_at(file, member.start, min(member.length, AT_FIRST)))
    if quick is not None:
        return quick
    window = RangeFile(lambda at, length: _read_at(file, member.start + at, length), member.length)
    try:
        return read_header(io.BufferedReader(window, WINDOW), path)
    except UnreadablePicture as error:
        return error.reason


def _caption(member: Member, file: BinaryIO, rank: int) -> Caption:
    name = fsdecode(member.name)
    if member.problem:
        return Caption(rank, problem=f"its caption {name}: {member.problem}")
    if member.length > MAX_TEXT:
        return Caption(rank, problem=f"its caption {name} has {member.length} bytes; at most {MAX_TEXT} are read")
    try:
        sidecar = read_caption_file(_read_at(file, member.start, member.length), name)
    except ValueError as error:
        return Caption(rank, problem=str(error))
    columns = {"captions": sidecar.captions or None, "tags": sidecar.tags or None, "focus": sidecar.focus}
    return Caption(rank, columns)


def _better(known: Caption | None, other: Caption) -> Caption:
    if known is None or other.rank < known.rank:
        return other
    if other.rank == known.rank:
        return Caption(known.rank, problem="it has more than one caption of this kind; rename or remove one")
    return known


def _unusable(tar: bytes, name: bytes, reason: str) -> dict[str, object]:
    return {"file": tar, "name": name, "start": 0, "length": 0, "height": 0, "width": 0, "reason": reason}


# Names


def _is_compressed(name: bytes) -> bool:
    return fsdecode(name).lower().endswith(COMPRESSED)


def _plain(name: bytes) -> bytes:
    while name.startswith(b"./"):
        name = name[2:].lstrip(b"/")
    return name


def _is_hidden(name: bytes) -> bool:
    """Whether a name is one that a folder's pictures may not have either; "._x" is what macOS adds to tars."""
    return name.startswith(b".") or b"/." in name or IGNORED_FOLDER in name.split(b"/")


def _sample(name: bytes) -> tuple[bytes, str]:
    """Return the sample a member belongs to, and the rest of its name from the first dot on, lower case."""
    folder, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    return folder + slash + stem, fsdecode(dot + extension).lower()


# The format


def members(file: BinaryIO) -> Iterator[Member]:
    """Yield the files and links of a tar, in order; folders and devices are stepped over.

    Raises DamagedTar where it does not go on, OSError where the file cannot be read.
    """
    end = file.seek(0, io.SEEK_END)
    at = 0
    last = b""
    long_name: bytes | None = None
    extended: dict[bytes, bytes] = {}
    while True:
        head = _head(file, at, last)
        if head is None:
            at = _behind_zeros(file, at)
            if at == end:
                return
            continue
        kind = head[156:157]
        name = extended.get(b"path", long_name) or _name(head)
        try:
            length = int(extended[b"size"]) if b"size" in extended else _number(head[124:136])
            if length < 0:
                raise ValueError("a negative size")
        except ValueError as error:
            raise DamagedTar(_damaged(at, last)) from error
        if kind == SPARSE or any(key.startswith(b"GNU.sparse") for key in extended):
            raise DamagedTar(
                f"{fsdecode(name)} is packed as a sparse file; from there on nothing is read. Pack it anew"
            )
        start = at + BLOCK
        at = start + (0 if kind in WITHOUT_CONTENT else -(-length // BLOCK) * BLOCK)
        if start + length > end and kind not in WITHOUT_CONTENT:
            raise DamagedTar(f"it is cut off in {fsdecode(name)}; the pictures behind are missing. Copy it anew")
        if kind in (LONG_NAME, PAX):
            if length > MAX_TEXT:
                raise DamagedTar(_damaged(start - BLOCK, last))
            content = _read_at(file, start, length)
            if kind == LONG_NAME:
                long_name = content.split(b"\0", 1)[0]
            else:
                extended = _pax(content)
            continue
        if kind in FOR_OTHERS:
            continue
        if kind in REGULAR and not name.endswith(b"/"):
            yield Member(name, start, length)
        elif kind in LINKS:
            yield Member(name, start, 0, "it is only a link in the tar; pack what it points to (tar --dereference)")
        last, long_name, extended = name, None, {}


def _head(file: BinaryIO, at: int, last: bytes) -> bytes | None:
    """Return the header block at an offset; None at the end. `last`: the member before, for messages."""
    head = _read_at(file, at, BLOCK)
    if at == 0 and head.startswith(COMPRESSED_STARTS):
        raise DamagedTar(UNPACK)
    if not head:
        raise DamagedTar(
            "it is empty"
            if at == 0
            else f"it has no end mark: what was behind {fsdecode(last)} is missing. Copy it anew"
        )
    if len(head) < BLOCK:
        raise DamagedTar(f"it is cut off behind {fsdecode(last)}. Copy it anew" if at else "it is no tar")
    if not head.strip(b"\0"):
        return None
    given = head[148:156]
    try:
        claimed = _number(given)
    except ValueError as error:
        raise DamagedTar(_damaged(at, last)) from error
    if sum(head) - sum(given) + 8 * ord(" ") != claimed:
        raise DamagedTar(_damaged(at, last))
    return head


def _behind_zeros(file: BinaryIO, at: int) -> int:
    """Return where the next block is that is not empty, or the end: tars may have been joined."""
    while chunk := _read_at(file, at, MAX_TEXT):
        rest = len(chunk.lstrip(b"\0"))
        if rest:
            return at + (len(chunk) - rest) // BLOCK * BLOCK
        at += len(chunk)
    return at


def _read_at(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _damaged(at: int, last: bytes) -> str:
    if at == 0:
        return "it is no tar"
    return f"it is damaged behind {fsdecode(last)} (byte {at}); the pictures from there on are missing. Copy it anew"


def _name(head: bytes) -> bytes:
    name = head[:100].split(b"\0", 1)[0]
    prefix = head[345:500].split(b"\0", 1)[0] if head[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(digits: bytes) -> int:
    """Return a number written in octal, or in GNU tar's way for larger ones: a first byte of 0x80, then binary."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    return int(digits.split(b"\0", 1)[0].strip() or b"0", 8)


def _pax(content: bytes) -> dict[bytes, bytes]:
    """Return the records of an extended header: each "<length> <key>=<value>\\n", the length that of all of it."""
    records: dict[bytes, bytes] = {}
    while content.strip(b"\0"):
        digits = content.partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) < length <= len(content):
            raise DamagedTar("a member's extended header is damaged; from there on nothing is read. Pack it anew")
        key, _, value = content[len(digits) + 1 : length - 1].partition(b"=")
        records[key] = value
        content = content[length:]
    return records
