"""What is said of tags, before a run and during it: tables, charts, contact sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from sdxl_training.assemble.dataset import FoundPictures
from sdxl_training.config.tags import TagWeighting
from sdxl_training.data.colour import RGB
from sdxl_training.data.contact_sheet import GAP_PX, INK, PALE, Cell, draw_sheet, load_font, printable, read_cell
from sdxl_training.data.lazy import Lazy
from sdxl_training.tracking.charts import Line, line_chart
from sdxl_training.tracking.report_plan import Section, Table, sections_as_html, sections_as_text
from sdxl_training.weighting.normaliser import Bounds, Figures, figures_of
from sdxl_training.weighting.tag_lists import Integers, TagLists
from sdxl_training.weighting.tag_table import BY_CHANCE, LEAST_SEEN, TagFigures, TagRow

SHOWN = 200  # tags at either end of the frequencies
CELLS = 20  # pictures at either end of the weights
LEARNED_SHOWN = 50
HEADING_PX = 32  # of each half of the contact sheet
SAME = 1e-6  # weights that differ by less are equal but for rounding
LEAST, MOST = "Pictures that count least", "Pictures that count most"


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
    """All that `tags` states. smallest, largest: which pictures are at the ends of the weights, if they differ."""

    found: FoundPictures
    figures: TagFigures
    section: TagWeighting

    @cached_property
    def weights(self) -> Figures:
        """What there is to say of the pictures' weights together."""
        return _weights(self.figures, self.section)

    def text(self) -> str:
        """Return the report for a terminal; of long lists the first ten rows."""
        return sections_as_text(self.sections())

    def html(self, sheet: Image.Image | None = None) -> str:
        """Return the inside of a page: charts, tables, the contact sheet."""
        return f'{self.charts()}<div style="margin-top:1rem">{sections_as_html(self.sections(sheet))}</div>'

    def to_json(self) -> str:
        """Return everything but the tags between the commonest and the rarest as JSON."""
        said = {
            "pictures": int((self.figures.share_P > 0).sum()),
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
        tags = len(self.figures.lists.names_K)
        sections = [
            self._head(),
            _category_section(self.categories()),
            _tag_section("Most frequent tags", self.figures.most_frequent(SHOWN), tags),
            _tag_section("Rarest tags", self.figures.rarest(SHOWN), tags),
        ]
        if _are_equal(self.weights):
            return sections
        return [
            *sections,
            *([] if sheet is None else [Section("Pictures that count least and most", sheet=sheet)]),
            _picture_section(LEAST, self.pictures(self.smallest())),
            _picture_section(MOST, self.pictures(self.largest())),
        ]

    def charts(self) -> str:
        """Return plots of counts and weights over the rank of tags and pictures."""
        order = np.argsort(-self.figures.images_K, kind="stable")
        rank_K = np.arange(1, len(order) + 1, dtype=np.float64)
        images, weights = self.figures.images_K[order], self.figures.weight_K[order]
        sorted_P = np.sort(self.figures.weight_P[self.figures.share_P > 0])
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
        """Return the pictures that count least and less than the mean, the least first; none where all are equal."""
        return self._ends(-1)

    def largest(self) -> Integers:
        """Return the pictures that count most and more than the mean, the most first; none where all are equal."""
        return self._ends(1)

    def pictures(self, numbers: Integers) -> list[WeightRow]:
        """Return the rows of these pictures."""
        lists = self.figures.lists
        return [
            WeightRow(
                self.found.pictures[number].path,
                round(float(self.figures.weight_P[number]), 4),
                tuple(lists.names_K[tag] for tag in lists.of_picture(number)),
            )
            for number in numbers.tolist()
        ]

    def sheet(self, background: RGB) -> Image.Image | None:
        """Draw the pictures that count least, then those that count most; None where all count the same."""
        if _are_equal(self.weights):
            return None
        ends = ((LEAST, self.smallest()), (MOST, self.largest()))
        return _below_each_other(
            [(title, draw_sheet(self._cells(these), background=background)) for title, these in ends]
        )

    def _cells(self, numbers: Integers) -> Sequence[Cell]:
        plan = self.found.plan

        def make(place: int) -> Cell:
            number = int(numbers[place])
            record = int(np.flatnonzero(plan.picture_N == number)[0])
            (row,) = self.pictures(numbers[place : place + 1])
            said = f"weight {row.weight:.2f}: {', '.join(row.tags)}"
            return read_cell(plan.records[record], plan.plans[record], said, self.found.pictures.read)

        return Lazy(len(numbers), make)

    def _head(self) -> Section:
        pictures = int((self.figures.share_P > 0).sum())
        lines = [
            f"{len(self.figures.lists.names_K):,} tags on {pictures:,} pictures",
            *weight_lines(self.figures, self.section),
        ]
        followed = {self.section.dynamic.type, self.section.trust.type} != {"none"}
        return Section("Tags", [*lines, "weights that follow the training come on top"] if followed else lines)

    def _ends(self, sign: int) -> Integers:
        beyond_P = sign * (self.figures.weight_P - 1)
        found = np.flatnonzero((self.figures.share_P > 0) & (beyond_P > 0) & (not _are_equal(self.weights)))
        return found[np.argsort(-beyond_P[found], kind="stable")[:CELLS]]


def weight_lines(figures: TagFigures, section: TagWeighting) -> list[str]:
    """Return what there is to say of the weights as they are now: in `tags`, in a run's log and in its report."""
    weights = _weights(figures, section)
    if _are_equal(weights):
        return [f"all pictures count the same; {_why_equal(figures.lists, section)}"]
    return [
        f"weights of pictures {weights.least:.3f} to {weights.most:.3f}, mean {weights.mean:.6f}; "
        f"{_percent(weights.at_bounds)} at a bound",
        f"effective sample size (sum w)^2 / (N sum w^2) = {_percent(weights.effective)}: what is left of N pictures "
        "when some count more than others",
    ]


def _why_equal(lists: TagLists, section: TagWeighting) -> str:
    if not section.changes_weights:
        return "tag_weighting.static: {type: frequency} lets rare tags count more"
    if not lists.share_C.any():
        return "tag_weighting.categories.shares is 0 for every category, so no tag counts"
    if section.static.type == "none":
        return "weights follow the training, which has not moved them yet"
    return "tag_weighting.static finds no tag to weigh by: see its strength, min_count, include and exclude"


def _weights(figures: TagFigures, section: TagWeighting) -> Figures:
    bounds = Bounds(section.bounds.least, section.bounds.most)
    return figures_of(figures.weight_P, figures.share_P, bounds)


def _are_equal(weights: Figures) -> bool:
    return weights.most - weights.least < SAME


def sections_of_run(figures: TagFigures, section: TagWeighting) -> list[Section]:
    """Return what a run's report says of tags: which weights are in effect, what is learnt and what is not."""
    return [Section("Weights now", weight_lines(figures, section)), *learned_sections(figures)]


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
        (
            f"{row.pictures:,}",
            f"{row.images:,}",
            "" if row.static_factor is None else f"{row.static_factor:.3f}",
            f"{row.weight:.3f}",
            row.category,
            printable(row.tag),
        )
        for row in rows
    ]
    header = ("pictures", "images", "own factor", "mean weight", "category", "tag")
    return Section(title, [], Table(header, cells, [row.images / most for row in rows], rows_in_all=in_all))


def _picture_section(title: str, rows: Sequence[WeightRow]) -> Section:
    cells = [(f"{row.weight:.3f}", f"{printable(row.path)}: {printable(', '.join(row.tags))}") for row in rows]
    return Section(title, [], Table(("weight", "picture and tags"), cells))


def _below_each_other(sheets: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Return these sheets as one, a heading above each."""
    width = max(sheet.width for _, sheet in sheets)
    whole = Image.new("RGB", (width, sum(HEADING_PX + sheet.height for _, sheet in sheets)), "white")
    pen, font, top = ImageDraw.Draw(whole), load_font(), 0
    for title, sheet in sheets:
        pen.rectangle((0, top, width, top + HEADING_PX - 1), fill=PALE)
        pen.text((GAP_PX, top + HEADING_PX // 3), title, fill=INK, font=font)
        whole.paste(sheet, (0, top + HEADING_PX))
        top += HEADING_PX + sheet.height
    return whole


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
