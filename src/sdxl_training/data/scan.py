"""From source folders to picture records: names, headers, captions. Nothing is decoded and nothing is altered."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol, TypeVar

from sdxl_training.data.captions import split_alternatives, split_tags
from sdxl_training.data.images import UnreadablePicture, hash_content, read_file, read_size
from sdxl_training.data.index import FileKey, Header, read_index, write_index
from sdxl_training.records import ImageRecord, UserError

EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl"}
)
IGNORED_FOLDER = "__MACOSX"
EXAMPLES = 5
CHUNK = 1024  # files handed to the threads at a time
# A file changed twice within a clock tick keeps its time stamp; younger files are looked at again next time.
SETTLED_NS = 2_000_000_000

Item = TypeVar("Item")
Result = TypeVar("Result")


class Progress(Protocol):
    """Shows how far something is."""

    def track(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a bar of `total` items; the value yielded is called with the number of items just done."""


@dataclass(frozen=True, slots=True)
class Source:
    """A folder of pictures; each counts `repeats` times an epoch."""

    path: str
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class CaptionFiles:
    """Where captions are: beside the picture, same name, this extension. How they are read: as `CaptionRules` say.

    alternatives: whether a file is one caption or holds one a line.
    missing: what a picture without caption file means. `refuse`: an error; `empty`: an empty caption; `leave_out`: the
    picture does not take part.
    """

    extension: str = ".txt"
    separator: str = ","
    missing: Literal["refuse", "empty", "leave_out"] = "refuse"
    kind: Literal["tags", "prose"] = "tags"
    alternatives: Literal["none", "lines"] = "none"
    weights: bool = False

    def beside(self, picture: str) -> Path:
        """Return the path of the picture's caption file."""
        return Path(picture).with_suffix("." + self.extension.removeprefix("."))

    def parse(self, text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the captions in a file's text and the tags of the first; prose has none."""
        captions = split_alternatives(text) if self.alternatives == "lines" else (text,)
        return captions, split_tags(captions[0], self.separator, self.weights) if self.kind == "tags" else ()


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A file that cannot be used, and why; one line of quarantine.jsonl."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class ScanResult:
    """records: usable pictures, in order of source and path. left_out: paths of pictures without caption."""

    records: tuple[ImageRecord, ...]
    quarantined: tuple[Quarantined, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A file that is named like a picture."""

    source: int
    relative: str
    key: FileKey
    repeats: int

    @property
    def path(self) -> str:
        """Return the absolute path."""
        return self.key.path

    @property
    def sample_id(self) -> int:
        """Return 63 bits that stay the same when the source folder moves to another place or machine."""
        message = self.source.to_bytes(8, "little") + os.fsencode(self.relative)
        return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 1


def scan(sources: Sequence[Source], captions: CaptionFiles, index_path: Path, progress: Progress) -> ScanResult:
    """Find all pictures and their captions; only files that the index does not know are opened.

    Unusable files are returned as quarantined, with reason. Raises UserError for folders that are missing or hold no
    pictures, for missing captions where those are refused, and when no picture is readable.
    """
    files = _list_sources(sources)
    headers = _read_headers(files, index_path, [_root(source) for source in sources], progress)
    quarantined = [
        Quarantined(file.path, header.reason) for file, header in zip(files, headers, strict=True) if header.reason
    ]
    readable = [(file, header) for file, header in zip(files, headers, strict=True) if header.reason is None]
    if not readable:
        raise UserError(
            f"data.sources: none of the {len(files)} pictures can be read:\n{_listed(map(_line, quarantined))}\n"
            "Check that the files were copied completely."
        )
    records: list[ImageRecord] = []
    without: list[str] = []
    texts = _in_threads(
        lambda pair: _read_caption(captions.beside(pair[0].path)), readable, progress, "reading captions"
    )
    for (file, header), text in zip(readable, texts, strict=True):
        if isinstance(text, Quarantined):
            quarantined.append(Quarantined(file.path, text.reason))
        elif text is None and captions.missing != "empty":
            without.append(file.path)
        else:
            records.append(_record(file, header, *captions.parse(text or "")))
    if without and (captions.missing == "refuse" or not records):
        raise UserError(_no_captions(without, len(readable), captions))
    _refuse_collisions(records)
    return ScanResult(tuple(records), tuple(sorted(quarantined, key=lambda bad: bad.path)), tuple(without))


# Listing


def _root(source: Source) -> Path:
    return Path(source.path).expanduser().absolute()


def _list_sources(sources: Sequence[Source]) -> list[PictureFile]:
    """Return all files named like pictures; raises one UserError for all folders that cannot serve."""
    files: list[PictureFile] = []
    problems: list[str] = []
    for number, source in enumerate(sources):
        try:
            files += _list_pictures(number, source)
        except UserError as error:
            problems.append(f"data.sources.{number}.path = {source.path}: {error}")
        except OSError as error:
            problems.append(
                f"data.sources.{number}.path = {source.path}: {error.filename} cannot be listed ({error.strerror}). "
                "Make it readable."
            )
    if problems:
        raise UserError("\n".join(problems))
    return files


def _list_pictures(number: int, source: Source) -> list[PictureFile]:
    root = _root(source)
    if not root.is_dir():
        kind = "this is a file, not a folder" if root.exists() else "there is no such folder"
        raise UserError(f"{kind}. Give the folder that holds the pictures.")
    found = sorted(_walk(root, "", set()), key=lambda pair: pair[0])
    pictures = [
        PictureFile(
            number, relative, FileKey(entry.path, entry.stat().st_size, entry.stat().st_mtime_ns), source.repeats
        )
        for relative, entry in found
        if PurePosixPath(relative).suffix.lower() in EXTENSIONS
    ]
    if not pictures:
        raise UserError(f"{_found_instead(found)} Pictures end in {', '.join(sorted(EXTENSIONS))}.")
    return pictures


def _walk(folder: Path, prefix: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield (relative path, entry) of all files that are not hidden; linked folders are followed, each folder once."""
    stat = folder.stat()
    if (stat.st_dev, stat.st_ino) in seen:
        return
    seen.add((stat.st_dev, stat.st_ino))
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name != IGNORED_FOLDER]
    for entry in sorted(visible, key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", seen)
        elif entry.is_file():
            yield prefix + entry.name, entry


def _found_instead(found: Sequence[tuple[str, os.DirEntry[str]]]) -> str:
    if not found:
        return "the folder is empty."
    kinds = Counter(PurePosixPath(relative).suffix.lower() or "no extension" for relative, _ in found)
    return (
        "no picture in it, only " + ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(EXAMPLES)) + "."
    )


# Headers


def _read_headers(
    files: Sequence[PictureFile], index_path: Path, roots: Sequence[Path], progress: Progress
) -> list[Header]:
    """Return one header a file, from the index or from the file, and bring the index up to date."""
    indexed = read_index(index_path)
    unknown = list(dict.fromkeys(file.key for file in files if file.key not in indexed))
    looked_at = dict(zip(unknown, _in_threads(_look_at, unknown, progress, "scanning pictures"), strict=True))
    now = time.time_ns()
    settled = {
        key: header for key, header in looked_at.items() if header.content_hash and now - key.mtime_ns > SETTLED_NS
    }
    current = {file.key for file in files}
    # Entries of other folders stay: another configuration may share the cache.
    kept = {key: header for key, header in indexed.items() if key in current or not _inside(key.path, roots)}
    if settled or len(kept) < len(indexed):
        write_index(index_path, kept | settled)
    return [indexed[file.key] if file.key in indexed else looked_at[file.key] for file in files]


def _look_at(key: FileKey) -> Header:
    """Read one file. The hash stays empty where the bytes could not be had: that says nothing of the content."""
    content_hash = ""
    try:
        data = read_file(key.path)
        content_hash = hash_content(data)
        return Header(read_size(data, key.path), content_hash)
    except UnreadablePicture as error:
        return Header((0, 0), content_hash, error.reason)


def _inside(path: str, roots: Sequence[Path]) -> bool:
    return any(path.startswith(f"{root}{os.sep}") for root in roots)


def _in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], progress: Progress, description: str
) -> list[Result]:
    """Return `work` of every item, in order; the threads wait for files, so there may be more than cores."""
    results: list[Result] = []
    with ThreadPoolExecutor() as threads, progress.track(description, len(items)) as advance:
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            results += threads.map(work, chunk)
            advance(len(chunk))
    return results


# Captions


def _read_caption(path: Path) -> str | Quarantined | None:
    """Return the caption, None where there is no file, or why the file cannot be used."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        return Quarantined(str(path), f"its caption {path.name} is not UTF-8 text (byte {error.start})")
    except OSError as error:
        return Quarantined(str(path), f"its caption {path.name} cannot be read: {error.strerror}")


def _record(file: PictureFile, header: Header, captions: tuple[str, ...], tags: tuple[str, ...]) -> ImageRecord:
    return ImageRecord(
        sample_id=file.sample_id,
        path=file.path,
        size_hw=header.size_hw,
        content_hash=header.content_hash,
        captions=captions,
        tags=tags,
        repeats=file.repeats,
        source=file.source,
    )


def _no_captions(without: Sequence[str], readable: int, captions: CaptionFiles) -> str:
    first = captions.beside(without[0]).name
    who = f"{len(without)} of {readable} pictures have no caption"
    if len(without) == readable:
        who = f"none of the {readable} pictures has a caption"
    return (
        f"data.captions: {who}; it is a text file with the picture's name and the ending {captions.extension} "
        f"({first} for the first). Without:\n{_listed(without)}\n"
        "Add the files, correct data.captions.extension, or set data.captions.missing to empty (train them with an "
        "empty caption) or leave_out (train without them; some must remain)."
    )


def _refuse_collisions(records: Sequence[ImageRecord]) -> None:
    """Two pictures of one sample id would share their randomness. By chance: one in 10^7 at a million pictures."""
    path_of: dict[int, str] = {}
    for record in records:
        other = path_of.setdefault(record.sample_id, record.path)
        if other is not record.path:
            raise UserError(f"{other} and {record.path}: their names hash to one sample id. Rename one of them.")


def _line(bad: Quarantined) -> str:
    return f"{bad.path}: {bad.reason}"


def _listed(lines: Iterable[str]) -> str:
    """Return the first few lines, indented, and how many more there are."""
    rest = iter(lines)
    shown = [f"  {line}" for line in islice(rest, EXAMPLES)]
    more = sum(1 for _ in rest)
    return "\n".join(shown + ([f"  and {more} more"] if more else []))
