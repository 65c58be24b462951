"""Captions of one visit: what must stay, what may go, that chances are what they say, and what brackets mean."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.data.caption_weights import escape_lone_brackets, parse_weights, split_outside_brackets
from sdxl_training.data.captions import (
    CaptionRules,
    draw_caption,
    join_tags,
    split_alternatives,
    split_tags,
    whole_captions,
)
from sdxl_training.records import UserError
from sdxl_training.rng import Stream, numpy_generator

TAGS = tuple(f"tag {i}" for i in range(8))
CAPTION = ", ".join(TAGS)
TEMPLATES = ("a picture of {caption}", "{tags}.", "{caption} ({tags})")

rules = st.builds(
    CaptionRules,
    shuffle=st.booleans(),
    keep_first=st.integers(0, 10),
    tag_dropout=st.floats(0, 1),
    caption_dropout=st.just(0.0),
)
all_rules = st.builds(
    CaptionRules,
    shuffle=st.booleans(),
    keep_first=st.integers(0, 10),
    tag_dropout=st.floats(0, 1),
    caption_dropout=st.floats(0, 1),
    kind=st.sampled_from(["tags", "prose"]),
    null_mode=st.sampled_from(["zeros", "empty_string"]),
    templates=st.sampled_from([(), TEMPLATES]),
    front=st.sampled_from([(), ("tag 3", "new")]),
    back=st.sampled_from([(), ("tag 5",)]),
    weights=st.booleans(),
)


def augment(tags: tuple[str, ...], rules: CaptionRules, generator: np.random.Generator) -> str | None:
    """Draw from a picture with one caption of these tags."""
    return draw_caption([",".join(tags)], rules, generator)


def generator(visit: int, sample_id: int = 5) -> np.random.Generator:
    return numpy_generator(1, Stream.CAPTION, visit, sample_id)


def captions(rules: CaptionRules, count: int) -> list[str | None]:
    return [augment(TAGS, rules, generator(visit)) for visit in range(count)]


def assert_equally_likely(drawn: list[object], kinds: int) -> None:
    """Every kind is drawn, each as often as another: within five standard deviations."""
    counts = Counter(drawn)
    assert len(counts) == kinds
    expected = len(drawn) / kinds
    assert max(abs(count - expected) for count in counts.values()) < 5 * (expected * (1 - 1 / kinds)) ** 0.5


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


@given(rules=rules, visit=st.integers(0, 2**40), chance=st.floats(0, 1))
def test_rules_added_later_do_not_move_the_numbers_of_the_first_ones(rules, visit, chance):
    """What the first version of `augment` drew, written down again."""
    draws = numpy_generator(1, Stream.CAPTION, visit, 5)
    dropped = draws.random() < chance
    rest = TAGS[rules.keep_first :]
    survives = draws.random(len(rest)) >= rules.tag_dropout
    order = draws.permutation(len(rest)) if rules.shuffle else range(len(rest))
    tags = [*TAGS[: rules.keep_first], *(rest[i] for i in order if survives[i])]
    rules = replace(rules, caption_dropout=chance)
    assert augment(TAGS, rules, generator(visit)) == (None if dropped else ", ".join(tags))
    assert draw_caption([CAPTION], rules, generator(visit)) == (None if dropped else ", ".join(tags))
    twice = draw_caption([CAPTION, CAPTION], replace(rules, templates=("x {tags}", "y {caption}")), generator(visit))
    assert (twice is None) is dropped
    assert dropped or not tags or twice[2:] == ", ".join(tags)


@given(rules=all_rules, visit=st.integers(0, 2**40))
def test_a_visit_has_one_caption(rules, visit):
    drawn = [draw_caption([CAPTION, "two, words"], rules, generator(visit), ["a", "b"]) for _ in range(2)]
    assert drawn[0] == drawn[1]


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
    drawn = [augment(("a", "b", "c"), CaptionRules(shuffle=True), generator(visit)) for visit in range(3000)]
    assert_equally_likely(drawn, 6)


def test_one_rule_does_not_move_the_numbers_of_another():
    plain = captions(CaptionRules(caption_dropout=0.5), 200)
    shuffled = captions(CaptionRules(caption_dropout=0.5, tag_dropout=0.5, shuffle=True), 200)
    assert [caption is None for caption in plain] == [caption is None for caption in shuffled]
    kept = captions(CaptionRules(tag_dropout=0.5), 50)
    assert [set(split_tags(c, ",")) for c in captions(CaptionRules(tag_dropout=0.5, shuffle=True), 50)] == [
        set(split_tags(c, ",")) for c in kept
    ]


def test_a_dropped_caption_is_zeros_or_the_empty_string():
    zeros = captions(CaptionRules(caption_dropout=0.5), 100)
    empty = captions(CaptionRules(caption_dropout=0.5, null_mode="empty_string", front=("new",)), 100)
    assert ["" if caption is None else f"new, {caption}" for caption in zeros] == empty
    assert 0 < empty.count("") < 100


def test_every_alternative_and_every_template_is_equally_likely():
    alternatives, rules = ["a", "b", "c"], CaptionRules(templates=("1{caption}", "2{caption}"))
    drawn = [draw_caption(alternatives, rules, generator(visit)) for visit in range(6000)]
    assert_equally_likely(drawn, 6)
    alone = [draw_caption(alternatives, CaptionRules(), generator(visit)) for visit in range(100)]
    assert alone == [caption[1:] for caption in drawn[:100]], "a template does not move the choice of the alternative"


def test_files_of_alternatives():
    assert split_alternatives("a, b\n\n  c \r\n") == ("a, b", "c")
    assert split_alternatives(" \n") == ("",)


@given(
    prose=st.text(alphabet="ab ,.{}()"), rules=all_rules, visit=st.integers(0, 2**40), tags=st.sampled_from([(), TAGS])
)
def test_prose_stays_as_it_is(prose, rules, visit, tags):
    rules = replace(rules, kind="prose", caption_dropout=0.0, templates=(), front=(), back=())
    drawn = draw_caption([prose], rules, generator(visit), tags)
    if rules.weights:
        assert parse_weights(drawn) == parse_weights(prose.strip()), "but for the way lone brackets are written"
    else:
        assert drawn == prose.strip()


def test_templates_are_filled_once_and_only_where_there_is_something_to_say():
    prose = CaptionRules(kind="prose", templates=("{caption} Tags: {tags}",), shuffle=True)
    assert draw_caption(["a {tags} fox"], prose, generator(0), ("x",)) == "a {tags} fox Tags: x"
    of_tags = CaptionRules(templates=("a picture of {caption}",), front=("new",))
    assert draw_caption(["b, c"], of_tags, generator(0)) == "new, a picture of b, c"
    assert draw_caption([""], of_tags, generator(0)) == "new"
    listed = CaptionRules(kind="prose", templates=("{tags}",), keep_first=2, tag_dropout=1.0)
    assert draw_caption(["a, b, c"], listed, generator(0), ("x", "y", "z")) == "x, y"


@pytest.mark.parametrize(
    ("template", "named"),
    [("a picture", "no placeholder"), ("{name} of {caption}", "{name}"), ("{}", "no placeholder")],
)
def test_a_template_needs_a_placeholder_that_is_known(template, named):
    with pytest.raises(UserError, match=r"data\.captions\.templates") as error:
        CaptionRules(templates=("{tags}", template))
    assert template in str(error.value)
    assert named in str(error.value)


@given(rules=rules, visit=st.integers(0, 2**40))
def test_added_tags_are_always_there_and_only_there(rules, visit):
    rules = replace(rules, front=("tag 3", "new"), back=("tag 0",))
    tags = split_tags(augment(TAGS, rules, generator(visit)), ",")
    assert tags[:2] == ("tag 3", "new")
    assert tags[-1] == "tag 0"
    own = tuple(tag for tag in TAGS if tag not in {"tag 3", "tag 0"})
    assert tags[2:-1][: rules.keep_first] == own[: rules.keep_first]
    assert set(tags[2:-1]) <= set(own)


def test_separators():
    assert split_tags(" a ,, b,", ",") == ("a", "b")
    assert split_tags("a | b", "|") == ("a", "b")
    assert split_tags("", ",") == ()
    assert join_tags(("a", "b"), "|") == "a| b"
    assert join_tags(("a", "b"), " || ") == "a || b"
    assert join_tags(("a", "b"), " ") == "a b"
    assert augment((), CaptionRules(shuffle=True, tag_dropout=0.5), np.random.default_rng(0)) == ""


def test_whole_captions_are_those_of_the_visits_but_for_what_drops_out_or_moves():
    rules = CaptionRules(templates=TEMPLATES, front=("new",), shuffle=True, tag_dropout=0.5, caption_dropout=0.5)
    calm = replace(rules, shuffle=False, tag_dropout=0.0, caption_dropout=0.0)
    for kind in ("tags", "prose"):
        alternatives, tags = ["a, new, b", "c, d"], ["new", "x", "y"]
        drawn = {draw_caption(alternatives, replace(calm, kind=kind), generator(v), tags) for v in range(200)}
        assert len(drawn) == 6 or (kind == "prose" and len(drawn) == 5), "{tags} is the same for both proses"
        assert set(whole_captions(alternatives, replace(rules, kind=kind), tags)) == drawn
    assert whole_captions(["a", ""], CaptionRules()) == ["a", ""]


# Brackets

brackets = st.text(alphabet="ab ,:()[]\\0.")


@st.composite
def nested(draw, depth: int = 3) -> tuple[str, list[tuple[str, float]]]:
    """Return a caption with brackets, and each of its characters with its weight."""
    written, meant = "", []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["text", "(", "[", "(:"] if depth else ["text"]))
        if kind == "text":
            text = draw(st.text(alphabet="ab,: ()[]\\", min_size=1, max_size=4))
            written += "".join(f"\\{character}" if character in "()[]\\" else character for character in text)
            meant += [(character, 1.0) for character in text]
            continue
        inside, inside_meant = draw(nested(depth - 1))
        number = draw(st.sampled_from(["0.5", "1.3", ".75", "1", "+1.2"]))
        close, factor = {"(": (")", 1.1), "[": ("]", 1 / 1.1), "(:": (f":{number} )", float(number))}[kind]
        written += kind[0] + inside + close
        meant += [(character, weight * factor) for character, weight in inside_meant]
    return written, meant


def by_character(pieces) -> list[tuple[str, float]]:
    return [(character, weight) for text, weight in pieces for character in text]


@given(caption=nested())
def test_weights_mean_what_was_written(caption):
    written, meant = caption
    pieces = parse_weights(written)
    assert [character for character, _ in by_character(pieces)] == [character for character, _ in meant]
    np.testing.assert_allclose([w for _, w in by_character(pieces)], [w for _, w in meant], rtol=1e-12)
    assert all(left[1] != right[1] for left, right in pairwise(pieces))


@pytest.mark.parametrize(
    ("caption", "pieces"),
    [  # the documented examples of `parse_prompt_attention`, the last with its first bracket closed
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).)",
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
    ],
)
def test_weights_are_those_of_the_front_ends(caption, pieces):
    assert list(parse_weights(caption)) == pieces


@given(caption=brackets)
def test_no_brackets_are_an_error_and_lone_ones_are_text(caption):
    text = "".join(text for text, _ in parse_weights(caption))
    escaped = re.findall(r"\\[()\[\]\\]", caption)
    unescaped = re.sub(r"\\[()\[\]\\]", "", caption)
    for opening, closing in ("()", "[]"):
        lone = 0
        for character in unescaped:
            lone = lone + 1 if character == opening else max(0, lone - (character == closing))
        assert text.count(opening) == lone + escaped.count(f"\\{opening}")


def test_lone_brackets_and_other_backslashes_are_text():
    for caption in [":(, a", "a) b", r"\o/", "((", ":)", "a [b", ")("]:
        assert parse_weights(caption) == ((caption, 1.0),)
    assert parse_weights("((a)") == (("(", 1.0), ("a", 1.1))
    assert parse_weights("") == ()
    assert parse_weights("(a [b) c]") == (("a ", 1.1), ("b", 1.1 / 1.1), (" c", 1 / 1.1))


@pytest.mark.parametrize("caption", ["a, (year:2023)", "(a:-11)", "(" * 30 + "a" + ")" * 30, f"((a:0):{'9' * 400})"])
def test_weights_that_no_state_survives_are_refused(caption):
    with pytest.raises(UserError, match="weights lie between -10 and 10") as error:
        parse_weights(caption)
    assert repr(caption) in str(error.value)


@given(caption=brackets, others=st.tuples(brackets, brackets))
def test_brackets_without_partner_find_none_in_other_text(caption, others):
    """Pieces stay as they are wherever they stand, provided that the other text keeps its brackets to itself, too."""
    escaped = escape_lone_brackets(caption)
    assert parse_weights(escaped) == parse_weights(caption)
    before, after = map(escape_lone_brackets, others)
    together = by_character(parse_weights(f"{before},{escaped},{after}"))
    alone = [*parse_weights(before), (",", 1.0), *parse_weights(caption), (",", 1.0), *parse_weights(after)]
    assert together == by_character(alone)


def test_shuffled_tags_keep_their_weights_whatever_brackets_they_hold():
    rules = CaptionRules(shuffle=True, weights=True, templates=("({caption}), x",))
    caption = "year:20), (odd, :(, (red hair, blue:1.2), o\\"
    weights = {"year:20)": 1.1, "(odd": 1.1, ":(": 1.1, "red hair, blue": 1.1 * 1.2, "o\\": 1.1}
    orders = set()
    for visit in range(50):
        drawn = draw_caption([caption], rules, generator(visit))
        orders.add(drawn)
        pieces = by_character(parse_weights(drawn))
        text = "".join(character for character, _ in pieces)
        for tag, weight in weights.items():
            place = text.index(tag)
            assert [w for _, w in pieces[place : place + len(tag)]] == pytest.approx([weight] * len(tag))
    assert len(orders) > 20


@given(caption=brackets)
def test_tags_are_split_outside_brackets_only(caption):
    parts = split_outside_brackets(caption, ",")
    assert ",".join(parts) == caption
    if not set(caption) & set("()[]"):
        assert parts == caption.split(",")


def test_a_group_of_tags_stays_together_where_brackets_are_weights():
    caption = r"(red hair, blue eyes:1.2), miku \(a, b\), [c, (d, e)], :(, f"
    assert split_tags(caption, ",", weights=True) == (
        "(red hair, blue eyes:1.2)",
        r"miku \(a",
        r"b\)",
        "[c, (d, e)]",
        ":(",
        "f",
    )
    rules = CaptionRules(shuffle=True, weights=True)
    for visit in range(20):
        assert "(red hair, blue eyes:1.2)" in draw_caption([caption], rules, generator(visit))
    assert split_tags(caption, ",")[:2] == ("(red hair", "blue eyes:1.2)")
    assert split_tags("a || (b || c) || d|e", "||", weights=True) == ("a", "(b || c)", "d|e")
