"""A run's folder: <output_dir>/<run_name>."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from sdxl_training.config.load import LoadedConfig, load_config, write_resolved
from sdxl_training.config.problems import ConfigError
from sdxl_training.config.schema import Config
from sdxl_training.data.claims import WITHOUT_LOCKS
from sdxl_training.records import Quarantined, UserError


@dataclass(frozen=True)
class RunFolder:
    """Where a run's files lie."""

    path: Path

    @property
    def resolved(self) -> Path:
        """The configuration with every value and its origin."""
        return self.path / "config.resolved.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def sample(self, step: int) -> Path:
        """Return the path of a step's preview grid."""
        return self.path / "samples" / f"step-{step:06d}.png"

    def make(self) -> None:
        """Create the folder; raises UserError where that cannot be done or nothing can be written in it."""
        probe = self.path / f".writable-{os.getpid()}"
        try:
            (self.path / "samples").mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"global_config.output_dir: the run's folder {self.path} cannot be written ({error.strerror}). "
                "Choose another output_dir, or mend its permissions."
            ) from error

    @contextmanager
    def held(self) -> Iterator[str]:
        """Keep other processes from training in this folder; raises UserError where one does. Ends with the process.

        On a file system without locks, as some network ones are, nobody can be kept out; yields a sentence that says
        so, else nothing.
        """
        said = ""
        with (self.path / ".lock").open("w") as lock:
            try:
                # Not flock: loader workers would inherit it, and outlive a killed trainer by seconds.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:  # lockf(3): either one
                raise UserError(
                    f"{self.path}: another process is training in this folder. Wait for it, stop it, or choose another "
                    "global_config.run_name."
                ) from error
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                said = f"{self.path}: the file system has no locks; do not train in this folder twice at once"
            yield said

    def write_config(self, loaded: LoadedConfig) -> list[str]:
        """Write the resolved configuration; return what differs from the one the run had before, one line a setting."""
        before = self._settings_before()
        temporary = self.resolved.with_suffix(".tmp")
        write_resolved(loaded, temporary)
        temporary.replace(self.resolved)
        now = _settings(loaded.config)
        names = sorted(before.keys() | now.keys()) if before else []
        return [
            f"{name}: {before.get(name, 'absent')} -> {now.get(name, 'absent')}"
            for name in names
            if before.get(name, "absent") != now.get(name, "absent")
        ]

    def _settings_before(self) -> dict[str, object]:
        """Return the settings of the run so far; none where the file is missing, damaged or of another version."""
        try:
            return _settings(load_config(self.resolved).config) if self.resolved.exists() else {}
        except ConfigError:
            return {}

    def write_quarantine(self, quarantined: Sequence[Quarantined]) -> Path:
        """Write quarantine.jsonl: one object with path and reason a line."""
        return self._write_lines("quarantine.jsonl", (json.dumps(asdict(entry)) for entry in quarantined))

    def write_duplicates(self, lines: Iterable[str]) -> Path:
        """Write duplicates.jsonl: a line for each group of pictures that are there several times."""
        return self._write_lines("duplicates.jsonl", lines)

    def _write_lines(self, name: str, lines: Iterable[str]) -> Path:
        path = self.path / name
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        return temporary.replace(path)


def run_folder(config: Config) -> RunFolder:
    """Return the folder that a configuration names."""
    return RunFolder(Path(config.global_config.output_dir).expanduser() / config.global_config.run_name)


def _settings(config: Config) -> dict[str, object]:
    """Return every setting by its dotted name."""

    def flat(value: object, name: str) -> dict[str, object]:
        if isinstance(value, dict):
            return {key: leaf for part, inner in value.items() for key, leaf in flat(inner, f"{name}.{part}").items()}
        return {name.removeprefix("."): value}

    return flat(config.model_dump(), "")
