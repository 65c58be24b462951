"""The DALI backend: which pictures it is given, what becomes of the rest, and that its pixels are the CPU backend's.

What surrounds DALI is tested everywhere, with a decoder of our own in its place; the last part needs DALI.
"""

import logging
from collections.abc import Callable
from itertools import product
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_training.data import dali
from sdxl_training.data.crops import centre_crop
from sdxl_training.data.dali import DALI_COULD_NOT, LEAST_AGREEMENT_DB, DaliPipeline, DaliPreparer, open_dali, psnr_db
from sdxl_training.data.decoding import SIDEWAYS, UnreadablePicture
from sdxl_training.data.preparing import CpuPreparer, Job, Preparer, prepare
from sdxl_training.records import Bucket, CropPlan, UserError
from tests.pictures import (
    ADOBE,
    FORMATS,
    NOISE,
    PATCHES,
    SHOWN,
    difference,
    encoded,
    grey_profile,
    png,
    press_profile,
    rgb_profile,
)  # fmt: skip

# Pictures and plans that both backends must agree on


def smooth(height: int, width: int) -> np.ndarray:
    """A picture (H, W, 3) without a symmetry, whose colours change slowly."""
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    wave_HWC = np.stack([np.sin(5 * x + 3 * y), np.sin(7 * y - 2 * x), np.cos(4 * x + 6 * y * x)], -1)
    return (128 + 100 * wave_HWC).astype(np.uint8)


def jpeg(pixels: Any, orientation: int = 1, **options: Any) -> bytes:
    image, exif = (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)), Image.Exif()
    exif[274] = orientation
    return encoded(image, "JPEG", quality=95, exif=exif, **options)


def turned_png(pixels: np.ndarray, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(pixels, exif=exif)


def grey(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).convert("L")


ENCODINGS: dict[str, Callable[[np.ndarray], bytes]] = {
    "JPEG": jpeg,
    "JPEG 4:4:4": lambda pixels: jpeg(pixels, subsampling=0),
    "progressive JPEG": lambda pixels: jpeg(pixels, progressive=True),
    "grey JPEG": lambda pixels: jpeg(grey(pixels)),
    "JPEG with sRGB profile": lambda pixels: jpeg(pixels, icc_profile=rgb_profile()),
    "PNG": encoded,
    "grey PNG": lambda pixels: encoded(grey(pixels)),
    "WebP": lambda pixels: encoded(pixels, "WEBP", quality=95),
    "lossless WebP": lambda pixels: encoded(pixels, "WEBP", lossless=True),
    **{f"JPEG turned {n}": lambda pixels, n=n: jpeg(pixels, n) for n in SHOWN},
    **{f"PNG turned {n}": lambda pixels, n=n: turned_png(pixels, n) for n in (3, 6)},
}
# Stored sizes: wide, high, square, odd; to a smaller bucket and to a larger one.
SIZES = [((96, 160), (64, 64)), ((203, 111), (64, 96)), ((128, 128), (96, 64)), ((61, 77), (96, 128))]


def plans_for(stored_hw: tuple[int, int], orientation: int, bucket_hw: tuple[int, int]) -> tuple[CropPlan, ...]:
    """Crops at both ends, mirrored and not, and one that is resized further, of the picture as shown."""
    original_hw = stored_hw[::-1] if orientation in SIDEWAYS else stored_hw
    centre = centre_crop(original_hw, Bucket(bucket_hw))
    far = tuple(a - b for a, b in zip(centre.resized_hw, bucket_hw, strict=True))
    larger = (centre.resized_hw[0] + 9, centre.resized_hw[1] + 14)
    return (
        *(
            CropPlan(original_hw, centre.resized_hw, crop_tl, centre.bucket, flipped)
            for crop_tl, flipped in product(((0, 0), far), (False, True))
        ),
        CropPlan(original_hw, larger, (4, 5), centre.bucket),
    )


def agreement_jobs() -> list[Job]:
    """Every encoding in every size; a name says which it is."""
    jobs = []
    for (name, encode), (stored_hw, bucket_hw) in product(ENCODINGS.items(), SIZES):
        orientation = int(name[-1]) if "turned" in name else 1
        data = encode(smooth(*stored_hw))
        jobs.append(Job(data, f"{name} {stored_hw} {bucket_hw}", plans_for(stored_hw, orientation, bucket_hw)))
    return jobs


def disagreements(preparer: Preparer, jobs: list[Job], least_db: float = LEAST_AGREEMENT_DB) -> list[str]:
    """Name the jobs whose pixels are further than `least_db` from the CPU backend's."""
    found = []
    for job, theirs in zip(jobs, preparer(jobs), strict=True):
        ours = prepare(job)
        for plan, a, b in zip(job.plans, ours, theirs, strict=True):
            assert b.shape == (*plan.bucket.size_hw, 3)
            assert (b.dtype, b.device.type, b.is_contiguous()) == (torch.uint8, "cpu", True)
            if (db := psnr_db(a, b)) < least_db:
                found.append(f"{job.path} {plan}: {db:.1f} dB")
    return found


# A decoder in DALI's place


class OwnDecoder:
    """Decodes and resizes like DALI, by OpenCV and Pillow; notes what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []

    @property
    def given(self) -> list[bytes]:
        return [data for batch in self.batches for data in batch]

    def __call__(self, files, sizes_hw):
        self.batches.append(list(files))
        assert len(files) == len(sizes_hw)
        return [self.decode(data, size_hw) for data, size_hw in zip(files, sizes_hw, strict=True)]

    def decode(self, data, size_hw):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels_HWC = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if pixels_HWC is None:
            raise RuntimeError("Critical error in pipeline")
        resized = Image.fromarray(pixels_HWC).resize(size_hw[::-1], Image.Resampling.LANCZOS)
        return pixels_HWC.shape[:2], np.array(resized)


@pytest.fixture
def decoder():
    return OwnDecoder()


@pytest.fixture
def preparer(decoder):
    preparer = DaliPreparer(decoder, "dali-cpu", 4, CpuPreparer(1))
    yield preparer
    preparer.close()


def job(data: bytes, path: str = "a", shown_hw: tuple[int, int] | None = None) -> Job:
    centre = centre_crop(shown_hw or NOISE.shape[:2], Bucket((32, 48)))
    return Job(data, path, (centre, CropPlan(centre.original_hw, centre.resized_hw, (0, 0), centre.bucket, True)))


def with_profile(profile: bytes, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    return encoded(Image.fromarray(NOISE).convert(mode), kind, icc_profile=profile)


def jpeg_of_rgb(marker: bool) -> bytes:
    """A JPEG whose components are red, green and blue: marked so by Adobe's segment, or by their names alone."""
    stored = encoded(NOISE, "JPEG", keep_rgb=True)
    at = stored.index(b"\xff\xee")
    if not marker:
        return stored[:at] + stored[at + 2 + int.from_bytes(stored[at + 2 : at + 4], "big") :]
    for segment, first, step in ((b"\xff\xc0", 10, 3), (b"\xff\xda", 5, 2)):  # frame and scan name the components
        names = [stored.index(segment) + first + i * step for i in range(3)]
        assert bytes(stored[name] for name in names) == b"RGB"
        stored = bytes(names.index(i) + 1 if i in names else byte for i, byte in enumerate(stored))
    return stored


WIDE = rgb_profile(ADOBE, 2.2)
WHOLE_JPEG = jpeg(NOISE)
NOT_FOR_DALI: dict[str, tuple[bytes, str]] = {
    **{kind: (encoded(NOISE, FORMATS[kind][0]), "format") for kind in ("gif", "bmp", "tiff", "avif")},
    "cmyk": (encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG"), "of mode CMYK"),
    "cmyk with profile": (with_profile(press_profile(), mode="CMYK"), "of mode CMYK"),
    "palette": (encoded(Image.fromarray(NOISE).quantize(16)), "of mode P"),
    "black and white": (encoded(Image.fromarray(NOISE).convert("1")), "of mode 1"),
    "alpha": (encoded(np.dstack([NOISE, NOISE[..., :1]])), "of mode RGBA"),
    "grey alpha": (encoded(Image.fromarray(NOISE).convert("LA")), "of mode LA"),
    "webp alpha": (encoded(np.dstack([NOISE, NOISE[..., :1]]), "WEBP"), "of mode RGBA"),
    "clear colour": (encoded(NOISE, transparency=(1, 2, 3)), "transparent"),
    "deep": (cv2.imencode(".png", NOISE.astype(np.uint16) * 257)[1].tobytes(), "of another depth"),
    "deep grey": (cv2.imencode(".png", NOISE[..., 0].astype(np.uint16) * 257)[1].tobytes(), "of mode I;16"),
    "shallow": (png(104, 72, 4, 0, (b"\0" + bytes(range(52))) * 72), "of another depth"),
    "animated": (encoded(NOISE, save_all=True, append_images=[Image.fromarray(NOISE[::-1])]), "animated"),
    "animated webp": (encoded(NOISE, "WEBP", save_all=True, append_images=[grey(NOISE)]), "extended WebP"),
    "webp with profile": (with_profile(WIDE, "WEBP"), "extended WebP"),
    "profile": (with_profile(WIDE), "with a colour profile"),
    "png profile": (with_profile(WIDE, "PNG"), "with a colour profile"),
    "grey profile": (with_profile(grey_profile(1.0), mode="L"), "with a colour profile"),
    "broken profile": (with_profile(b"no profile"), "with a colour profile"),
    "rgb jpeg": (jpeg_of_rgb(marker=True), "of RGB instead of YCbCr"),
    "rgb jpeg by name": (jpeg_of_rgb(marker=False), "of RGB instead of YCbCr"),
    "followed": (WHOLE_JPEG + b"more from the camera", "does not end where the file does"),
    "cut short": (WHOLE_JPEG[:-20], "does not end where the file does"),
    "rest is zero": (WHOLE_JPEG[:-200] + bytes(200), "does not end where the file does"),
    "empty": (b"", "without a readable header"),
    "text": (b"not a picture at all", "without a readable header"),
    "bad header": (encoded(NOISE)[:20], "without a readable header"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FOR_DALI)
def test_what_dali_would_decode_otherwise_goes_to_the_cpu_and_is_counted(preparer, decoder, name):
    data, reason = NOT_FOR_DALI[name]
    (result,) = preparer([job(data)])
    assert not decoder.given
    assert preparer.prepared == 0
    [(counted, number)] = preparer.fallen_through.items()
    assert reason in counted
    assert number == 1
    expected = prepare(job(data))
    if isinstance(expected, UnreadablePicture):
        assert (result.path, result.reason) == (expected.path, expected.reason)
    else:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_all_other_pictures_go_to_dali_and_agree(preparer, decoder):
    jobs = agreement_jobs()
    assert disagreements(preparer, jobs) == []
    assert not preparer.fallen_through
    assert preparer.prepared == len(jobs)
    assert len(decoder.given) == 2 * len(jobs)  # each in two sizes, for five plans


def test_trailing_zeros_after_a_jpeg_are_no_damage(preparer):
    preparer([job(WHOLE_JPEG + bytes(7))])
    assert not preparer.fallen_through


def test_one_bad_picture_does_not_take_its_neighbours_along(preparer, decoder, caplog):
    bad = encoded(NOISE)[:-40]
    jobs = [job(WHOLE_JPEG, "a"), job(bad, "bad"), job(WHOLE_JPEG, "b"), job(bad, "worse"), job(WHOLE_JPEG, "c")]
    alone = preparer([jobs[0]])[0]
    a, error, b, other, c = preparer(jobs)
    assert [type(x) for x in (error, other)] == [UnreadablePicture] * 2
    assert (error.path, other.path) == ("bad", "worse")
    for neighbour in (a, b, c):  # by DALI as without bad company: the CPU's pixels differ in places
        assert all(torch.equal(x, y) for x, y in zip(alone, neighbour, strict=True))
    assert preparer.fallen_through == {DALI_COULD_NOT: 2}
    assert preparer.prepared == 4
    assert "bad: DALI could not decode it: Critical error in pipeline" in caplog.messages


def test_a_picture_that_only_dali_refuses_is_prepared_by_the_cpu(preparer, decoder, monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("nvJPEG error 4")

    monkeypatch.setattr(decoder, "decode", refuse)
    for _ in range(3):
        (result,) = preparer([job(WHOLE_JPEG)])
        assert all(torch.equal(a, b) for a, b in zip(result, prepare(job(WHOLE_JPEG)), strict=True))
    assert preparer.fallen_through == {DALI_COULD_NOT: 3}
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_another_error_than_dalis_is_not_swallowed(preparer, decoder, monkeypatch):
    monkeypatch.setattr(decoder, "decode", lambda *_: {}["a fault of ours"])
    with pytest.raises(KeyError):
        preparer([job(WHOLE_JPEG)])


def test_a_decoder_that_sees_another_size_is_not_believed(preparer, decoder, monkeypatch):
    monkeypatch.setattr(decoder, "decode", lambda _, size: ((104, 72), np.zeros((*size, 3), np.uint8)))
    (result,) = preparer([job(WHOLE_JPEG)])
    assert torch.equal(result[0], prepare(job(WHOLE_JPEG))[0])
    assert preparer.fallen_through == {"decoded to another size than its header's": 1}


def test_a_picture_of_another_size_than_planned_has_changed(preparer, decoder):
    (result,) = preparer([job(WHOLE_JPEG, shown_hw=(70, 104))])
    assert "it is no longer 70x104 as when it was indexed" in str(result)
    assert not decoder.given


def test_batches_are_bounded_in_pictures_and_in_pixels(preparer, decoder, monkeypatch):
    assert len(preparer([job(WHOLE_JPEG)] * 10)) == 10
    assert [len(batch) for batch in decoder.batches] == [4, 4, 2]
    decoder.batches.clear()
    monkeypatch.setattr(dali, "MAX_BATCH_PIXELS", 2 * NOISE.shape[0] * NOISE.shape[1] + 1)
    preparer([job(WHOLE_JPEG)] * 5)
    assert [len(batch) for batch in decoder.batches] == [2, 2, 1]
    decoder.batches.clear()
    monkeypatch.setattr(dali, "MAX_BATCH_PIXELS", 1)  # each is larger than that, and goes alone
    preparer([job(WHOLE_JPEG)] * 2)
    assert [len(batch) for batch in decoder.batches] == [1, 1]


def test_results_come_in_the_order_of_the_jobs(preparer):
    levels = [10, 60, 110, 160, 210, 250]
    kinds = ["PNG", "TIFF", "JPEG", "BMP", "PNG", "JPEG"]
    flat = [encoded(np.full_like(NOISE, level), kind) for level, kind in zip(levels, kinds, strict=True)]
    means = [round(float(prepared[0].float().mean())) for prepared in preparer([job(data) for data in flat])]
    assert means == levels
    assert preparer([]) == []


def test_what_fell_through_is_told(preparer):
    assert preparer.describe() == "DALI prepared 0 pictures, the CPU 0"
    preparer([job(WHOLE_JPEG)] * 3 + [job(NOT_FOR_DALI["tiff"][0])] * 2 + [job(NOT_FOR_DALI["palette"][0])])
    assert preparer.describe() == "DALI prepared 3 pictures, the CPU 3: 2 in TIFF format, 1 of mode P"
    preparer.close()
    with pytest.raises(ValueError, match="closed"):
        preparer([job(WHOLE_JPEG)])


def test_a_batch_of_no_pictures_is_a_fault_of_the_program(decoder):
    with pytest.raises(ValueError, match="batch_size = 0"):
        DaliPreparer(decoder, "dali-cpu", 0, CpuPreparer(1))


PLAIN = [encode(NOISE) for encode in (jpeg, encoded, lambda pixels: encoded(pixels, "WEBP"))]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=200)
@given(draw=st.data(), whole=st.sampled_from([*PLAIN, *(data for data, _ in NOT_FOR_DALI.values())]))
def test_damage_anywhere_is_survived(draw, whole):
    """Whether by DALI or by the CPU; where sizes change, the scan would have seen it."""
    damaged = bytearray(whole)
    for _ in range(draw.draw(st.integers(1, 3))):
        if damaged:
            damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    damaged = bytes(damaged[: draw.draw(st.integers(0, len(damaged)))])
    preparer = DaliPreparer(OwnDecoder(), "dali-cpu", 2, CpuPreparer(1))
    ours = prepare_if_planned(job(damaged))
    if ours is not None:
        (theirs,) = preparer([job(damaged)])
        assert isinstance(ours, UnreadablePicture) == isinstance(theirs, UnreadablePicture)
    preparer.close()


def prepare_if_planned(given_job: Job):
    prepared = prepare(given_job)
    return None if "it is no longer" in str(prepared) else prepared


# Which backend


@pytest.fixture
def opened(monkeypatch):
    """What open_dali was asked for; DALI seems to be there."""
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(dali, "dali", object())
    monkeypatch.setattr(dali, "open_dali", lambda *given: asked.append(given) or "DALI")
    return asked


def backend(name, device):
    return dali.choose_backend(name, device, batch_size=8, threads=3, background=(1, 2, 3))


def test_auto_takes_dali_only_where_it_has_a_gpu(opened, monkeypatch):
    assert backend("auto", 1) == "DALI"
    assert opened == [(1, 8, 3, (1, 2, 3))]
    assert isinstance(backend("auto", None), CpuPreparer)
    assert isinstance(backend("cpu", 1), CpuPreparer)
    monkeypatch.setattr(dali, "dali", None)
    assert isinstance(backend("auto", 1), CpuPreparer)
    assert len(opened) == 1


def test_dali_without_a_gpu_is_had_with_a_warning(opened, caplog):
    assert backend("dali", None) == "DALI"
    assert "no CUDA device" in caplog.text
    assert opened == [(None, 8, 3, (1, 2, 3))]


def test_a_dali_that_does_not_run_is_an_error_or_passed_over(opened, monkeypatch, caplog):
    def fail(*_):
        raise UserError("it does not run.")

    monkeypatch.setattr(dali, "open_dali", fail)
    with pytest.raises(UserError, match="does not run"):
        backend("dali", 0)
    assert isinstance(backend("auto", 0), CpuPreparer)
    assert "it does not run. Pictures are prepared on the CPU." in caplog.text


@pytest.mark.parametrize(("cuda", "package"), [("12.8", "120"), ("13.0", "130"), (None, "130")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, cuda, package):
    monkeypatch.setattr(dali, "dali", None)
    monkeypatch.setattr(dali, "WHY_ABSENT", "No module named 'nvidia'")
    monkeypatch.setattr(dali.torch.version, "cuda", cuda)
    with pytest.raises(UserError, match="No module named 'nvidia'") as caught:
        backend("dali", None)
    assert f"`pip install nvidia-dali-cuda{package}`" in str(caught.value)


class Stub:
    __version__ = "2.4.0"


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (lambda files, sizes: [((192, 256), np.zeros((*sizes[0], 3), np.uint8))], r"another picture of a JPEG .* dB"),
        (lambda files, sizes: (_ for _ in ()).throw(RuntimeError("no driver.")), "does not run here: no driver. Set"),
    ],
)
def test_dali_is_not_taken_before_it_has_shown_a_picture(monkeypatch, decode, message):
    monkeypatch.setattr(dali, "dali", Stub)
    monkeypatch.setattr(dali, "DaliPipeline", lambda *_: decode)
    with pytest.raises(UserError, match=message):
        open_dali(None, 4)
    monkeypatch.setattr(dali, "DaliPipeline", lambda *_: OwnDecoder())
    preparers = open_dali(None, 4), open_dali(0, 4)
    assert [preparer.recipe for preparer in preparers] == ["dali-cpu", "dali-gpu"]
    for preparer in preparers:
        preparer.close()


def test_a_pipeline_is_built_once_and_anew_after_an_error(monkeypatch):
    class Pipeline:
        def run(self, files, sizes_hw):
            raise RuntimeError("Current pipeline object is no longer valid.")

    built = []
    monkeypatch.setattr(DaliPipeline, "_build", lambda _: built.append(1) or Pipeline())
    pipeline = DaliPipeline(None, 1, 1)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            pipeline([b""], [(1, 1)])
    assert len(built) == 2


def test_psnr_is_the_textbooks():
    black = torch.zeros(4, 5, 3, dtype=torch.uint8)
    assert psnr_db(black, black) == float("inf")
    assert psnr_db(black, black + 255) == pytest.approx(0.0)
    assert psnr_db(black + 8, black + 3) == pytest.approx(20 * np.log10(255 / 5))


# DALI itself


@pytest.fixture(scope="module")
def real():
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    preparer = open_dali(None, 6, 2)
    yield preparer
    preparer.close()


def test_dalis_pictures_are_the_cpu_backends(real):
    jobs, before = agreement_jobs(), real.fallen_through.copy()
    assert disagreements(real, jobs, least_db=50) == []  # 36 is promised; without a GPU it is a level or two
    assert real.fallen_through == before


def test_dali_resamples_without_aliases(real):
    pixels = np.random.default_rng(0).integers(0, 256, (160, 240, 3), np.uint8)
    jobs = [Job(encoded(pixels), "grain", plans_for((160, 240), 1, bucket)) for bucket in ((32, 48), (64, 40))]
    assert disagreements(real, jobs, least_db=45) == []


def test_dali_decodes_to_the_same_bytes_and_keeps_a_size(real):
    height, width = PATCHES.shape[:2]
    plan = CropPlan((height, width), (height, width), (0, 0), Bucket((height, width)))
    gamma = png(width, height, 8, 2, b"".join(b"\0" + row.tobytes() for row in PATCHES), (b"gAMA", b"\0\0\xff\xff"))
    files = [*(encode(PATCHES) for encode in ENCODINGS.values()), gamma]
    jobs = [Job(data, f"{n}", (plan,)) for n, data in enumerate(files)]
    same_way = [each for each in jobs if prepare_if_planned(each) is not None]  # not on its side
    assert len(same_way) > 10
    for given_job, theirs in zip(same_way, real(same_way), strict=True):
        assert difference(theirs[0], prepare(given_job)[0]) <= 1, given_job.path


def test_dali_goes_on_after_a_bad_picture(real):
    bad = encoded(NOISE)[:-40]
    alone = real([job(WHOLE_JPEG)])[0]
    results = real([job(WHOLE_JPEG, "a"), job(bad, "b"), job(encoded(NOISE), "c"), job(WHOLE_JPEG, "d")])
    assert [isinstance(result, UnreadablePicture) for result in results] == [False, True, False, False]
    assert torch.equal(results[0][0], alone[0])
    assert torch.equal(results[3][1], alone[1])
    assert torch.equal(real([job(WHOLE_JPEG)])[0][0], alone[0])


def test_results_outlive_the_batches_after_them(real):
    first = real([job(WHOLE_JPEG)])[0][0]
    kept = first.clone()
    for _ in range(4):
        real([job(encoded(255 - NOISE))] * 3)
    assert torch.equal(first, kept)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_dali_refuses_what_we_refuse(real):
    """Cut short or with wrong bytes; JPEGs cut short with an end of their own, as DALI is not shown others."""
    random = np.random.default_rng(0)
    for whole in PLAIN[:2]:
        for _ in range(40):
            damaged = bytearray(whole)
            for at in random.integers(0, len(whole), random.integers(0, 3)):
                damaged[at] = random.integers(256)
            damaged = bytes(damaged[: random.integers(len(whole) // 2, len(whole))]) + b"\xff\xd9"
            ours = prepare_if_planned(job(damaged))
            if ours is not None:
                (theirs,) = real([job(damaged)])
                assert isinstance(theirs, UnreadablePicture) == isinstance(ours, UnreadablePicture)


def test_a_pipeline_without_a_gpu_says_so():
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="does not run here"):
        open_dali(0, 2)
    assert DaliPipeline(None, 1, 1)([WHOLE_JPEG], [(10, 20)])[0][0] == NOISE.shape[:2]
