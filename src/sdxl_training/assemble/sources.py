"""From the configured sources to pictures: which kind of place each is, its index, what a run makes of it."""

from __future__ import annotations

import os
from pathlib import Path

from sdxl_training.config.data import Source, source_kind
from sdxl_training.config.schema import Config, cache_folder
from sdxl_training.data.filters import Filter
from sdxl_training.data.focus_boxes import with_bad_boxes
from sdxl_training.data.folders import FolderSource
from sdxl_training.data.known_contents import KnownContents
from sdxl_training.data.listing import PictureSource
from sdxl_training.data.parquet_source import ParquetSource
from sdxl_training.data.picture_index import update_index
from sdxl_training.data.pictures import IndexedSource, Pictures, SourceRules
from sdxl_training.data.remote import is_address, shown
from sdxl_training.data.remote_folders import AddressSource
from sdxl_training.data.tables import TableSource
from sdxl_training.data.tars import TarSource
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import Progress

INDEX_FOLDER = "index"
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of the table in a folder of pictures, as data sets are published."""


def open_pictures(config: Config, progress: Progress) -> tuple[Pictures, KnownContents]:
    """List every source, look at what is new, and return the usable pictures and what is known of their bytes.

    Raises UserError where the cache folder cannot be written, and one for all sources that cannot serve.
    """
    folder = _make_index_folder(config)
    opened: list[IndexedSource] = []
    problems: list[str] = []
    for number, described in enumerate(config.data.sources):
        try:
            source = open_source(described, config)
            table = update_index(folder, source, progress, session=session_name())
        except UserError as error:
            problems.append(f"data.sources.{number}.path = {shown(described.path)}: {error}")
        else:
            if config.data.crop.position == "focus":
                table = with_bad_boxes(table)
            opened.append(IndexedSource(source, source_rules(described, config), table))
    if problems:
        raise UserError("\n".join(problems))
    pictures = Pictures(opened)
    return pictures, KnownContents(folder, pictures)


def _make_index_folder(config: Config) -> Path:
    """Create the folder of indexes; raises UserError where that cannot be done or nothing can be written in it."""
    folder = Path(cache_folder(config)) / INDEX_FOLDER
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # a process of another machine may have this number, too
    except OSError as error:
        given = config.data.cache.path or "null, that is <output_dir>/cache"
        raise UserError(
            f"data.cache.path = {given}: the cache's folder {folder} cannot be written ({error.strerror}). Give a "
            "folder that can be written, or mend its permissions."
        ) from error
    return folder


def open_source(described: Source, config: Config) -> PictureSource:
    """Return the source that a part of the configuration describes. Raises UserError where there is none."""
    extension, columns = config.data.captions.extension, described.columns
    kind = source_kind(described)
    if kind == "tar":
        return TarSource(described.path, extension)
    if kind == "parquet":
        return ParquetSource(described.path, columns.image, columns.captions or None, columns.tags)
    folder = (AddressSource if is_address(described.path) else FolderSource)(described.path, extension)
    if described.table is not None:
        return TableSource(folder, described.table, columns.image, columns.captions, columns.tags)
    if columns.image or columns.captions or columns.tags:
        raise UserError("this is a folder of pictures, which has no columns. Name its table, or take columns out.")
    return folder


def session_name() -> str:
    """Return what the processes of one start on this machine have in common, so that all see the same pictures.

    Empty for a process alone: its next start from the same shell must look again.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ""
    # In a container the launcher has the same number at every start: only with its time of birth is it one of its kind.
    return f"{os.getppid()} {_birth_of(os.getppid())} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _birth_of(process: int) -> str:
    """Return when the machine and this process on it were started; with it the process' number is unique."""
    boot, status = Path("/proc/sys/kernel/random/boot_id"), Path(f"/proc/{process}/stat")
    if not (boot.is_file() and status.is_file()):  # no Linux
        return ""
    return f"{boot.read_text().strip()} {status.read_text().rpartition(')')[2].split()[19]}"


def source_rules(described: Source, config: Config) -> SourceRules:
    """Return what a run makes of a source."""
    captions, only = config.data.captions, described.only
    return SourceRules(
        repeats=described.repeats,
        weight=described.weight,
        separator=captions.separator,
        kind=captions.kind,
        weights=captions.weights,
        lines=captions.alternatives == "lines",
        missing=captions.missing,
        captions_are=captions_are(described, captions.extension),
        only=Filter(only.names, only.except_names, only.any_tag, only.no_tag, only.min_side_px),
    )


def captions_are(described: Source, extension: str) -> str:
    """Return where the captions of a source are looked for, as part of a sentence."""
    kind = source_kind(described)
    if kind == "tar":
        return f"it is the member with the picture's name and the ending {extension} or .json"
    if kind == "parquet" or described.table is not None:
        return "it is in the columns that data.sources[].columns.captions names"
    told = f"it is the file with the picture's name and the ending {extension}"
    if is_address(described.path):
        return told
    tables = [name for name in TABLES if (Path(described.path).expanduser() / name).is_file()]
    return told + "".join(f"; to read those in {name}, set data.sources[].table: {name}" for name in tables[:1])
