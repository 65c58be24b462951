"""What is said of each tag: counts, weights and losses of a small run by hand, and which tags are shown."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdxl_training.weighting.residuals import ResidualRule, TagResiduals
from sdxl_training.weighting.tag_table import LEAST_SEEN, TagFigures, TagRow, tag_figures
from tests.tags import lists_of

PICTURES = [["a", "b"], ["a"], ["a", "c"], ["d"], []]
REPEATS = np.array([2.0, 1.0, 1.0, 0.0, 1.0])
SHARE_P, WEIGHT_P = REPEATS * np.array([1.0, 1.0, 3.0, 1.0, 1.0]), np.array([0.5, 1.0, 2.0, 9.0, 1.0])
LISTS = lists_of(PICTURES, {"c": "other"})


def figures(residuals: TagResiduals | None = None) -> TagFigures:
    return tag_figures(LISTS, LISTS.count((REPEATS > 0) * 1.0), LISTS.count(REPEATS), SHARE_P, WEIGHT_P, residuals)


def names(rows: tuple[TagRow, ...]) -> list[str]:
    return [row.tag for row in rows]


def test_rows_are_counted_by_hand():
    rows = {row.tag: row for row in figures().rows(range(4))}
    assert rows["a"] == TagRow("a", "general", pictures=3, images=4, weight=round((2 * 0.5 + 1 + 3 * 2) / 6, 4))
    assert rows["b"] == TagRow("b", "general", 1, 2, 0.5)
    assert rows["c"] == TagRow("c", "other", 1, 1, 2.0)
    assert rows["d"] == TagRow("d", "general", 0, 0, 1.0), "on a picture that is left out"


def test_which_tags_are_shown():
    assert names(figures().most_frequent(2)) == ["a", "b"]
    assert names(figures().rarest(2)) == ["c", "b"]
    assert names(figures().rarest(9)) == ["c", "b", "a"], "not the one that no image has"
    assert figures().not_yet_learned(9) == figures().learned(9) == ()


def test_curves_go_evenly_from_the_commonest_to_the_rarest():
    lists = lists_of([[f"t{k:02d}" for k in range(40) if k <= p] for p in range(40)])
    columns = (lists.count(), lists.count(), np.ones(40), np.ones(40))
    spread = tag_figures(lists, *columns).spread_over_frequency(5)
    assert [lists.names_K[number] for number in spread] == ["t00", "t09", "t19", "t28", "t38"]
    assert tag_figures(lists, *columns).spread_over_frequency(0) == []
    assert len(tag_figures(lists, *columns).spread_over_frequency(99)) == 39, "one tag is on a single picture"


def test_losses_are_shown_of_tags_that_were_seen_often_enough():
    residuals = TagResiduals(LISTS, ResidualRule(1e6, 0.0))
    for _ in range(LEAST_SEEN + 1):  # the first one tells the level's mean
        residuals.see(np.array([0, 1, 1, 1]), np.zeros(4, np.int64), np.array([2.0, 1.0, 1.0, 1.0]))
    known = figures(residuals)
    assert names(known.not_yet_learned(9)) == ["b"]
    assert names(known.learned(9)) == ["a"]
    rows = {row.tag: row for row in known.rows(range(4))}
    assert rows["b"].seen == LEAST_SEEN
    assert rows["b"].relative_loss / rows["a"].relative_loss == pytest.approx(
        math.exp(residuals.relative()[1] - residuals.relative()[0]), rel=1e-3
    )
    assert rows["b"].standard_errors > 2 > -2 > rows["a"].standard_errors
    assert (rows["d"].seen, rows["d"].relative_loss, rows["d"].standard_errors, rows["d"].trend) == (0, 1.0, 0.0, 0.0)
    few = TagResiduals(LISTS, ResidualRule(1e6, 0.0))
    for _ in range(LEAST_SEEN):
        few.see(np.array([0, 1, 1, 1]), np.zeros(4, np.int64), np.array([2.0, 1.0, 1.0, 1.0]))
    assert names(figures(few).not_yet_learned(9)) == [], "one appearance too few"


def test_of_tags_that_are_alike_hardly_any_is_called_learned_or_not():
    """Half of them lose more than the mean, whatever has been learnt."""
    lists = lists_of([[f"t{k:02d}"] for k in range(40)])
    behind = ahead = found = 0
    for seed in range(5):
        generator, residuals = np.random.default_rng(seed), TagResiduals(lists, ResidualRule())
        for _ in range(200):
            loss_G = np.exp(0.5 * generator.standard_normal(16))
            picture_G = generator.integers(0, 40, 16)
            loss_G[picture_G == 7] *= 1.6
            residuals.see(picture_G, generator.integers(0, 32, 16), loss_G)
        known = tag_figures(lists, lists.count(), lists.count(), np.ones(40), np.ones(40), residuals)
        assert known.judged().all()
        assert names(known.not_yet_learned(1)) == ["t07"]
        behind, ahead = behind + int(known.behind().sum()) - 1, ahead + int(known.ahead().sum())
        found += len(known.not_yet_learned(99)) - 1 + len(known.learned(99))
    assert behind + ahead == found
    assert max(behind, ahead) < 0.06 * 5 * 40
