"""What is said of tags, before a run and during it: tables, charts, contact sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from sdxl_training.assemble.dataset import FoundPictures
from sdxl_training.config.tags import TagWeighting
from sdxl_training.data.contact_sheet import Cell, printable, read_cell
from sdxl_training.data.lazy import Lazy
from sdxl_training.tracking.charts import Line, line_chart
from sdxl_training.tracking.report_plan import Section, Table, sections_as_html, sections_as_text
from sdxl_training.weighting.normaliser import Figures
from sdxl_training.weighting.tag_lists import Integers, Numbers
from sdxl_training.weighting.tag_table import BY_CHANCE, LEAST_SEEN, TagFigures, TagRow

SHOWN = 200  # tags at either end of the frequencies
CELLS = 20  # pictures at either end of the weights
LEARNED_SHOWN = 50


@dataclass(frozen=True, slots=True)
class CategoryRow:
    """One category. appearances: images of an epoch times their tags in it. share: how much it counts."""

    category: str
    tags: int
    appearances: int
    share: float


@dataclass(frozen=True, slots=True)
class WeightRow:
    """One picture with its weight and tags."""

    path: str
    weight: float
    tags: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TagReport:
    """All that `tags` states. smallest, largest: pictures at the ends of the weights; numbers_*: which they are."""

    found: FoundPictures
    figures: TagFigures
    share_P: Numbers
    weight_P: Numbers
    weights: Figures
    section: TagWeighting

    def text(self) -> str:
        """Return the report for a terminal; of long lists the first ten rows."""
        return sections_as_text(self.sections())

    def html(self, sheet: Image.Image | None = None) -> str:
        """Return the inside of a page: charts, tables, the contact sheet."""
        return f'{self.charts()}<div style="margin-top:1rem">{sections_as_html(self.sections(sheet))}</div>'

    def to_json(self) -> str:
        """Return everything but the tags between the commonest and the rarest as JSON."""
        said = {
            "pictures": int((self.share_P > 0).sum()),
            "tags": len(self.figures.lists.names_K),
            "weights": asdict(self.weights),
            "categories": [asdict(row) for row in self.categories()],
            "most_frequent": [asdict(row) for row in self.figures.most_frequent(SHOWN)],
            "rarest": [asdict(row) for row in self.figures.rarest(SHOWN)],
            "smallest_weights": [asdict(row) for row in self.pictures(self.smallest())],
            "largest_weights": [asdict(row) for row in self.pictures(self.largest())],
        }
        return json.dumps(said, indent=2, allow_nan=False) + "\n"

    def sections(self, sheet: Image.Image | None = None) -> list[Section]:
        """Return what text and HTML show."""
        return [
            self._head(),
            _category_section(self.categories()),
            _tag_section("Most frequent tags", self.figures.most_frequent(SHOWN), len(self.figures.lists.names_K)),
            _tag_section("Rarest tags", self.figures.rarest(SHOWN), len(self.figures.lists.names_K)),
            _picture_section("Pictures that count least", self.pictures(self.smallest())),
            _picture_section("Pictures that count most", self.pictures(self.largest()), sheet),
        ]

    def charts(self) -> str:
        """Return plots of counts and weights over the rank of tags and pictures."""
        order = np.argsort(-self.figures.images_K, kind="stable")
        rank_K = np.arange(1, len(order) + 1, dtype=np.float64)
        images, weights = self.figures.images_K[order], self.figures.weight_K[order]
        sorted_P = np.sort(self.weight_P[self.share_P > 0])
        rank_P = np.arange(1, len(sorted_P) + 1, dtype=np.float64)
        note = f"effective sample size {self.weights.effective:.1%} of the images".replace("%", " %")
        return (
            '<div class="charts">'
            f"{line_chart('Images with a tag, by the rank of the tag', [Line('', 'smooth', rank_K, images)])}"
            f"{line_chart('Mean weight of those images', [Line('', 'smooth', rank_K, weights)])}"
            f"{line_chart('Weight of each picture, in order', [Line('', 'smooth', rank_P, sorted_P)], note)}"
            "</div>"
        )

    def categories(self) -> list[CategoryRow]:
        """Return the categories, the one with most appearances first."""
        lists = self.figures.lists
        tags_C = np.bincount(lists.category_K, minlength=len(lists.categories))
        seen_C = np.bincount(lists.category_K, self.figures.images_K, minlength=len(lists.categories))
        order = np.argsort(-seen_C, kind="stable")
        return [
            CategoryRow(lists.categories[c], int(tags_C[c]), int(seen_C[c]), float(lists.share_C[c])) for c in order
        ]

    def smallest(self) -> Integers:
        """Return the pictures that count least, the least first."""
        return self._ends(self.weight_P)

    def largest(self) -> Integers:
        """Return the pictures that count most, the most first."""
        return self._ends(-self.weight_P)

    def pictures(self, numbers: Integers) -> list[WeightRow]:
        """Return the rows of these pictures."""
        lists = self.figures.lists
        return [
            WeightRow(
                self.found.pictures[number].path,
                round(float(self.weight_P[number]), 4),
                tuple(lists.names_K[tag] for tag in lists.of_picture(number)),
            )
            for number in numbers.tolist()
        ]

    def cells(self) -> Sequence[Cell]:
        """Return the contact sheet's pictures: those that count least, then those that count most."""
        numbers = np.concatenate([self.smallest(), self.largest()])
        plan = self.found.plan

        def make(place: int) -> Cell:
            number = int(numbers[place])
            record = int(np.flatnonzero(plan.picture_N == number)[0])
            (row,) = self.pictures(numbers[place : place + 1])
            said = f"weight {row.weight:.2f}: {', '.join(row.tags)}"
            return read_cell(plan.records[record], plan.plans[record], said, self.found.pictures.read)

        return Lazy(len(numbers), make)

    def _head(self) -> Section:
        weights = self.weights
        pictures = int((self.share_P > 0).sum())
        lines = [f"{len(self.figures.lists.names_K):,} tags on {pictures:,} pictures"]
        if not self.section.changes_weights:
            lines.append(
                "all pictures count the same; tag_weighting.static: {type: frequency} lets rare tags count more"
            )
            return Section("Tags", lines)
        followed = {self.section.dynamic.type, self.section.trust.type} != {"none"}
        lines += [
            f"weights of pictures {weights.least:.3f} to {weights.most:.3f}, mean {weights.mean:.6f}; "
            f"{_percent(weights.at_bounds)} at a bound",
            f"effective sample size {_percent(weights.effective)}: so many equal pictures would vary as little",
        ]
        return Section("Tags", [*lines, "weights that follow the training come on top"] if followed else lines)

    def _ends(self, key_P: Numbers) -> Integers:
        taking_part = np.flatnonzero(self.share_P > 0)
        count = min(CELLS, len(taking_part) // 2)
        return taking_part[np.argsort(key_P[taking_part], kind="stable")[:count]]


def learned_sections(figures: TagFigures) -> list[Section]:
    """Return which concepts a run has learnt and which not, by their loss beside that of others."""
    if not figures.followed:
        return [Section("Concepts", ["tag_weighting.statistics.enabled: false, so no tag's loss is followed"])]
    judged, behind, ahead = (int(those.sum()) for those in (figures.judged(), figures.behind(), figures.ahead()))
    if not judged:
        return [Section("Concepts", [f"no tag has been seen {LEAST_SEEN} times yet"])]
    worst, best = figures.not_yet_learned(LEARNED_SHOWN), figures.learned(LEARNED_SHOWN)
    return [
        _learned_section("Concepts not yet learned", "more", worst, behind, judged),
        _learned_section("Concepts already learned", "less", best, ahead, judged),
    ]


def _learned_section(title: str, how: str, rows: Sequence[TagRow], found: int, judged: int) -> Section:
    """Return those that lose `how` than others. found: how many, of which `rows` are the first. judged: of how many."""
    by_chance = f"{BY_CHANCE * judged:.0f}" if BY_CHANCE * judged >= 1 else "less than one"
    lines = [
        f"tags whose pictures lose {how} than those of other tags of their category at equal noise levels, by more "
        "than two standard errors; in a model that has just begun this says which are easier",
        f"{found:,} of {judged:,} tags seen {LEAST_SEEN} times or more; were all alike, chance alone would put "
        f"{by_chance} here",
    ]
    if not rows:
        return Section(title, lines)
    cells = [
        (
            f"{row.relative_loss:.3f}x",
            f"{row.standard_errors:+.1f}",
            f"{100 * np.expm1(row.trend):+.1f} %",
            f"{row.weight:.2f}",
            f"{row.seen:,}",
            f"{row.pictures:,}",
            row.category,
            printable(row.tag),
        )
        for row in rows
    ]
    header = ("loss", "standard errors", "trend", "weight", "seen", "pictures", "category", "tag")
    lines.append("loss: beside theirs, moved towards 1 for rare tags; trend: how that has changed of late")
    return Section(title, lines, Table(header, cells, rows_in_all=found))


def _category_section(categories: Sequence[CategoryRow]) -> Section:
    rows = [(f"{row.tags:,}", f"{row.appearances:,}", f"{row.share:g}", printable(row.category)) for row in categories]
    return Section("Categories", [], Table(("tags", "appearances", "counts", "category"), rows, whole=True))


def _tag_section(title: str, rows: Sequence[TagRow], in_all: int) -> Section:
    most = max((row.images for row in rows), default=1)
    cells = [
        (f"{row.pictures:,}", f"{row.images:,}", f"{row.weight:.3f}", row.category, printable(row.tag)) for row in rows
    ]
    header = ("pictures", "images", "mean weight", "category", "tag")
    return Section(title, [], Table(header, cells, [row.images / most for row in rows], rows_in_all=in_all))


def _picture_section(title: str, rows: Sequence[WeightRow], sheet: Image.Image | None = None) -> Section:
    cells = [(f"{row.weight:.3f}", f"{printable(row.path)}: {printable(', '.join(row.tags))}") for row in rows]
    return Section(title, [], Table(("weight", "picture and tags"), cells), sheet)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
