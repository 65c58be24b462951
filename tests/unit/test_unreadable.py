"""A picture that cannot be read: is it this file, or the disk? What follows from it is the same in all processes."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from sdxl_training.data.fetching import Fetch, Unencoded
from sdxl_training.data.folders import FolderSource
from sdxl_training.data.images import UnreadablePicture
from sdxl_training.data.known_contents import KnownContents
from sdxl_training.data.picture_index import update_index
from sdxl_training.data.pictures import PROBES, IndexedSource, Pictures, SourceRules
from sdxl_training.records import Bucket, CropPlan, UserError
from sdxl_training.tracking.progress import SilentProgress

EACH = 12
WHOLE = CropPlan((8, 8), (8, 8), (0, 0), Bucket((8, 8)))


class Disk:
    """Two folders of pictures, numbered through, whose files fail when asked to; `tries` counts who is read."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.failing, self.tries = path, dict[int, int](), Counter[int]()
        for number in range(2 * EACH):
            self.file(number).parent.mkdir(exist_ok=True)
            data = cv2.imencode(".png", np.full((8, 8, 3), number, np.uint8))[1].tobytes()
            self.file(number).write_bytes(data)
            self.file(number).with_suffix(".txt").write_text("a")
            os.utime(self.file(number), (1e9, 1e9))  # of a young file nothing is remembered
        self.pictures = self.index()
        read_bytes = Path.read_bytes

        def read(file: Path) -> bytes:
            if file.suffix == ".png":
                self.tries[int(file.stem)] += 1
                if self.failing.get(int(file.stem), 0) > 0:
                    self.failing[int(file.stem)] -= 1
                    raise OSError(errno.EIO, "Input/output error", str(file))
            return read_bytes(file)

        monkeypatch.setattr(Path, "read_bytes", read)
        monkeypatch.setattr("sdxl_training.data.images.RETRY_SECONDS", (0.0, 0.0))

    def file(self, number: int) -> Path:
        return self.path / ("one" if number < EACH else "two") / f"{number:02}.png"

    def fail(self, *numbers: int, times: int = 1000) -> None:
        self.failing |= dict.fromkeys(numbers, times)

    def index(self) -> Pictures:
        indexed = []
        for name in ("one", "two"):
            source = FolderSource(str(self.path / name))
            table = update_index(self.path / "index", source, SilentProgress(), 1)
            indexed.append(IndexedSource(source, SourceRules(), table))
        return Pictures(indexed)

    def fetch(self) -> Fetch:
        """Return a fetch as another process has it, or the next start."""
        pictures = self.index()
        return Fetch(pictures, KnownContents(self.path / "index", pictures), None)

    def visit(self, fetch: Fetch, number: int) -> int:
        """Return the colour of the picture that is found."""
        found = fetch(self.pictures[number], WHOLE)
        assert isinstance(found, Unencoded)
        return int(found.pixels_HWC[0, 0, 0])


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


@pytest.mark.parametrize("times", [1, 2, 3, 5])
def test_a_fault_that_passes_changes_nothing(disk: Disk, times: int) -> None:
    """Three tries; after those, another picture is read, and this one is tried three times more."""
    disk.fail(4, times=times)
    fetch = disk.fetch()
    assert disk.visit(fetch, 4) == 4
    assert fetch.contents.failure(4) is None
    assert disk.tries.total() == times + 1 + (times >= 3)


@pytest.mark.parametrize("harm", ["fails", "vanished"])
def test_a_file_that_fails_alone_is_out_for_all_processes_and_starts(disk: Disk, harm: str) -> None:
    here, there = disk.fetch(), disk.fetch()
    data = disk.file(4).read_bytes()
    if harm == "fails":
        disk.fail(4)
    else:
        disk.file(4).unlink()
    with pytest.raises(UnreadablePicture, match=r"the file cannot be read: .* \(touch it once it can be\)") as caught:
        disk.visit(here, 4)
    # The fault passes; those that come later still agree with the one that met it.
    disk.failing.clear()
    disk.file(4).write_bytes(data)
    os.utime(disk.file(4), (1e9, 1e9))
    disk.tries.clear()
    for fetch in (here, there, disk.fetch()):
        with pytest.raises(UnreadablePicture) as again:
            disk.visit(fetch, 4)
        assert again.value.reason == caught.value.reason
        assert disk.visit(fetch, 5) == 5
    assert disk.tries == {5: 3}
    os.utime(disk.file(4), (2e9, 1.1e9))
    assert disk.visit(disk.fetch(), 4) == 4, "touched, it is tried again"


def test_a_disk_that_fails_ends_the_run_and_no_picture_is_blamed(disk: Disk) -> None:
    disk.fail(*range(EACH))
    fetch = disk.fetch()
    with pytest.raises(UserError) as caught:
        disk.visit(fetch, 4)
    for words in ("data.sources.0", str(disk.file(4)), "output error", f"nor can {PROBES} others", "start the same"):
        assert words in str(caught.value)
    assert disk.visit(fetch, EACH) == EACH, "the other source lies elsewhere"
    disk.failing.clear()
    assert [disk.visit(disk.fetch(), number) for number in range(EACH)] == [*range(EACH)]


@pytest.mark.parametrize("left", range(0, EACH, 3))
def test_a_few_readable_ones_anywhere_are_enough(disk: Disk, left: int) -> None:
    """Of twelve, any three in a row: eight others are tried."""
    readable = {(left + i) % EACH for i in range(3)}
    disk.fail(*({*range(EACH)} - readable))
    blamed = min({*range(EACH)} - readable)
    with pytest.raises(UnreadablePicture):
        disk.visit(disk.fetch(), blamed)


def test_what_was_read_but_changed_since_it_was_listed_is_its_own_fault(disk: Disk) -> None:
    fetch = disk.fetch()
    disk.file(4).write_bytes(b"another length")
    with pytest.raises(UnreadablePicture, match="start anew to train what it is now"):
        disk.visit(fetch, 4)
    assert disk.tries == {4: 1}


def test_the_only_picture_of_a_source_is_out_by_itself(disk: Disk) -> None:
    kept_P = np.zeros(2 * EACH, bool)
    kept_P[[4, EACH]] = True
    disk.fail(4)
    with pytest.raises(UnreadablePicture, match="Input/output error"):
        disk.pictures.subset(kept_P).read(0)
