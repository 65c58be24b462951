"""report.html: one page that holds all there is to see of a run and asks nothing of the network."""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from sdxl_training.tracking.charts import Line, Numbers, line_chart, smooth
from sdxl_training.tracking.metrics_file import FILE_NAME as METRICS_NAME
from sdxl_training.tracking.metrics_file import STEP_KEYS, metric_columns
from sdxl_training.tracking.pace import duration_text, rate_text
from sdxl_training.tracking.report_style import SCRIPT, STYLE

REPORT_NAME = "report.html"
EARLIER_GRIDS = 23
"""So many earlier sample grids are shown, evenly spaced over the run, beside the newest."""
EARLIER_SIDE_PX, NEWEST_SIDE_PX = 640, 2048
SMALL_FILE_BYTES = 300_000
QUARANTINE_ROWS = 200

_Embedded: TypeAlias = tuple[str, tuple[int, int]]  # a data: address, and width and height

_SAMPLE_NAME = re.compile(r"step-(\d+)\.png")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True, slots=True)
class ReportFacts:
    """What the page says that does not lie in the run's folder.

    seconds: time since the run was last started. prompts: what the samples were drawn from, in reading order of the
    grid. data: HTML that tells of the pictures. tags: HTML that tells how they fare. quarantined: reason by file.
    environment: versions by name.
    """

    run_name: str
    state: Literal["running", "finished", "stopped"]
    total_steps: int
    seconds: float
    prompts: Sequence[str] = ()
    data: str = ""
    tags: str = ""
    quarantined: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def write_report(run_dir: Path, facts: ReportFacts) -> Path:
    """Write <run>/report.html by temporary name and rename, and return its path.

    Reads metrics.jsonl, samples/step-*.png and config.resolved.yaml of the run where they exist. Raises UserError for
    a metrics file that is not one.
    """
    metrics = metric_columns(run_dir / METRICS_NAME, (*STEP_KEYS, "skipped"))
    sections = (
        _head(facts, metrics),
        _section("Training", _curves(metrics)),
        _section("Samples", _samples(run_dir / "samples", facts.prompts)),
        _section("Tags", facts.tags),
        _section("Data", facts.data),
        _section("Quarantined files", _quarantine(facts.quarantined)),
        _section("Configuration", _configuration(run_dir / "config.resolved.yaml")),
        _section("Environment", f'<div class="card">{_table(("", ""), facts.environment)}</div>'),
    )
    return _write(run_dir / REPORT_NAME, _page(facts.run_name, "".join(sections)))


def write_page(path: Path, title: str, sections: Mapping[str, str]) -> Path:
    """Write a page of the report's kind by temporary name and rename. sections: HTML by title."""
    body = f"<h1>{escape(title)}</h1>" + "".join(_section(name, html) for name, html in sections.items())
    return _write(path, _page(title, body))


def _write(path: Path, page: str) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(page)
        file.flush()
        os.fsync(file.fileno())
    return temporary.replace(path)


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"\n<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _head(facts: ReportFacts, metrics: Mapping[str, Numbers]) -> str:
    step, span = _last(metrics["step"]), _span(metrics["step"])
    told = {
        f"Loss, mean of {span:,}": f"{_mean(metrics['loss'][-span:]):.4g}",
        "Images seen": f"{_last(metrics['images']):,.0f}",
        "Epoch": f"{_last(metrics['epoch']):,.2f}",
        "Time since last start": duration_text(facts.seconds),
        "Images a second": rate_text(_last(metrics["images_per_second"])),
        "Waiting for data": f"{100 * _last(metrics['data_wait_fraction']):.1f} %",
        "Peak memory": f"{np.max(metrics['peak_memory_gib'], initial=0.0):.2f} GiB",
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in told.items())
    when = f"{datetime.now():%Y-%m-%d %H:%M}"
    return (
        f'<h1>{escape(facts.run_name)}</h1><p class="state"><b class="{facts.state}">{facts.state.capitalize()}</b>'
        f' at step {step:,.0f} of {facts.total_steps:,}; written {when}</p><dl class="facts">{cells}</dl>'
    )


def _last(values: Numbers) -> float:
    return float(values[-1]) if values.size else 0.0


def _mean(values: Numbers) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _span(steps: Numbers) -> int:
    """Return how many logged steps the smoothed curves and the stated loss are a mean of."""
    return max(5, steps.size // 50)


def _curves(metrics: Mapping[str, Numbers]) -> str:
    step = metrics["step"]
    span = _span(step)

    def both(title: str, key: str) -> str:
        raw = metrics[key]
        lines = (
            Line("each logged step", "raw", step, raw),
            Line(f"mean over {span:,} of them", "smooth", step, smooth(raw, span)),
        )
        return line_chart(title, lines, _void_steps(raw, metrics["skipped"]))

    rate = line_chart("Learning rate", [Line("", "smooth", step, metrics["lr"])])
    return f'<div class="charts">{both("Loss", "loss")}{both("Gradient norm", "grad_norm")}{rate}</div>'


def _void_steps(values: Numbers, skipped: Numbers) -> str:
    """Say what a line cannot show."""
    missing, void = int((~np.isfinite(values)).sum()), int((skipped > 0).sum())
    said = [f"{missing} not finite and not drawn"] * (missing > 0) + [f"{void} skipped"] * (void > 0)
    return f"Of {values.size:,} logged steps: {', '.join(said)}." if said else ""


def _samples(folder: Path, prompts: Sequence[str]) -> str:
    """Show the newest grid large and earlier ones in a row; a picture that cannot be read is named, not fatal."""
    paths = {int(found[1]): path for path in folder.glob("step-*.png") if (found := _SAMPLE_NAME.fullmatch(path.name))}
    steps = sorted(paths)
    embedded, torn = {}, []
    for step in (*_spread(steps[:-1], EARLIER_GRIDS), *steps[-1:]):
        try:
            embedded[step] = _embed(paths[step], NEWEST_SIDE_PX if step == steps[-1] else EARLIER_SIDE_PX)
        except (OSError, SyntaxError):  # Pillow reports a broken PNG chunk as SyntaxError
            torn.append(paths[step].name)
    note = f'<p class="note">Cannot be read: {escape(", ".join(torn))}.</p>' if torn else ""
    if not embedded:
        return f'<div class="card"><p class="empty">No samples yet.</p>{note}</div>'
    *earlier, newest = embedded
    row = "".join(_frame(step, embedded[step]) for step in earlier)
    told = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
    return (
        f'<div class="card frames">{_frame(newest, embedded[newest], "shown")}'
        f'<div class="row">{row}</div><ol class="prompts">{told}</ol>{note}</div>'
    )


def _spread(steps: Sequence[int], most: int) -> Sequence[int]:
    """Return at most `most` of the steps, evenly spaced, the first among them."""
    return steps[:: max(1, math.ceil(len(steps) / most))]


def _frame(step: int, embedded: _Embedded, style: str = "") -> str:
    source, (width, height) = embedded
    return (
        f'<figure class="{style}"><img src="{source}" width="{width}" height="{height}" alt="samples at step {step}">'
        f"<figcaption>step {step:,}</figcaption></figure>"
    )


def _embed(path: Path, side_px: int) -> _Embedded:
    """Return the picture as data; a large one is shrunk: grids of real SDXL weigh megabytes each."""
    content, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(content)) as image:
        size = image.size
        image.load()
        if len(content) > SMALL_FILE_BYTES:
            small = image.convert("RGB")
            small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
            packed = io.BytesIO()
            small.save(packed, "JPEG", quality=90)
            content, kind, size = packed.getvalue(), "jpeg", small.size
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", size


def _quarantine(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return '<div class="card"><p class="empty">None: every file could be read.</p></div>'
    listed = dict(list(reasons.items())[:QUARANTINE_ROWS])
    rest = len(reasons) - len(listed)
    more = f'<p class="note">and {rest:,} more in quarantine.jsonl</p>' if rest else ""
    return f'<div class="card">{_table(("File", "Reason"), listed)}{more}</div>'


def _table(header: tuple[str, str], rows: Mapping[str, str]) -> str:
    head = f"<thead><tr><th>{header[0]}</th><th>{header[1]}</th></tr></thead>" if any(header) else ""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows.items()
    )
    return f'<table class="list">{head}<tbody>{body}</tbody></table>'


def _configuration(path: Path) -> str:
    return f'<div class="card"><pre>{escape(path.read_text(encoding="utf-8"))}</pre></div>' if path.exists() else ""
