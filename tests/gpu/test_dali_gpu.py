"""DALI on a CUDA device: nvJPEG's pictures are the CPU backend's, whatever stands beside them in the batch."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sdxl_training.data.dali import DaliPreparer, choose_backend, open_dali
from sdxl_training.data.decoding import UnreadablePicture, read_header
from sdxl_training.data.preparing import CpuPreparer, Job, prepare
from sdxl_training.records import Bucket, CropPlan
from tests.pictures import NOISE, encoded
from tests.unit.test_dali import agreement_jobs, disagreements, jpeg, smooth

pytestmark = pytest.mark.gpu

LARGE_HW = (1200, 1600)  # above a megapixel DALI decodes JPEG in another way


def job(data: bytes, path: str = "a", original_hw: tuple[int, int] = (72, 104)) -> Job:
    resized_hw = (original_hw[0] // 2, original_hw[1] // 2)
    bucket = Bucket((resized_hw[0] - 2, resized_hw[1] - 4))
    return Job(data, path, (CropPlan(original_hw, resized_hw, (1, 3), bucket),))


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[DaliPreparer]:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    preparer = open_dali(0, 8, 4)
    yield preparer
    preparer.close()


def test_nvjpegs_pictures_are_the_cpu_backends(on_gpu: DaliPreparer) -> None:
    jobs = [*agreement_jobs(), job(jpeg(smooth(*LARGE_HW)), "large", LARGE_HW)]
    jobs.append(job(jpeg(smooth(*LARGE_HW), progressive=True), "large, progressive", LARGE_HW))
    before = on_gpu.fallen_through.copy()
    assert disagreements(on_gpu, jobs) == []
    assert on_gpu.fallen_through == before


def test_a_picture_does_not_depend_on_its_neighbours(on_gpu: DaliPreparer) -> None:
    jobs = agreement_jobs()[:40]
    alone = [on_gpu([each])[0] for each in jobs]
    together = on_gpu(jobs)
    backwards = on_gpu(jobs[::-1])[::-1]
    for each, a, b, c in zip(jobs, alone, together, backwards, strict=True):
        for x, y, z in zip(a, b, c, strict=True):
            assert torch.equal(x, y), each.path
            assert torch.equal(x, z), each.path


@pytest.mark.parametrize("bad", [encoded(NOISE)[:-40], jpeg(NOISE)[:-400]], ids=["PNG", "JPEG"])
def test_a_bad_picture_is_named_and_its_neighbours_are_kept(on_gpu: DaliPreparer, bad: bytes) -> None:
    good = jpeg(NOISE)
    (alone,) = on_gpu([job(good)])
    before, error, after = on_gpu([job(good, "a"), job(bad, "bad"), job(good, "b")])
    assert isinstance(error, UnreadablePicture)
    assert error.path == "bad"
    for neighbour in (before, after):
        assert torch.equal(neighbour[0], alone[0])


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_what_the_cpu_refuses_is_refused(on_gpu: DaliPreparer, options: dict[str, bool]) -> None:
    whole = jpeg(NOISE, **options)
    random = np.random.default_rng(0)
    files = []
    for _ in range(100):
        damaged = bytearray(whole)
        for at in random.integers(0, len(whole), 3):
            damaged[at] = random.integers(256)
        cut = bytes(damaged[: random.integers(len(whole) // 2, len(whole))]) + b"\xff\xd9"
        files += [data for data in (bytes(damaged), cut) if sized(data)]
    assert len(files) > 100
    for theirs, ours in zip(on_gpu([job(data) for data in files]), (prepare(job(data)) for data in files), strict=True):
        assert isinstance(theirs, UnreadablePicture) == isinstance(ours, UnreadablePicture)


def sized(data: bytes) -> bool:
    """Whether the header, where there is one left, is still that of the picture."""
    try:
        return read_header(io.BytesIO(data), "a").size_hw == NOISE.shape[:2]
    except UnreadablePicture:
        return True


def test_auto_takes_the_gpu() -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    preparer = choose_backend("auto", torch.cuda.current_device(), batch_size=2, threads=2)
    assert not isinstance(preparer, CpuPreparer)
    assert preparer.recipe == "dali-gpu"
    preparer.close()
