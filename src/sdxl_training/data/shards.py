"""Shard files of the latent cache: safetensors named by their content, each with a manifest that is written last.

A shard without manifest does not exist; a shard that does not match its manifest's checksum is damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
from torch import Tensor

from sdxl_training.data.index import write_atomically
from sdxl_training.records import UserError

SHARD_BYTES = 256 * 2**20
MANIFEST_NAME = re.compile(r"[a-z0-9]+-[0-9a-f]{16}\.json")
Posterior = Literal["sample", "mean"]


class Origin(NamedTuple):
    """What a stored latent was made from; tells why another one is needed now."""

    sample_id: int
    content_hash: str
    plan: str


class Stamp(NamedTuple):
    """What changes on disk whenever a file's content does: a cheap reason to trust or to check it."""

    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Return the file's stamp now."""
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a shard file holds, its checksum, and its stamp when the checksum was last known to be right."""

    path: Path
    posterior: Posterior
    checksum: str
    stamp: Stamp
    entries: dict[str, Origin]

    @property
    def shard(self) -> Path:
        """Return the path of the safetensors file."""
        return self.path.with_suffix(".safetensors")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest; raises KeyError, TypeError or ValueError where it is none."""
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        entries = {key: Origin(*origin) for key, origin in content["entries"].items()}
        return cls(path, content["posterior"], content["blake2b"], Stamp(*content["stamp"]), entries)

    def write(self) -> None:
        """Write the manifest, which makes the shard exist; raises UserError where the folder cannot be written."""
        content = {
            "posterior": self.posterior,
            "blake2b": self.checksum,
            "stamp": self.stamp,
            "entries": self.entries,
        }
        write_atomically(self.path, json.dumps(content).encode())

    def damage(self) -> str | None:
        """Return what is wrong with the shard file, or None. Reads the file only where its stamp has changed."""
        if not self.shard.exists():
            return "is missing"
        stamp = Stamp.of(self.shard)
        if stamp == self.stamp:
            return None
        if stamp.size != self.stamp.size:
            return f"has {stamp.size} bytes instead of {self.stamp.size}"
        if _checksum(self.shard.read_bytes()) != self.checksum:
            return "does not match its checksum"
        with contextlib.suppress(UserError):  # a cache that is only readable is checked on every start
            replace(self, stamp=stamp).write()
        return None


def list_manifests(folder: Path) -> Iterator[Path]:
    """Yield the manifests in a folder, in order. Files with other names are somebody else's and left alone."""
    yield from (path for path in sorted(folder.glob("*.json")) if MANIFEST_NAME.fullmatch(path.name))


class ShardWriter:
    """Collects latents in memory and writes them as shards; leaving it writes what is complete, also on an interrupt.

    `writer` keeps the shards of concurrent ranks apart.
    """

    def __init__(self, folder: Path, posterior: Posterior, writer: str, shard_bytes: int = SHARD_BYTES):
        self._folder = folder
        self._posterior: Posterior = posterior
        self._writer = writer
        self._shard_bytes = shard_bytes
        self._clear()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()

    def _clear(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._entries: dict[str, Origin] = {}
        self._bytes = 0

    def add(self, key: str, origin: Origin, mean_CHW: Tensor, std_CHW: Tensor) -> None:
        """Take one latent in fp16; a shard that has become full is written."""
        size = 2 * mean_CHW.numel() * (2 if self._posterior == "sample" else 1)
        if self._bytes + size > self._shard_bytes:
            self.flush()
        self._tensors[f"{key}.mean"] = mean_CHW.clone()
        if self._posterior == "sample":
            self._tensors[f"{key}.std"] = std_CHW.clone()
        self._entries[key] = origin
        self._bytes += size

    def flush(self) -> None:
        """Write a shard, then its manifest; raises UserError when the disk is full or not writable."""
        if not self._entries:
            return
        payload = safetensors.torch.save(self._tensors)
        checksum = _checksum(payload)
        manifest_path = self._folder / f"{self._writer}-{checksum[:16]}.json"
        shard = manifest_path.with_suffix(".safetensors")
        write_atomically(shard, payload)
        Manifest(manifest_path, self._posterior, checksum, Stamp.of(shard), self._entries).write()
        self._clear()


def _checksum(payload: bytes) -> str:
    return hashlib.blake2b(payload, digest_size=32).hexdigest()
