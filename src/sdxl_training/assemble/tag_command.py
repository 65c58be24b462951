"""The command `tags`: counts, weights, and the pictures at the ends of them; needs neither GPU nor model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from sdxl_training.assemble.dataset import FoundPictures, find_pictures
from sdxl_training.assemble.tag_report import TagReport
from sdxl_training.assemble.weighting import count_tags
from sdxl_training.config.load import LoadedConfig
from sdxl_training.config.schema import Config
from sdxl_training.data.contact_sheet import write_sheet
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import ConsoleProgress, open_log
from sdxl_training.tracking.report import write_page
from sdxl_training.weighting.normaliser import Bounds, weights_of
from sdxl_training.weighting.tag_table import tag_figures


def tags(loaded: LoadedConfig, as_json: bool, sheet_file: Path | None, page_file: Path | None) -> None:
    """Print what the tags of a run's pictures are and how much each counts before training.

    as_json: for programs. sheet_file: where the pictures with the smallest and largest weights are drawn to (PNG).
    page_file: where everything, with plots, is written to (HTML). Raises UserError where a file cannot be written, or
    where there are no tags.
    """
    _refuse_nameless("--sheet", sheet_file)
    _refuse_nameless("--page", page_file)
    console = Console(stderr=as_json)  # so that the JSON is all there is on the standard output
    open_log(None, console)
    progress = ConsoleProgress(console)
    report = make_tag_report(loaded.config, find_pictures(loaded.config, progress))
    if as_json:
        print(report.to_json(), end="")
    else:
        said = report.text().encode("utf-8", "backslashreplace").decode()  # a file's name need not be text
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    if sheet_file is None and page_file is None:
        return
    sheet = report.sheet(loaded.config.data.preprocessing.background)
    if sheet_file is not None and sheet is None:
        progress.message("all pictures count the same, so there is no contact sheet")
    elif sheet_file is not None and sheet is not None:
        write_sheet(sheet, sheet_file)
        progress.message(f"the pictures that count least and most: {sheet_file}")
    if page_file is not None:
        _write_page(page_file, report.html(sheet))
        progress.message(f"everything on one page: {page_file}")


def _write_page(file: Path, html: str) -> None:
    try:
        write_page(file, "Tags", {"Counts and weights": html})
    except OSError as error:
        raise UserError(
            f"--page = {file}: cannot be written ({error.strerror or error}). Give a file in a folder that is there "
            "and can be written."
        ) from error


def _refuse_nameless(option: str, file: Path | None) -> None:
    """Raise UserError for a path such as "" that names no file."""
    if file is not None and not file.name:
        raise UserError(f"{option} = {file}: names no file. Give one to write, or leave {option} away.")


def make_tag_report(config: Config, found: FoundPictures) -> TagReport:
    """Return what there is to say of a run's tags before it begins. Raises UserError without any tag."""
    counts = count_tags(config, found)
    if not len(counts.lists.names_K):
        raise UserError(
            f"tags: none of the {len(found.pictures)} pictures has a tag. Set data.captions.kind: tags where captions "
            "are tags, or give tags beside prose."
        )
    section = config.tag_weighting
    bounds = Bounds(section.bounds.least, section.bounds.most)
    weight_P = weights_of(counts.static_P, counts.share_P, bounds)
    figures = tag_figures(
        counts.lists, counts.pictures_K, counts.images_K, counts.share_P, weight_P, static_K=counts.static_K
    )
    return TagReport(found, figures, section)
