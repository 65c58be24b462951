"""What looks nearly the same and what does not, on drawn and made-up pictures; pairs and groups against brute force."""

import io
import math
import time

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from sdxl_training.data import perceptual
from sdxl_training.data.demo_set import PictureSpec, draw_picture, draw_specs
from sdxl_training.data.images import digest_content
from sdxl_training.data.perceptual import (
    SIGNATURE,
    WITHIN_BITS,
    Bands,
    first_alike,
    look_alike,
    near_pictures,
    perceptual_hash,
    read_signatures,
    sign,
    write_signatures,
)
from sdxl_training.records import UserError
from tests.pictures import encoded
from tests.unit.test_duplicates import Bar, Memory, Shelf, on_ranks


def saved(pixels, kind="JPEG", **options):
    return np.array(Image.open(io.BytesIO(encoded(pixels, kind, **options))).convert("RGB"))


def resized(pixels, factor):
    height, width = pixels.shape[:2]
    return np.array(Image.fromarray(pixels).resize((round(width * factor), round(height * factor)), Image.LANCZOS))


def brighter(pixels, factor, plus=0.0):
    return np.clip(pixels * factor + plus, 0, 255).round().astype(np.uint8)


def photo(seed, height=240, width=320):
    """Noise with the spectrum of photographs, 1/f (Field 1987), in colour."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    planes = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency) for _ in range(3)]
    planes = [plane / plane.std() for plane in planes]
    return np.clip(127 + 35 * np.stack([planes[0] + 0.4 * plane for plane in planes], -1), 0, 255).astype(np.uint8)


def smooth(seed):
    colours = np.random.default_rng(seed).integers(30, 226, (4, 5, 3), np.uint8)
    return cv2.resize(colours, (320, 256), interpolation=cv2.INTER_LINEAR)


def drawing(seed):
    """A few thin lines on white."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (256, 256), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        pen.line(tuple(rng.integers(20, 236, 8).tolist()), fill="black", width=2)
    return np.array(image)


DEMO = [draw_picture(spec, (128, 128)) for spec in draw_specs(0, 60)]
PHOTOS = [photo(seed) for seed in range(12)]
SMOOTH = [smooth(seed) for seed in range(12)]
CHANGES = {
    "JPEG 95": lambda p: saved(p, quality=95),
    "JPEG 75": lambda p: saved(p, quality=75),
    "JPEG 60, 4:2:0": lambda p: saved(p, quality=60, subsampling=2),
    "WebP": lambda p: saved(p, "WEBP", quality=80),
    "half": lambda p: resized(p, 0.5),
    "three quarters as JPEG": lambda p: saved(resized(p, 0.75), quality=85),
    "larger": lambda p: resized(p, 1.6),
    "brighter": lambda p: brighter(p, 1.0, 6),
    "darker": lambda p: brighter(p, 0.96),
}


def pairs_of(signatures):
    """All pairs that look alike, by comparing everything."""
    left, right = np.triu_indices(len(signatures), 1)
    near = look_alike(signatures[left], signatures[right])
    return list(zip(left[near].tolist(), right[near].tolist(), strict=True))


def signed(pictures):
    return np.array([sign(picture) for picture in pictures], SIGNATURE)


# One picture


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize(
    ("pictures", "may_miss"), [(DEMO, 3), (PHOTOS, 0), (SMOOTH, 0)], ids=["demo", "photo", "smooth"]
)
def test_the_same_picture_is_recognised(pictures, may_miss, change):
    changed = [change(picture) for picture in pictures]
    differing = [
        (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()
        for one, other in zip(pictures, changed, strict=True)
    ]
    assert sum(bits > WITHIN_BITS for bits in differing) <= may_miss
    assert (~look_alike(signed(pictures), signed(changed))).sum() <= may_miss


@pytest.mark.parametrize(
    "picture", [DEMO[0], PHOTOS[0], SMOOTH[0], drawing(0)], ids=["demo", "photo", "smooth", "lines"]
)
def test_mirrored_turned_and_cropped_are_other_pictures(picture):
    rows, columns = (side // 12 for side in picture.shape[:2])
    for other in (picture[:, ::-1], picture[::-1], picture[rows:, columns:], picture.transpose(1, 0, 2)):
        assert not look_alike(signed([picture]), signed([np.ascontiguousarray(other)]))[0]


def test_the_hash_is_the_published_one_where_no_coefficient_is_near_the_median():
    small = cv2.resize(PHOTOS[3], (32, 32), interpolation=cv2.INTER_AREA) @ np.array([0.299, 0.587, 0.114])
    place = np.arange(32)
    basis = np.cos(math.pi * (2 * place + 1) * place[:, None] / 64) * math.sqrt(2 / 32)
    basis[0] /= math.sqrt(2)
    low = (basis @ small @ basis.T)[:8, :8].ravel()
    median = np.median(low[1:])
    bits = perceptual_hash(PHOTOS[3])
    clear = [k for k in range(1, 64) if not -0.01 < low[k] - median - 2 < 0.01]
    assert len(clear) > 55
    assert [bits >> k & 1 for k in clear] == [int(low[k] > median + 2) for k in clear]
    assert bits & 1 == 0


def test_pictures_without_structure_have_no_bits():
    flat = np.full((40, 60, 3), 90, np.uint8)
    noisy = flat + np.random.default_rng(0).integers(0, 3, flat.shape, np.uint8)
    assert perceptual_hash(flat) == perceptual_hash(noisy) == 0
    assert look_alike(signed([flat]), signed([noisy]))[0]


@pytest.mark.parametrize("shape", [(1, 1), (5, 700), (31, 33)])
def test_small_and_narrow_pictures_have_signatures(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert look_alike(signed([pixels]), signed([pixels]))[0]


# Different pictures


def test_colour_counts():
    # Red and green of one grey value: the hash is blind for the difference.
    colours = [(200, 40, 40), (10, 133, 60), (40, 83, 240)]
    assert len({round(np.dot(colour, (0.299, 0.587, 0.114))) for colour in colours}) == 1
    pictures = []
    for colour in colours:
        picture = np.full((128, 128, 3), 230, np.uint8)
        pictures.append(cv2.circle(picture, (60, 66), 40, colour, -1))
    assert len({perceptual_hash(picture) for picture in pictures}) == 1
    assert pairs_of(signed(pictures)) == []
    one, other = (draw_picture(PictureSpec(name, "circle", "yellow"), (128, 128)) for name in ("red", "blue"))
    assert pairs_of(signed([one, other])) == []


def test_shape_counts():
    small, large = cv2.resize(PHOTOS[0], (256, 256)), cv2.resize(PHOTOS[0], (256, 280))
    assert not look_alike(signed([small]), signed([large]))[0]


def test_brightness_counts_when_it_is_not_slight():
    assert not look_alike(signed([SMOOTH[0]]), signed([brighter(SMOOTH[0], 1.0, 20)]))[0]


def two_levels(low, high):
    """A signature whose colours are these two in turns: contrast and difference from their middle are the same."""
    signature = np.zeros(1, SIGNATURE)
    signature["thumbnail_CK"] = np.where(np.arange(64) % 2, high, low)
    return signature


@pytest.mark.parametrize(
    ("contrast", "difference", "same"),
    [(60, 10, True), (60, 11, False), (20, 6, True), (20, 8, False), (0, 2, True), (0, 4, False)],
)
def test_a_difference_must_be_small_beside_the_contrast(contrast, difference, same):
    one = two_levels(120 - contrast, 120 + contrast)
    other = one.copy()
    other["thumbnail_CK"][0, 1, 5] += np.uint8(difference)
    assert look_alike(one, other)[0] == look_alike(other, one)[0] == same


def test_the_lower_contrast_counts():
    flat, rough = two_levels(120, 120), two_levels(118, 123)  # 2.5: as much as the rough one by itself would allow
    assert not look_alike(flat, rough)[0]
    assert not look_alike(rough, flat)[0]


def test_demo_pictures_that_look_the_same_are_the_same():
    specs = draw_specs(0, 720)
    signatures = signed([draw_picture(spec, (128, 128)) for spec in specs])
    hashes = signatures["hash"]
    left, right = np.triu_indices(len(specs), 1)
    assert (np.array([bin(x).count("1") for x in (hashes[left] ^ hashes[right]).tolist()]) <= WITHIN_BITS).sum() > 300
    pairs = pairs_of(signatures)
    assert 0 < len(pairs) < 20
    for one, other in pairs:
        first, second = specs[one], specs[other]
        assert first.tags == second.tags
        lengths = [(spec.radius, *spec.offset_yx) for spec in (first, second)]
        assert np.abs(np.subtract(*lengths)).max() < 0.012  # of 128 pixels


def test_different_pictures_do_not_look_the_same():
    assert pairs_of(signed(PHOTOS + SMOOTH + [photo(seed, 96, 128) for seed in range(100, 400)])) == []
    assert pairs_of(signed([drawing(seed) for seed in range(300)])) == []


def test_looking_alike_does_not_depend_on_the_order():
    signatures = signed([*DEMO, *(saved(picture, quality=20) for picture in DEMO)])
    left, right = np.triu_indices(len(signatures), 1)
    assert np.array_equal(
        look_alike(signatures[left], signatures[right]), look_alike(signatures[right], signatures[left])
    )


# Pairs and groups


def near_hashes(rng, count, flips):
    """Hashes of which many differ from another one in a few bits."""
    hashes = rng.integers(0, 2**64, count, np.uint64, endpoint=False)
    for number in range(max(1, count // 3), count):
        hashes[number] = hashes[rng.integers(0, number)]
        for bit in rng.integers(0, 64, rng.integers(0, flips + 1)):
            hashes[number] ^= np.uint64(1) << np.uint64(bit)
    return hashes


@pytest.mark.parametrize("within", [0, 1, 3, 4])
def test_all_pairs_within_the_distance_are_candidates(within):
    hashes = near_hashes(np.random.default_rng(within), 300, within + 1)
    numbers = np.arange(300)
    bands = Bands(hashes, within)
    left, right = bands.later(numbers)
    assert (left < right).all()
    found = set(zip(left.tolist(), right.tolist(), strict=True))
    near = {(i, j) for j in range(300) for i in range(j) if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= within}
    assert near <= found
    assert len(near) > 100
    assert len(found) < 3 * len(near)
    assert bands.count(numbers).tolist() == np.bincount(left, minlength=300).tolist()
    some = numbers[5::7]
    assert set(zip(*(side.tolist() for side in bands.later(some)), strict=True)) == {p for p in found if p[0] in some}


def one_after_another(signatures):
    """The rule in three lines: each picture goes to the first one that stands for itself and looks like it."""
    first = []
    for number in range(len(signatures)):
        heads = [k for k in range(number) if first[k] == k]
        alike = look_alike(signatures[heads], signatures[[number] * len(heads)])
        first.append(next((k for k, near in zip(heads, alike, strict=True) if near), number))
    return first


def families(rng, count):
    """Signatures in families and chains: each is a copy of an earlier one, with some bits and colours changed."""
    signatures = np.zeros(count, SIGNATURE)
    signatures["hash"] = near_hashes(rng, count, 0)
    signatures["thumbnail_CK"] = rng.integers(60, 190, (count, 3, 64))
    for number in range(5, count):
        signatures[number] = signatures[rng.integers(0, number)]
        for bit in rng.integers(0, 64, rng.integers(0, 3)):
            signatures["hash"][number] ^= np.uint64(1) << np.uint64(bit)
        signatures["thumbnail_CK"][number] += rng.integers(0, 6, (3, 1)).astype(np.uint8)
    return signatures[rng.permutation(count)]


@given(st.integers(0, 2**32), st.integers(1, 120), st.sampled_from([(2**21, 2**17, 2**14), (40, 9, 16), (1, 1, 1)]))
@settings(max_examples=40)
def test_groups_are_those_of_one_picture_after_another(seed, count, limits):
    signatures = families(np.random.default_rng(seed), count)
    names = ("PAIRS_AT_ONCE", "PICTURES_AT_ONCE", "THUMBNAILS_AT_ONCE")
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in zip(names, limits, strict=True):
            patch.setattr(perceptual, name, limit)
        assert first_alike(signatures).tolist() == one_after_another(signatures)


def test_memory_is_bounded(monkeypatch):
    rng = np.random.default_rng(0)
    signatures = families(rng, 400)
    signatures["hash"][::2] = 9
    sizes = []
    later = Bands.later

    def counting(self, numbers):
        left, right = later(self, numbers)
        sizes.append((len(numbers), len(left)))
        return left, right

    monkeypatch.setattr(perceptual, "PAIRS_AT_ONCE", 5000)
    monkeypatch.setattr(Bands, "later", counting)
    assert first_alike(signatures).tolist() == one_after_another(signatures)
    assert len(sizes) > 3
    assert all(pairs <= 5000 or numbers == 1 for numbers, pairs in sizes)


def test_the_ends_of_a_chain_are_not_one_group():
    start = DEMO[0].astype(int)
    chain = signed([np.clip(start * 0.8 + 4 * step, 0, 255).astype(np.uint8) for step in range(8)])
    assert first_alike(chain).tolist() == [0, 0, 0, 0, 4, 4, 4, 4]


def test_many_pictures_and_many_of_one_look_take_seconds():
    rng = np.random.default_rng(0)
    signatures = np.zeros(100_000, SIGNATURE)
    signatures["hash"] = rng.integers(0, 2**64, len(signatures), np.uint64, endpoint=False)
    signatures["thumbnail_CK"] = rng.integers(0, 256, (200, 3, 64))[rng.integers(0, 200, len(signatures))]
    signatures["hash"][::50] = 7
    signatures["thumbnail_CK"][::50] = 200
    signatures[1::1000] = signatures[2::1000]
    start = time.perf_counter()
    first = first_alike(signatures)
    assert (first[::50] == 0).all()
    assert (first[2::1000] == np.arange(1, 100_000, 1000)).all()
    assert (first != np.arange(len(first))).sum() == 2000 - 1 + 100
    assert time.perf_counter() - start < 10  # 0.6 s on a quiet core


# All pictures of a run


def a_shelf():
    """Number: 0 photo, 1 another, 2 the first as JPEG, 3 damaged, 4 the first's very bytes, 5 the second, smaller."""
    one, two = encoded(PHOTOS[0]), encoded(PHOTOS[1])
    jpeg, half = encoded(PHOTOS[0], "JPEG", quality=80), encoded(resized(PHOTOS[1], 0.5), "WEBP", quality=85)
    return Shelf([one, two, jpeg, jpeg[:2000], one, half])


ALIKE = [0, 1, 0, 3, 0, 1]


def find(shelf, memory, folder, **options):
    bar = Bar()
    groups = near_pictures(shelf, memory, folder, bar, threads=2, **options)
    assert bar.complete
    return groups, bar


def test_near_duplicates_are_found_and_decoded_once_in_their_life(tmp_path):
    shelf, memory = a_shelf(), Memory(6)
    groups, bar = find(shelf, memory, tmp_path / "new")
    assert groups.leader_P.tolist() == ALIKE
    assert groups.kept_mask().tolist() == [True, True, False, True, False, False]
    assert [members.tolist() for members in groups.members] == [[0, 2, 4], [1, 5]]
    assert list(memory.failures) == [3]
    assert [memory.known(number) for number in range(6)] == [digest_content(data) for data in shelf.files]
    assert "6 pictures are decoded" in bar.said[0]
    assert bar.done == {"comparing pictures": (6, 6)}
    shelf.reads.clear()
    groups, bar = find(shelf, memory, tmp_path / "new")
    assert groups.leader_P.tolist() == ALIKE
    assert (dict(shelf.reads), bar.said, bar.done) == ({}, [], {})


def test_only_new_contents_are_decoded(tmp_path):
    shelf, memory = a_shelf(), Memory(6)
    find(shelf, memory, tmp_path)
    more = Shelf([encoded(PHOTOS[1], "JPEG", quality=70), *shelf.files, encoded(PHOTOS[2])])
    known = Memory(8)
    known.digests[1:7], known.failures = memory.digests, {4: "damaged"}
    groups, _ = find(more, known, tmp_path)
    assert groups.leader_P.tolist() == [0, 1, 0, 1, 4, 1, 0, 7]  # the new one is the first of its kind
    assert set(more.reads) == {0, 7}


def test_of_pictures_known_to_be_equal_one_is_decoded(tmp_path):
    shelf, memory = a_shelf(), Memory(6)
    for number in (0, 4):
        memory.learn(number, bytes(16))  # which is put right when the file is read
    assert find(shelf, memory, tmp_path)[0].leader_P.tolist()[:3] == [0, 1, 0]
    assert set(shelf.reads) == {0, 1, 2, 3, 5}


def test_what_cannot_be_read_or_decoded_is_like_none(tmp_path):
    shelf = a_shelf()
    damaged, memory = shelf.files[3], Memory(8)
    files = Shelf([damaged, *shelf.files, None])
    memory.learn(0, digest_content(damaged))  # its bytes have been read, but nobody has decoded them
    assert find(files, memory, tmp_path)[0].leader_P.tolist() == [0, 1, 2, 1, 4, 1, 2, 7]
    assert set(memory.failures) == {0, 4, 7}
    assert memory.known(7) is None
    files.reads.clear()
    assert find(files, memory, tmp_path)[0].leader_P.tolist() == [0, 1, 2, 1, 4, 1, 2, 7]
    assert set(files.reads) == {7}  # the damaged one is not tried again, by content


def test_groups_do_not_change_when_pictures_are_found_to_be_of_no_use(tmp_path):
    shelf, memory = a_shelf(), Memory(6)
    memory.fail(0, "its latent is not finite")
    assert find(shelf, memory, tmp_path)[0].leader_P.tolist() == ALIKE
    memory.fail(1, "its latent is not finite")
    assert find(shelf, memory, tmp_path)[0].leader_P.tolist() == ALIKE


def test_what_takes_no_part_is_neither_decoded_nor_named(tmp_path):
    shelf = a_shelf()
    groups, _ = find(shelf, Memory(6), tmp_path, among_P=np.array([False, True, True, True, True, True]))
    assert groups.leader_P.tolist() == [0, 1, 2, 3, 2, 1]
    assert 0 not in shelf.reads


def test_the_background_of_transparent_pictures_counts(tmp_path):
    pixels = np.zeros((64, 64, 4), np.uint8)
    clear = encoded(Image.fromarray(pixels, "RGBA"))
    white = encoded(np.full((64, 64, 3), 255, np.uint8))
    for background, expected in (((255, 255, 255), [0, 0]), ((0, 0, 0), [0, 1]), ((255, 255, 255), [0, 0])):
        assert find(Shelf([clear, white]), Memory(2), tmp_path, background=background)[0].leader_P.tolist() == expected


def test_an_interrupted_start_keeps_what_it_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "SAVE_EVERY", 2)
    shelf, memory = a_shelf(), Memory(6)
    whole = shelf.files[4]
    shelf.files[4] = "no bytes"  # a fault of the program's
    with pytest.raises(TypeError):
        near_pictures(shelf, memory, tmp_path, Bar(), threads=1)
    shelf.files[4] = whole
    shelf.reads.clear()
    assert find(shelf, memory, tmp_path)[0].leader_P.tolist() == ALIKE
    assert set(shelf.reads) <= {4, 5}


def test_a_damaged_file_costs_time_only(tmp_path, caplog):
    shelf, memory = a_shelf(), Memory(6)
    find(shelf, memory, tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    for bad in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b"", b"looks000" + good[8:], good[:20]):
        file.write_bytes(bad)
        shelf.reads.clear()
        caplog.clear()
        assert find(shelf, memory, tmp_path)[0].leader_P.tolist() == ALIKE
        assert len(shelf.reads) >= 4
        assert [str(file) in record.getMessage() for record in caplog.records] == [True]
        shelf.reads.clear()
        assert find(shelf, memory, tmp_path)[0].leader_P.tolist() == ALIKE
        assert not shelf.reads


def test_signatures_come_back_as_written(tmp_path):
    rng = np.random.default_rng(0)
    entries = np.frombuffer(rng.bytes(perceptual.ENTRY.itemsize * 30), perceptual.ENTRY)
    write_signatures(tmp_path / "file", [entries[:11], entries[11:11], entries[11:]])
    assert read_signatures(tmp_path / "file").tobytes() == entries.tobytes()
    assert len(read_signatures(tmp_path / "none")) == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        find(a_shelf(), Memory(6), tmp_path / "file" / "folder")


def test_all_processes_agree_and_share_the_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "SAVE_EVERY", 4)
    written = []
    monkeypatch.setattr(
        perceptual, "write_signatures", lambda path, entries: written.append(1) or write_signatures(path, entries)
    )
    shelf, memories = a_shelf(), [Memory(6), Memory(6), Memory(6)]
    memories[1].fail(0, "only this process thinks so")
    results = on_ranks(
        3, lambda rank: near_pictures(shelf, memories[rank.rank], tmp_path, Bar(), processes=rank, threads=1)
    )
    assert [result.leader_P.tolist() for result in results] == [ALIKE] * 3
    assert set(shelf.reads.values()) == {1}
    assert len(shelf.reads) == 6
    assert len(written) == 2  # once a round, by the first process
    assert len(list(tmp_path.iterdir())) == 1
    assert len({tuple(sorted(memory.failures)) for memory in memories}) > 1  # each learns what it saw itself
