"""Caption augmentation: what must stay, what may go, and that chances are what they say."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.data.captions import CaptionRules, augment, join_tags, split_tags
from sdxl_training.rng import Stream, numpy_generator

TAGS = tuple(f"tag {i}" for i in range(8))

rules = st.builds(
    CaptionRules,
    shuffle=st.booleans(),
    keep_first=st.integers(0, 10),
    tag_dropout=st.floats(0, 1),
    caption_dropout=st.just(0.0),
)


def captions(rules: CaptionRules, count: int) -> list[str | None]:
    return [augment(TAGS, rules, numpy_generator(1, Stream.CAPTION, visit, 5)) for visit in range(count)]


@given(rules=rules, visit=st.integers(0, 2**40))
def test_first_tags_stay_and_the_rest_is_a_part_without_repetition(rules, visit):
    caption = augment(TAGS, rules, numpy_generator(0, Stream.CAPTION, visit, 7))
    tags = split_tags(caption, ",")
    assert tags[: rules.keep_first] == TAGS[: rules.keep_first]
    assert len(set(tags)) == len(tags)
    assert set(tags) <= set(TAGS)
    if rules.tag_dropout == 0:
        assert set(tags) == set(TAGS)
    if rules.tag_dropout == 1:
        assert tags == TAGS[: rules.keep_first]
    if not rules.shuffle:
        assert list(tags) == sorted(tags, key=TAGS.index)


def test_without_rules_the_caption_is_the_caption():
    assert augment(split_tags("red circle, blue background,large", ","), CaptionRules(), np.random.default_rng(0)) == (
        "red circle, blue background, large"
    )


def test_dropout_happens_as_often_as_asked():
    count = 4000
    dropped = sum(caption is None for caption in captions(CaptionRules(caption_dropout=0.1), count))
    assert abs(dropped / count - 0.1) < 5 * (0.09 / count) ** 0.5
    left = [len(split_tags(caption, ",")) for caption in captions(CaptionRules(tag_dropout=0.25, keep_first=2), count)]
    assert abs(np.mean(left) - (2 + 6 * 0.75)) < 5 * (6 * 0.25 * 0.75 / count) ** 0.5


def test_every_order_is_equally_likely():
    orders = [
        augment(("a", "b", "c"), CaptionRules(shuffle=True), numpy_generator(3, Stream.CAPTION, v, 1))
        for v in range(3000)
    ]
    _, counts = np.unique(orders, return_counts=True)
    assert len(counts) == 6
    assert abs(counts - 500).max() < 5 * (3000 * 1 / 6 * 5 / 6) ** 0.5


def test_one_rule_does_not_move_the_numbers_of_another():
    plain = captions(CaptionRules(caption_dropout=0.5), 200)
    shuffled = captions(CaptionRules(caption_dropout=0.5, tag_dropout=0.5, shuffle=True), 200)
    assert [caption is None for caption in plain] == [caption is None for caption in shuffled]
    kept = captions(CaptionRules(tag_dropout=0.5), 50)
    assert [set(split_tags(c, ",")) for c in captions(CaptionRules(tag_dropout=0.5, shuffle=True), 50)] == [
        set(split_tags(c, ",")) for c in kept
    ]


def test_separators():
    assert split_tags(" a ,, b,", ",") == ("a", "b")
    assert split_tags("a | b", "|") == ("a", "b")
    assert split_tags("", ",") == ()
    assert join_tags(("a", "b"), "|") == "a| b"
    assert join_tags(("a", "b"), " || ") == "a || b"
    assert join_tags(("a", "b"), " ") == "a b"
    assert augment((), CaptionRules(shuffle=True, tag_dropout=0.5), np.random.default_rng(0)) == ""
