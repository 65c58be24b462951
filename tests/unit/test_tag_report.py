"""What a run says of its tags: which weights are in effect, which concepts are learnt and which not, and how sure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdxl_training.assemble.tag_report import learned_sections, sections_of_run, weight_lines
from sdxl_training.config.tags import TagWeighting
from sdxl_training.tracking.report_plan import Section, sections_as_text
from sdxl_training.weighting.residuals import LEVELS, ResidualRule, TagResiduals
from sdxl_training.weighting.tag_table import TagFigures, tag_figures
from tests.tags import lists_of

NAMES = [f"t{number:02d}" for number in range(38)]
PICTURES = [*([name] for name in NAMES), ["easy"], ["hard"]]
FACTOR = np.array([1.0] * 38 + [0.6, 1.8])
STATIC = TagWeighting.model_validate({"static": {"type": "frequency"}})


def figures(
    updates: int | None, weight_P: np.ndarray | None = None, factor_P: np.ndarray = FACTOR, **shares: float
) -> TagFigures:
    """Return 40 tags, each on a picture of its own, after so many updates; None: their losses are not followed."""
    lists, residuals = lists_of(PICTURES, shares=shares), None
    if updates is not None:
        generator, residuals = np.random.default_rng(1), TagResiduals(lists, ResidualRule())
        for _ in range(updates):
            picture_G, level_G = generator.integers(0, 40, 16), generator.integers(0, LEVELS, 16)
            residuals.see(picture_G, level_G, factor_P[picture_G] * np.exp(0.4 * generator.standard_normal(16)))
    weights = np.ones(40) if weight_P is None else weight_P
    return tag_figures(lists, lists.count(), lists.count(), np.ones(40), weights, residuals)


def tags_of(section: Section) -> list[str]:
    return [] if section.table is None else [row[-1] for row in section.table.rows]


# --- learned or not --------------------------------------------------------------------------------------------------


def test_what_loses_more_is_not_yet_learned_and_what_loses_less_is():
    behind, ahead = learned_sections(figures(400))
    assert (behind.title, ahead.title) == ("Concepts not yet learned", "Concepts already learned")
    assert tags_of(behind)[0] == "hard"
    assert tags_of(ahead)[0] == "easy"
    assert behind.table.rows[0][0].endswith("x")
    assert float(behind.table.rows[0][0][:-1]) > 1 > float(ahead.table.rows[0][0][:-1])
    assert float(behind.table.rows[0][1]) > 2 > -2 > float(ahead.table.rows[0][1])
    assert "lose more than" in behind.lines[0]
    assert "lose less than" in ahead.lines[0]


def test_of_tags_that_are_alike_hardly_any_is_named_and_chance_is_mentioned():
    sections = learned_sections(figures(400, factor_P=np.ones(40)))
    assert sum(len(tags_of(section)) for section in sections) <= 6
    for section in sections:
        assert "by more than two standard errors" in section.lines[0]
        assert "of 40 tags seen 20 times or more" in section.lines[1]
        assert section.lines[1].endswith("chance alone would put less than one here")


def test_by_chance_two_of_a_hundred_tags_would_be_on_either_side():
    lists, generator = lists_of([[f"t{number:03d}"] for number in range(200)]), np.random.default_rng(0)
    residuals = TagResiduals(lists, ResidualRule())
    for _ in range(400):
        residuals.see(generator.integers(0, 200, 16), np.zeros(16, np.int64), np.exp(generator.standard_normal(16)))
    known = tag_figures(lists, lists.count(), lists.count(), np.ones(200), np.ones(200), residuals)
    expected = round(0.02275 * int(known.judged().sum()))
    for section in learned_sections(known):
        assert section.lines[1].endswith(f"chance alone would put {expected} here")


def test_early_on_and_without_statistics_nobody_is_judged():
    assert sections_as_text(learned_sections(figures(2))) == "Concepts\n  no tag has been seen 20 times yet"
    (section,) = learned_sections(figures(None))
    assert section.lines == ["tag_weighting.statistics.enabled: false, so no tag's loss is followed"]


# --- weights ---------------------------------------------------------------------------------------------------------


def test_a_run_tells_which_weights_are_in_effect():
    weight_P = np.array([0.5, 1.5] * 20)
    first, *rest = sections_of_run(figures(400, weight_P), STATIC)
    assert first.lines == weight_lines(figures(400, weight_P), STATIC)
    assert "weights of pictures 0.500 to 1.500, mean 1.000000" in first.lines[0]
    assert "(sum w)^2 / (N sum w^2) = 80.0 %" in first.lines[1]
    assert [section.title for section in rest] == ["Concepts not yet learned", "Concepts already learned"]


@pytest.mark.parametrize(
    ("section", "shares", "why"),
    [
        ({}, {}, "static: {type: frequency} lets rare tags count more"),
        ({"static": {"type": "frequency"}}, {"general": 0.0}, "categories.shares is 0 for every category"),
        ({"static": {"type": "frequency"}}, {}, "min_count"),
        ({"dynamic": {"type": "residual_loss"}}, {}, "follow the training"),
    ],
)
def test_where_all_count_the_same_it_is_said_why(section: dict[str, Any], shares: dict[str, float], why: str):
    (line,) = weight_lines(figures(None, **shares), TagWeighting.model_validate(section))
    assert line.startswith("all pictures count the same; ")
    assert why in line


def test_the_tags_own_factor_is_its_static_weight():
    lists = lists_of([["a"], ["b"]])
    ones = np.ones(2)
    rows = tag_figures(lists, ones, ones, ones, ones, static_K=np.log([2.5, 0.5])).rows(range(2))
    assert [row.static_factor for row in rows] == [2.5, 0.5]
    assert [row.static_factor for row in tag_figures(lists, ones, ones, ones, ones).rows(range(2))] == [None, None]
