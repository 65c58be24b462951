"""A plan's figures as text and as a part of report.html: the same sections, lines and tables in both.

Strings come as they are to be read: one line each, without characters that cannot be printed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

TEXT_ROWS = 10
HTML_ROWS = 200
BAR_WIDTH = 30
SHEET_QUALITY = 85
# The style sheet makes cells of such a table narrow and right-aligned; names are neither.
NAME_STYLE = "text-align:left;white-space:normal;width:auto;overflow-wrap:anywhere"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells: short ones, and a last one of any length.

    bars: a share (0 to 1) for each row, drawn after its cells. rows_in_all: how many there are where `rows` are only
    the first. whole: text, too, shows all rows. An empty header is not shown.
    """

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    bars: Sequence[float] = ()
    rows_in_all: int = 0
    whole: bool = False

    def not_shown(self, shown: int) -> int:
        """Return how many rows there are beside the first `shown`."""
        return max(self.rows_in_all, len(self.rows)) - min(shown, len(self.rows))


@dataclass(frozen=True, slots=True)
class Section:
    """A title, what is said below it, a table. sheet: a picture, for HTML only."""

    title: str
    lines: Sequence[str] = ()
    table: Table | None = None
    sheet: Image.Image | None = None


def sections_as_text(sections: Sequence[Section]) -> str:
    """Return the sections as plain text; of long tables the first rows."""
    return "\n".join(line for section in sections for line in _text_lines(section))


def sections_as_html(sections: Sequence[Section]) -> str:
    """Return the sections as the inside of a section of report.html, whose style sheet they use."""
    cards = "".join(_card(section) for section in sections)
    return f'<div class="charts" style="grid-template-columns:minmax(0,1fr)">{cards}</div>'


# Text


def _text_lines(section: Section) -> list[str]:
    table = [] if section.table is None else _text_table(section.table)
    return [section.title, *(f"  {line}" for line in (*section.lines, *table))]


def _text_table(table: Table) -> list[str]:
    shown = len(table.rows) if table.whole else TEXT_ROWS
    rows = list(table.rows[:shown])
    if any(table.header):
        rows = [table.header, *rows]
    if table.bars:
        bars = ["#" * round(BAR_WIDTH * share) for share in table.bars[:shown]]
        rows = [(*row, bar) for row, bar in zip(rows, ["", *bars], strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip()
        for row in rows
    ]
    rest = table.not_shown(shown)
    return lines + ([f"and {rest:,} more"] if rest else [])


# HTML


def _card(section: Section) -> str:
    said = "".join(f"<div>{escape(line)}</div>" for line in section.lines)
    table = "" if section.table is None else _html_table(section.table)
    sheet = "" if section.sheet is None else _embed(section.sheet, section.title)
    return f'<figure class="chart"><figcaption>{escape(section.title)}</figcaption>{said}{sheet}{table}</figure>'


def _html_table(table: Table) -> str:
    rows = [[f"<td>{escape(cell)}</td>" for cell in row] for row in (table.header, *table.rows[:HTML_ROWS])]
    if table.bars:
        shares = [f'<td class="bar"><span style="width:{100 * share:.1f}%"></span></td>' for share in table.bars]
        rows = [[*row, bar] for row, bar in zip(rows, ["<td></td>", *shares[:HTML_ROWS]], strict=True)]
    else:
        rows = [[*row[:-1], row[-1].replace("<td>", f'<td style="{NAME_STYLE}">', 1)] for row in rows]
    head, *body = (f"<tr>{''.join(row)}</tr>" for row in rows)
    shown_head = f"<thead>{head}</thead>" if any(table.header) else ""
    rest = table.not_shown(HTML_ROWS)
    more = f'<p class="note">and {rest:,} more</p>' if rest else ""
    return (
        '<div style="overflow-x:auto"><table class="bars">'
        f"{shown_head}<tbody>{''.join(body)}</tbody></table></div>{more}"
    )


def _embed(sheet: Image.Image, title: str) -> str:
    packed = io.BytesIO()
    sheet.convert("RGB").save(packed, "JPEG", quality=SHEET_QUALITY)
    data = base64.b64encode(packed.getvalue()).decode()
    return (
        f'<img src="data:image/jpeg;base64,{data}" width="{sheet.width}" height="{sheet.height}" '
        f'alt="{escape(title)}" style="max-width:100%;height:auto">'
    )
