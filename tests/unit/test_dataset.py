"""Pictures on disk become a data set: variants, batches by pixels, what a checkpoint remembers of them, the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from sdxl_training.assemble.caching import verify_cache
from sdxl_training.assemble.dataset import (
    Dataset,
    arithmetic,
    bucket_lists,
    fill_cache,
    latent_folder,
    prepare_dataset,
    refuse_too_many_bad,
)
from sdxl_training.assemble.session import _micro_batches
from sdxl_training.config.schema import Config
from sdxl_training.data.encoding import Encoder
from sdxl_training.data.fetching import Stored, Unencoded
from sdxl_training.data.images import UnreadablePicture
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.parallel.group import Group
from sdxl_training.records import Bucket, Draw, Quarantined, UserError
from sdxl_training.tracking.progress import SilentProgress

IMAGES_A_STEP = "images a step (batch_size x accumulation x processes)"
WHICH = "which pictures there are"
CONTENT = "the pictures' content, size, crop or VAE"
SQUARE, WIDE = Bucket((64, 64)), Bucket((32, 64))
SMALL = {"generator": "list", "sizes": [[64, 64], [32, 64]]}
GROUP = Group(0, 1, torch.device("cpu"))


@dataclass
class Heard(SilentProgress):
    """Remembers what was said."""

    said: list[str] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.said.append(text)


def encode(pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Stand for a VAE: 8x8 blocks averaged."""
    mean_BCHW = torch.nn.functional.avg_pool2d(pixels_BCHW, 8)
    mean_BCHW = torch.cat([mean_BCHW, mean_BCHW[:, :1]], dim=1)
    return mean_BCHW, mean_BCHW.abs() * 0.1


def write_picture(folder: Path, number: int, size_hw: tuple[int, int]) -> None:
    generator = np.random.default_rng(number)
    Image.fromarray(generator.integers(0, 256, (*size_hw, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / f"{number}.txt").write_text(f"picture, {number}")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures near the square and four that are twice as wide as high."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(10):
        write_picture(folder, number, (64, 72) if number < 6 else (64, 128))
    return folder


def dataset_of(
    pictures: Path,
    output: Path,
    training: dict[str, Any] | None = None,
    vae: str = "vae",
    progress: SilentProgress | None = None,
    **data: Any,
) -> tuple[Config, Dataset]:
    values = {
        "global_config": {"output_dir": str(output)},
        "training": {"batch_size": 2, "accumulation": 2, **(training or {})},
        "data": {"sources": [{"path": str(pictures)}], "resolution": 64, "buckets": SMALL, **data},
    }
    config = Config.model_validate(values)
    return config, prepare_dataset(config, GROUP, progress or SilentProgress(), vae)


def filled(config: Config, dataset: Dataset, vae: Callable[[Tensor], tuple[Tensor, Tensor]] = encode) -> list[str]:
    """Encode all that the cache lacks, and return what was said."""
    heard = Heard()
    with closing(StoreWriter(latent_folder(config))) as writer:
        fill_cache(config, dataset, Encoder(vae, GROUP.device, 4, dataset.cache, writer), GROUP, heard)
    return heard.said


def fetched(dataset: Dataset) -> list[Stored | Unencoded | UnreadablePicture]:
    """Return what a visit to each variant of each record finds."""
    found: list[Stored | Unencoded | UnreadablePicture] = []
    for record, plan in dataset.plan.prepared():
        try:
            found.append(dataset.fetch(record, plan))
        except UnreadablePicture as error:
            found.append(error)
    return found


# Which sizes there are


def sizes_of(**data: Any) -> list[tuple[int, int]]:
    config = Config.model_validate({"data": {"sources": [{"path": "a"}], **data}})
    (buckets,) = bucket_lists(config)
    return [bucket.size_hw for bucket in buckets]


@pytest.mark.parametrize("resolution", [256, 512, 768, 1024, 1536])
@pytest.mark.parametrize("generator", ["area", "sdxl", "novelai"])
def test_sizes_scale_with_the_resolution(resolution: int, generator: str) -> None:
    """With the step scaled as well, a resolution has the sizes of 1024, scaled: the limits are no fixed numbers."""
    step_px = resolution // 16
    sizes = sizes_of(resolution=resolution, buckets={"generator": generator, "step_px": step_px})
    whole = sizes_of(buckets={"generator": generator, "min_side_px": 512, "max_side_px": 2048})
    assert sizes == [(height * resolution // 1024, width * resolution // 1024) for height, width in whole]
    assert len(sizes) >= 33


def test_the_resolution_alone_gives_more_than_its_square() -> None:
    assert sizes_of() == sizes_of(buckets={"min_side_px": 512, "max_side_px": 2048})
    assert sizes_of(resolution=512) == sizes_of(resolution=512, buckets={"min_side_px": 256, "max_side_px": 1024})
    assert len(sizes_of(resolution=512)) > 10


@given(st.integers(1, 64), st.sampled_from([8, 16, 64, 128]))
def test_the_limits_lie_on_the_grid_and_enclose_the_square(steps: int, step_px: int) -> None:
    sizes = sizes_of(resolution=steps * step_px, buckets={"step_px": step_px})
    assert (steps * step_px, steps * step_px) in sizes
    assert all(side % step_px == 0 for size_hw in sizes for side in size_hw)


# What a checkpoint remembers


def test_the_fingerprint_has_its_parts(pictures: Path, tmp_path: Path) -> None:
    _, dataset = dataset_of(pictures, tmp_path)
    assert list(dataset.fingerprint) == [
        "global_config.seed",
        IMAGES_A_STEP,
        WHICH,
        CONTENT,
        "captions",
        "repeats",
    ]
    assert dataset.fingerprint[IMAGES_A_STEP] == "4"
    assert len(set(dataset.fingerprint.values())) == 6


def differing(one: Dataset, other: Dataset) -> set[str]:
    assert one.fingerprint.keys() == other.fingerprint.keys()
    return {name for name, value in one.fingerprint.items() if other.fingerprint[name] != value}


def changed_by(folder: Path, output: Path, change: Callable[[], object], **data: Any) -> set[str]:
    """Return the parts of the fingerprint that a change of the pictures' folder changes."""
    before, _, after = dataset_of(folder, output, **data)[1], change(), dataset_of(folder, output, **data)[1]
    return differing(before, after)


@pytest.fixture
def copied(pictures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "copied"))


def test_every_alternative_is_part_of_the_fingerprint(copied: Path, tmp_path: Path) -> None:
    lines = {"captions": {"alternatives": "lines"}}
    assert changed_by(copied, tmp_path, lambda: None, **lines) == set()
    write = (copied / "3.txt").write_text
    assert changed_by(copied, tmp_path, lambda: write("picture, 3\nanother"), **lines) == {"captions"}
    assert changed_by(copied, tmp_path, lambda: write("picture, 3\nanother one"), **lines) == {"captions"}
    prose = {"captions": {"kind": "prose"}}
    assert changed_by(copied, tmp_path, lambda: write("picture; 3"), **prose) == {"captions"}


def test_how_captions_are_read_is_part_of_the_fingerprint(pictures: Path, tmp_path: Path) -> None:
    _, plain = dataset_of(pictures, tmp_path)
    for read in ({"kind": "prose"}, {"separator": ";"}, {"weights": True}, {"alternatives": "lines"}):
        assert differing(plain, dataset_of(pictures, tmp_path, captions=read)[1]) == {"captions"}, read
    # How a visit varies them is drawn anew each time and may be changed between runs.
    assert differing(plain, dataset_of(pictures, tmp_path, captions={"shuffle": False})[1]) == set()


def rename(folder: Path) -> None:
    for ending in ("png", "txt"):
        (folder / f"9.{ending}").rename(folder / f"99.{ending}")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda folder: write_picture(folder, 10, (64, 72)), {WHICH, CONTENT, "captions", "repeats"}),
        (lambda folder: (folder / "9.png").unlink(), {WHICH, CONTENT, "captions", "repeats"}),
        (rename, {WHICH}),
        (lambda folder: write_picture(folder, 0, (64, 80)), {CONTENT}),
        (lambda folder: write_picture(folder, 0, (64, 128)), {WHICH, CONTENT}),
        (lambda folder: (folder / "notes.md").write_text("not a picture"), set()),
    ],
    ids=["one more", "one less", "renamed", "another size", "another bucket", "another file"],
)
def test_changed_pictures_are_part_of_the_fingerprint(
    copied: Path, tmp_path: Path, change: Callable[[Path], object], parts: set[str]
) -> None:
    assert changed_by(copied, tmp_path, lambda: change(copied)) == parts


def test_what_decides_a_latent_is_part_of_the_fingerprint(pictures: Path, tmp_path: Path) -> None:
    _, plain = dataset_of(pictures, tmp_path)
    assert differing(plain, dataset_of(pictures, tmp_path, vae="another")[1]) == {CONTENT}
    assert differing(plain, dataset_of(pictures, tmp_path, crop={"flip": True})[1]) == {CONTENT}
    sources = [{"path": str(pictures), "repeats": 2}]
    assert differing(plain, dataset_of(pictures, tmp_path, sources=sources)[1]) == {"repeats"}


def test_where_pictures_lie_and_when_they_are_encoded_is_not(pictures: Path, copied: Path, tmp_path: Path) -> None:
    """A run may go on with its pictures elsewhere, another cache, and latents made at another time."""
    _, plain = dataset_of(pictures, tmp_path)
    assert differing(plain, dataset_of(copied, tmp_path / "elsewhere")[1]) == set()
    for mode in ("first", "none"):
        assert differing(plain, dataset_of(pictures, tmp_path, cache={"mode": mode})[1]) == set()


def test_a_picture_found_broken_later_changes_neither_plan_nor_fingerprint(copied: Path, tmp_path: Path) -> None:
    """The order of the samples does not depend on when somebody found out."""
    data = (copied / "3.png").read_bytes()
    (copied / "3.png").write_bytes(data[: len(data) // 2])
    first = {"cache": {"mode": "first"}, "max_bad_fraction": 0.2}
    config, before = dataset_of(copied, tmp_path, **first)
    assert before.found.quarantined() == []
    filled(config, before)
    _, after = dataset_of(copied, tmp_path, **first)
    (bad,) = after.found.quarantined()
    assert bad.path == str(copied / "3.png")
    assert [record.path for record in after.plan.records] == [record.path for record in before.plan.records]
    assert len(after.plan.records) == 10
    assert differing(before, after) == set()
    without = [{"path": str(copied), "only": {"except_names": ["3.png"]}}]
    assert dataset_of(copied, tmp_path, sources=without)[1].found.quarantined() == []


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"captions": {"templates": ["{tags}"]}}, r"data\.captions\.templates: .* none of the 10 pictures has any"),
        ({"training": {"coupling": {"type": "conditional_transport"}}}, r"training\.coupling\.type = conditional_"),
    ],
)
def test_what_asks_for_tags_that_prose_does_not_have_is_refused(
    pictures: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    kept = {"training": changes.get("training")}
    dataset_of(pictures, tmp_path, **kept, captions=changes.get("captions", {}))
    with pytest.raises(UserError, match=words):
        dataset_of(pictures, tmp_path, **kept, captions={"kind": "prose", **changes.get("captions", {})})


def test_too_many_bad_pictures_are_refused_by_name(copied: Path, tmp_path: Path) -> None:
    """Two of twelve: a sixth."""
    for name in ("a", "b"):
        (copied / f"{name}.png").write_bytes(b"")
        (copied / f"{name}.txt").write_text("empty")
    dataset_of(copied, tmp_path, max_bad_fraction=2 / 12)
    with pytest.raises(UserError, match=r"data\.max_bad_fraction = 0\.16: 2 of 12 pictures cannot be used") as caught:
        dataset_of(copied, tmp_path, max_bad_fraction=0.16)
    assert all(f"{copied / name}.png: the file is empty" in str(caught.value) for name in ("a", "b"))
    assert "raise data.max_bad_fraction" in str(caught.value)


def test_of_very_many_bad_pictures_ten_are_named() -> None:
    config = Config.model_validate({"data": {"sources": [{"path": "a"}]}})
    bad = [Quarantined(f"{number}.png", "it is torn") for number in range(50)]
    refuse_too_many_bad(config, bad, 500)
    with pytest.raises(UserError) as caught:
        refuse_too_many_bad(config, bad, 499)
    assert str(caught.value).count("it is torn") == 10


# Batches


def test_batches_by_pixels_differ_between_buckets_and_have_a_fingerprint(pictures: Path, tmp_path: Path) -> None:
    """4096 pixels are one square picture or two half as large; 8192 are two or four."""
    config, dataset = dataset_of(pictures, tmp_path, {"pixels_per_batch": 4096})
    assert dataset.schedule.global_batches == {WIDE: 4, SQUARE: 2}
    assert arithmetic(config, dataset.schedule, 1).endswith("= 2 to 4 images a step, by bucket")
    config, alone = dataset_of(pictures, tmp_path, {"pixels_per_batch": 2048})
    assert arithmetic(config, alone.schedule, 1).endswith("= 2 images a step")
    _, larger = dataset_of(pictures, tmp_path, {"pixels_per_batch": 8192})
    assert larger.schedule.global_batches == {WIDE: 8, SQUARE: 4}
    seen = [each.fingerprint[IMAGES_A_STEP] for each in (dataset, larger, dataset_of(pictures, tmp_path)[1])]
    assert len(set(seen)) == 3
    assert dataset.fingerprint.keys() == larger.fingerprint.keys()


def test_the_heaviest_update_has_the_most_pixels_not_the_largest_bucket(pictures: Path, tmp_path: Path) -> None:
    _, by_pictures = dataset_of(pictures, tmp_path)
    assert by_pictures.schedule.heaviest_bucket == SQUARE
    _, by_pixels = dataset_of(pictures, tmp_path, {"pixels_per_batch": 6144})
    assert by_pixels.schedule.heaviest_bucket == WIDE  # three of 2048 pixels, but only one of 4096


# Sources


def test_weights_of_sources_have_mean_1_over_the_images_of_an_epoch(
    pictures: Path, copied: Path, tmp_path: Path
) -> None:
    """Ten pictures count three times as much as ten others that are drawn twice as often."""
    sources = [{"path": str(pictures), "weight": 3}, {"path": str(copied), "weight": 1, "repeats": 2}]
    _, dataset = dataset_of(pictures, tmp_path, sources=sources)
    weight_P = dataset.found.pictures.weights(dataset.plan)
    assert weight_P.dtype == np.float32
    assert np.allclose(weight_P[:10], 3 * weight_P[10:])
    assert np.average(weight_P, weights=[1] * 10 + [2] * 10) == pytest.approx(1)
    assert np.allclose(weight_P[:10], 3 / (5 / 3))
    _, plain = dataset_of(pictures, tmp_path)
    assert (plain.found.pictures.weights(plain.plan) == 1).all()


@pytest.mark.parametrize(
    ("only", "left"),
    [
        ({"names": ["[0-2].png"]}, {0, 1, 2}),
        ({"except_names": ["[0-2].png"]}, {3, 4, 5, 6, 7, 8, 9}),
        ({"any_tag": ["3", "5"]}, {3, 5}),
        ({"no_tag": ["3", "5"]}, {0, 1, 2, 4, 6, 7, 8, 9}),
        ({"names": ["[0-4].png"], "no_tag": ["3"]}, {0, 1, 2, 4}),
    ],
)
def test_a_filter_leaves_what_passes(pictures: Path, tmp_path: Path, only: dict[str, Any], left: set[int]) -> None:
    _, dataset = dataset_of(pictures, tmp_path, sources=[{"path": str(pictures), "only": only}])
    assert {int(Path(record.path).stem) for record in dataset.plan.records} == left
    assert dataset.found.pictures.found == 10


def test_a_filter_that_leaves_nothing_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"of 10 pictures none is left: .* do not pass data\.sources\[\]\.only"):
        dataset_of(pictures, tmp_path, sources=[{"path": str(pictures), "only": {"min_side_px": 65}}])


def test_all_sources_that_cannot_serve_are_named_at_once(pictures: Path, tmp_path: Path) -> None:
    sources = [{"path": str(tmp_path / "a")}, {"path": str(pictures)}, {"path": str(tmp_path / "b")}]
    with pytest.raises(UserError) as caught:
        dataset_of(pictures, tmp_path, sources=sources)
    assert [line.split(" = ")[0] for line in str(caught.value).splitlines()] == [
        "data.sources.0.path",
        "data.sources.2.path",
    ]


# What is cut out


def places_shown(config: Config, dataset: Dataset, record: int) -> list[tuple[int, int]]:
    """Return where the first visits of a record are cut, as the loader of a run finds it."""
    no_tokens = SimpleNamespace(with_weights=lambda captions: (torch.zeros(len(captions), 1),) * 2 + (None,))
    batches = _micro_batches(config, GROUP, no_tokens, dataset)
    seen = [batches.collect([Draw(record, visit)], (0,), 1).unencoded[0] for visit in range(100)]
    return [one.plan.crop_tl for one in seen]


def test_without_a_cache_a_random_crop_is_drawn_at_each_visit(pictures: Path, tmp_path: Path) -> None:
    random, none = {"position": "random"}, {"mode": "none"}
    config, dataset = dataset_of(pictures, tmp_path, crop=random, cache=none)
    shown = places_shown(config, dataset, 0)
    assert set(shown) == {(0, left) for left in range(9)}, "64x72 cut to 64x64"
    assert shown == places_shown(config, dataset_of(pictures, tmp_path, crop=random, cache=none)[1], 0)
    several = dataset_of(pictures, tmp_path, crop=random | {"variants": 2}, cache=none)
    assert len(set(places_shown(*several, 0))) == 2, "as with a cache"
    kept = dataset_of(pictures, tmp_path, crop=random, cache={"mode": "ahead"})[1]
    assert not kept.crops_anew
    assert differing(dataset, kept) == {CONTENT}, "a run does not go on with other crops"


@pytest.mark.parametrize("boxed", [False, True])
def test_focus_without_a_box_is_said(pictures: Path, tmp_path: Path, boxed: bool) -> None:
    own = Path(shutil.copytree(pictures, tmp_path / "own"))
    for number in range(10):
        box = ', "focus": [0, 0, 9, 9]' if boxed and number == 3 else ""
        (own / f"{number}.json").write_text(f'{{"caption": "a"{box}}}')
    heard = Heard()
    dataset_of(own, tmp_path, progress=heard, crop={"position": "focus"}, captions={"extension": ".json"})
    assert sum("no picture has a box" in text for text in heard.said) == (0 if boxed else 1)


# The cache


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written_is_blamed_and_no_source(pictures: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / where)  # the last one is absolute: a folder in which nobody, not even root, may write
    sources = [{"path": str(pictures)}, {"path": str(tmp_path / "absent")}]
    with pytest.raises(UserError) as caught:
        dataset_of(pictures, tmp_path, sources=sources, cache={"path": path})
    said = str(caught.value)
    assert said.startswith(f"data.cache.path = {path}: the cache's folder {path}/index cannot be written (")
    assert "data.sources" not in said


def test_the_default_cache_that_cannot_be_written_says_where_it_is(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"data\.cache\.path = null, that is <output_dir>/cache: .* cannot be written"):
        dataset_of(pictures, tmp_path)


@pytest.mark.parametrize("flip", [False, True])
def test_every_variant_is_encoded_by_itself(pictures: Path, tmp_path: Path, flip: bool) -> None:
    first = {"mode": "first"}
    plain_config, plain = dataset_of(pictures, tmp_path, cache=first)
    filled(plain_config, plain)
    crop = {"position": "random", "variants": 3, "flip": flip}
    config, dataset = dataset_of(pictures, tmp_path, crop=crop, cache=first)
    assert dataset.plan.latents() > len(plain.plan.records)
    filled(config, dataset)
    latents = fetched(dataset_of(pictures, tmp_path, crop=crop, cache=first)[1])
    assert all(isinstance(latent, Stored) for latent in latents)
    different = {latent.mean_CHW.numpy().tobytes() for latent in latents}
    assert len(latents) == len(different) == dataset.plan.latents()
    assert max(map(len, dataset.plan.variants)) == (6 if flip else 3)
    assert plain.schedule.images_per_epoch == dataset.schedule.images_per_epoch == 10
    assert differing(plain, dataset) == {CONTENT}


def test_what_is_filled_is_what_a_visit_would_have_made(pictures: Path, tmp_path: Path) -> None:
    """Pixels before, the latent of the same pixels after; a second filling has nothing to do."""
    for posterior in ("mean", "sample"):
        cache = {"mode": "first", "posterior": posterior}
        config, dataset = dataset_of(pictures, tmp_path / posterior, cache=cache)
        before = fetched(dataset)
        assert all(isinstance(one, Unencoded) for one in before)
        encoder = Encoder(encode, GROUP.device, 4, dataset.cache)
        made = [encoder([one])[0] for one in before if isinstance(one, Unencoded)]
        assert any("encoded" in line for line in filled(config, dataset))
        config, dataset = dataset_of(pictures, tmp_path / posterior, cache=cache)
        for latent, stored in zip(made, fetched(dataset), strict=True):
            assert isinstance(stored, Stored)
            assert torch.equal(stored.mean_CHW, latent[0])
            assert torch.equal(stored.std_CHW, latent[1])
            assert bool(stored.std_CHW.any()) is (posterior == "sample")

        def never(_: Tensor) -> tuple[Tensor, Tensor]:
            raise AssertionError("everything is there")

        filled(config, dataset, never)


def test_without_a_cache_nothing_is_written(pictures: Path, tmp_path: Path) -> None:
    config, dataset = dataset_of(pictures, tmp_path, cache={"mode": "none"})
    assert dataset.cache is None
    assert all(isinstance(one, Unencoded) for one in fetched(dataset))
    assert not latent_folder(config).exists()


def test_a_picture_without_a_finite_latent_belongs_to_the_vae_and_not_to_the_file(
    pictures: Path, tmp_path: Path
) -> None:
    """It keeps its place in every mode, with weight 0, and another VAE encodes it."""
    first: list[Tensor] = []

    def fails_once(pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        mean_BCHW, std_BCHW = encode(pixels_BCHW)
        first[:] = first or [pixels_BCHW[0]]
        for b, pixels_CHW in enumerate(pixels_BCHW):
            if pixels_CHW.shape == first[0].shape and torch.equal(pixels_CHW, first[0]):
                mean_BCHW[b] = float("nan")
        return mean_BCHW, std_BCHW

    config, dataset = dataset_of(pictures, tmp_path, cache={"mode": "first"})
    filled(config, dataset, fails_once)
    assert dataset.found.quarantined() == []
    _, again = dataset_of(pictures, tmp_path, cache={"mode": "first"})
    assert again.found.quarantined() == []
    assert sum(isinstance(one, Unencoded) for one in fetched(again)) == 1
    filled(config, again, encode)
    assert not any(isinstance(one, Unencoded) for one in fetched(again))


class Counted(Heard):
    """Remembers how far each bar came."""

    def __init__(self) -> None:
        super().__init__()
        self.bars: list[list[int]] = []

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        bar = [0, total]
        self.bars.append(bar)

        def advance(count: int) -> None:
            bar[0] += count

        yield advance


def test_verify_reads_all_that_is_kept_and_its_bar_ends_at_its_end(pictures: Path, tmp_path: Path) -> None:
    config, dataset = dataset_of(pictures, tmp_path, cache={"mode": "first", "text_variants": 1})
    filled(config, dataset)
    (shard,) = latent_folder(config).glob("*/*.blobs")
    shard.write_bytes(shard.read_bytes()[:-1])
    filled(*dataset_of(pictures, tmp_path, cache={"mode": "first", "text_variants": 1}))
    counted = Counted()
    verify_cache(config, counted)
    assert counted.bars == [[11, 11], [0, 0]], "ten pictures, one of them twice; no text states yet"
    assert [text.split(" are ")[0] for text in counted.said] == ["10 latents", "0 text states"]
