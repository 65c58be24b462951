"""Files by path or by address (s3://, gs://, hf:// ...): what there is, and ranges of their bytes. Nothing is written.

The only module that knows fsspec. Credentials come from the environment, as the service's own package reads them, and
are never shown. File systems are asked for by address each time and never kept: fsspec remembers them itself, a process
each, since their connections and threads do not survive a fork.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import os
import re
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import partial
from itertools import chain, product
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from fsspec.core import url_to_fs  # type: ignore[import-untyped, unused-ignore]

from sdxl_training.data.range_file import RangeFile
from sdxl_training.data.walk import IGNORED_FOLDER, hint_of
from sdxl_training.records import UserError

RETRY_SECONDS = (0.5, 2.0, 5.0)
EXAMPLES = 5
LISTED_AT_ONCE = 16
MOST_ALTERNATIVES = 100_000  # that braces may stand for
CHUNK = 8 << 20  # bytes asked for at a time where a file is read from beginning to end

# What a service's package raises beside OSError, where it is loaded.
FAILURES = (
    ("aiohttp", "ClientError"),
    ("azure.core.exceptions", "AzureError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx", "HTTPError"),
    ("paramiko.ssh_exception", "SSHException"),
)
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# What services call the time of the last change; what else changes with the content; last what may stay as it is.
TIMES = ("LastModified", "mtime", "last_modified", "updated", "modified")
DIGESTS = ("ETag", "etag", "blob_id", "checksum", "md5Hash", "content_md5", "created")

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
LOCAL = re.compile(r"(file|local)://")
WEB = re.compile(r"https?://")
# user:password@ before the host; also where the password has a "/" that should have been written %2F.
LOGIN = re.compile(r"(?<=://)(?:[^/@\s]*@|[^/@:\s]+:(?!\d+(?:/|\s|$))[^@\s]*@)")
QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\"]*")
BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
STARS = re.compile(r"[*?]")
HIDDEN = re.compile(rf"\.|{IGNORED_FOLDER.decode()}$")

Result = TypeVar("Result")
Found = tuple[str, int, int]  # path or address, size, mtime_ns


class ListedFile(NamedTuple):
    """A file: its name relative to `base_of`, its size, and when it was changed last.

    Where a service tells no time, mtime_ns is a digest of what it tells of the content, and 0 where it tells nothing.
    """

    name: bytes
    size: int
    mtime_ns: int


def is_address(path: str) -> bool:
    """Whether this is an address (scheme://...) rather than a path."""
    return ADDRESS.match(path) is not None


def shown(text: str) -> str:
    """Return an address, or a message that may hold one, without user, password and query."""
    return QUERY.sub(r"\1", LOGIN.sub("", text))


def base_of(root: str, suffixes: Sequence[str] = ()) -> str:
    """Return what the names in `list_files` are relative to; it ends in "/", so that base + name is a file's address.

    The spelling decides, no disk is asked. With "*", "?" or braces: the folder before the first of them. Where the root
    ends in one of the suffixes, file or folder: the folder around it. Otherwise it is the folder itself.
    """
    root = _absolute(root)
    wild = min((match.start() for match in (STARS.search(root), BRACES.search(root)) if match), default=None)
    if wild is not None:
        return root[: root.rfind("/", 0, wild) + 1]
    if suffixes and root.lower().endswith(tuple(suffixes)):
        return root[: root.rfind("/") + 1]
    return _as_folder(root)


def list_files(root: str, suffixes: Sequence[str] = (), serving: Sequence[str] = ()) -> list[ListedFile]:
    """Return the files of a folder, a pattern or a single name, sorted by name; only those that end in `suffixes`.

    Below a folder everything counts, linked folders too, but not what is hidden (".name") or __MACOSX. In patterns "*"
    and "?" stand for parts of one name, "**" for folders as well, {a,b} and {000..127} for names which all must be
    there; "[" is an ordinary character. suffixes: lower case; all files where there are none. serving: those that a
    message names, where not all. Raises UserError where the place is missing, empty or cannot be listed.
    """
    base = base_of(root, suffixes)
    if WEB.match(base) and (STARS.search(root) or base == _as_folder(root)):
        raise UserError("a web server has no list of its files. Give files, as in .../shard-{000..127}.tar.")
    places = _alternatives(_absolute(root))
    with ThreadPoolExecutor(LISTED_AT_ONCE) as threads:  # a service takes a tenth of a second for each
        listings = list(threads.map(_list_place, places))
    missing = [shown(place) for place, listing in zip(places, listings, strict=True) if listing is None]
    if missing:
        which = ", ".join(missing[:EXAMPLES]) + (" ..." if len(missing) > EXAMPLES else "")
        raise UserError(f"{len(missing)} of {len(places)} cannot be found: {which}. Correct the name or add the files.")
    found: dict[bytes, ListedFile] = {}
    others: list[str] = []
    for path, size, mtime_ns in chain.from_iterable(listing for listing in listings if listing is not None):
        if suffixes and not path.lower().endswith(tuple(suffixes)):
            others.append(path)
            continue
        name = path[len(base) :].encode("utf-8", "surrogateescape")
        found[name] = ListedFile(name, size, mtime_ns)
    if not found:
        raise UserError(_found_instead(others, serving or suffixes))
    return [found[name] for name in sorted(found)]


def stamps_of(place: str) -> tuple[int, int] | None:
    """Return size and mtime_ns, as in `ListedFile`, of the file at a path or an address; None where it is a folder.

    Raises OSError where it is missing or cannot be asked for, UserError for an address of a kind that is not read.
    """
    place = _absolute(place)
    if is_address(place):
        info = _patiently(lambda: _info(place))
        return None if info["type"] == "directory" else (_size(info), _changed(info))
    status = Path(place).stat()
    return None if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)


def read_range(address: str, start: int, length: int) -> bytes:
    """Return `length` bytes from `start` of the file at a path or an address.

    Failures that may pass are retried after pauses. Raises OSError, with errno and without credentials in its text,
    where the file is missing, forbidden, fails for good, or ends before; UserError where a package is missing.
    """
    if length == 0:
        return b""
    data = _patiently(lambda: _read(address, start, length))
    if len(data) != length:
        raise OSError(errno.EIO, f"{len(data)} bytes came where {length} were asked for: the file has changed")
    return data


def open_seekable(address: str, chunk: int = CHUNK) -> BinaryIO:
    """Open a file at a path or an address for reading in any order; a remote one is read `chunk` bytes at a time.

    Raises what `read_range` raises, then and while it is read. Such a file does not travel to another process.
    """
    if not _is_remote(address):
        return _patiently(lambda: Path(LOCAL.sub("", address)).open("rb"))
    size = _patiently(lambda: _size(_info(address)))
    return io.BufferedReader(RangeFile(partial(read_range, address), size), chunk)


# Places


def _absolute(root: str) -> str:
    """Return an address as it is, a path as an absolute one; a "/" at the end stays."""
    if not is_address(root):
        path = str(Path(root).expanduser().absolute())
        return f"{path}/" if root.endswith("/") and path != "/" else path
    if LOCAL.match(root):
        return _absolute(LOCAL.sub("", root))
    if "::" in root:
        raise UserError('chained addresses ("::") are not read. Give the address of the files themselves.')
    if WEB.match(root) and "?" in root:
        raise UserError('a web address with a query ("?") is not read: it may hold a password. Give one without.')
    return root


def _is_remote(place: str) -> bool:
    return is_address(place) and not LOCAL.match(place)


def _alternatives(root: str) -> list[str]:
    """Return the places that braces stand for, in order: {a,b} as it says, {08..10} with leading zeros kept."""
    parts = BRACES.split(root)
    options = [_options(part) if i % 2 else [part] for i, part in enumerate(parts)]
    count = prod(map(len, options))
    if count > MOST_ALTERNATIVES:
        raise UserError(f"its braces stand for {count} files; at most {MOST_ALTERNATIVES}. Give a folder or a pattern.")
    return ["".join(choice) for choice in product(*options)]


def _options(braces: str) -> list[str]:
    span = RANGE.fullmatch(braces)
    if span is None:
        return braces.split(",")
    first, last = int(span[1]), int(span[2])
    if last < first or last - first >= MOST_ALTERNATIVES:
        raise UserError(f"{{{braces}}}: from a number up to a larger one, at most {MOST_ALTERNATIVES}. Correct it.")
    return [str(number).zfill(len(span[1])) for number in range(first, last + 1)]


def _list_place(place: str) -> list[Found] | None:
    """Return all files of a folder, a pattern with stars, or of one file; None where it does not exist."""
    try:
        return list(_files_at(place))
    except FileNotFoundError:
        return None
    except OSError as error:
        remedy = "Credentials come from the environment." if is_address(place) else "Make it readable."
        raise UserError(
            f"{shown(str(error.filename or place))} cannot be listed ({shown(_text(error))}). {remedy}"
        ) from None


def _files_at(place: str) -> Iterator[Found]:
    star = STARS.search(place)
    if star:
        folder = place[: place.rfind("/", 0, star.start()) + 1]
        pattern = place[len(folder) :]
        matches = re.compile(_as_regex(pattern), re.DOTALL).fullmatch
        depth = None if "**" in pattern else pattern.count("/") + 1
        yield from (file for file in _below(folder, depth) if matches(file[0][len(folder) :]))
        return
    stamps = stamps_of(place)
    if stamps is None:
        yield from _below(_as_folder(place), None)
    else:
        yield place, *stamps


def _as_folder(place: str) -> str:
    return place if place.endswith("/") else f"{place}/"


def _as_regex(pattern: str) -> str:
    meaning = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return "".join(meaning.get(part) or re.escape(part) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))


def _below(folder: str, depth: int | None) -> Iterator[Found]:
    """Yield all files below a folder that ends in "/", at most `depth` levels down."""
    yield from _below_address(folder, depth) if is_address(folder) else _below_path(folder, depth, set())


def _below_path(folder: str, depth: int | None, seen: set[tuple[int, int]]) -> Iterator[Found]:
    """Linked folders are followed, each folder once."""
    status = Path(folder).stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not HIDDEN.match(entry.name)]
    for entry in sorted(visible, key=lambda entry: entry.name):
        if entry.is_dir():
            if depth is None or depth > 1:
                yield from _below_path(f"{entry.path}/", depth and depth - 1, seen)
        elif entry.is_file():
            yield entry.path, entry.stat().st_size, entry.stat().st_mtime_ns


def _below_address(folder: str, depth: int | None) -> Iterator[Found]:
    def find() -> tuple[str, dict[str, dict[str, Any]]]:
        system, path = _file_system(folder)
        system.invalidate_cache()
        return path, system.find(path, maxdepth=depth, detail=True)

    path, found = _patiently(find)
    prefix = f"{path.rstrip('/')}/"
    for name, info in found.items():
        relative = name.removeprefix(prefix)
        if relative == name:
            raise OSError(errno.EIO, f"a file outside of the folder is listed: {name}")
        if info["type"] != "directory" and not any(map(HIDDEN.match, relative.split("/"))):
            yield folder + relative, _size(info), _changed(info)


# What a service tells of a file


def _file_system(address: str) -> tuple[Any, str]:
    """Return this process's file system for an address, and the address as that one spells it."""
    scheme = address.partition("://")[0]
    if "::" in address:  # fsspec would cut it there, and read another file
        raise PermissionError(errno.EPERM, 'names with "::" are not read')
    try:
        return cast("tuple[Any, str]", url_to_fs(address))
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or scheme
        raise UserError(
            f"{scheme}:// addresses are read by a package that is not installed: pip install {package}"
        ) from error
    except ValueError as error:
        raise UserError(f"the address cannot be read: {shown(str(error))}. Correct it.") from None


def _info(address: str) -> Mapping[str, Any]:
    system, path = _file_system(address)
    return cast("Mapping[str, Any]", system.info(path))


def _size(info: Mapping[str, Any]) -> int:
    size = info.get("size")
    if size is None:
        raise OSError(errno.EIO, "the server does not tell how large the file is")
    return int(size)


def _changed(info: Mapping[str, Any]) -> int:
    """Return when a file was changed, in ns, or a number that differs when its content does; see ListedFile."""
    value = next((info[key] for key in (*TIMES, *DIGESTS) if info.get(key)), None)
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
    if isinstance(value, int | float):
        # Microseconds: one backend tells the same time as a date or as a float, and a float holds no more.
        return round(value * 1e6) * 1000
    if value is None:
        return 0
    digest = hashlib.blake2b(str(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 4  # below 2^60 ns, which is 2006: never taken for a change just now


def _read(address: str, start: int, length: int) -> bytes:
    if not _is_remote(address):
        with Path(LOCAL.sub("", address)).open("rb") as file:
            file.seek(start)
            return file.read(length)
    system, path = _file_system(address)
    # Those that are not asynchronous read through a file object, whose buffer would fetch megabytes ahead.
    options = {} if system.async_impl else {"cache_type": "none"}
    return bytes(system.cat_file(path, start=start, end=start + length, **options))


# Failures


def _patiently(call: Callable[[], Result]) -> Result:
    """Return what `call` returns, after a pause where it fails; a failure for good is an OSError of ours."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return call()
        except _failures() as error:
            kind = next((kind for kind in PERMANENT if isinstance(error, kind)), OSError)
            if pause is None or kind is not OSError:
                # Not chained: the service's own message may hold what ours must not.
                raise kind(errno.EIO, shown(_text(error))) from None
        time.sleep(pause)
    raise AssertionError("unreachable")


def _failures() -> tuple[type[Exception], ...]:
    known = (getattr(sys.modules.get(module), name, None) for module, name in FAILURES)
    return (OSError, asyncio.TimeoutError, *(kind for kind in known if kind is not None))


def _text(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error) or "no reason is given"
    return f"{type(error).__name__}: {error}"


def _found_instead(others: Sequence[str], suffixes: Sequence[str]) -> str:
    wanted = f"Names must end in {' or '.join(suffixes)}." if suffixes else "Add files or correct the path."
    kinds = Counter(PurePosixPath(name).suffix.lower() or "no extension" for name in others)
    if not kinds:
        return f"nothing is there. {wanted}"
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(EXAMPLES))
    return f"nothing that serves is there, only {listed}. {wanted}{hint_of(kinds.keys() - set(suffixes))}"
