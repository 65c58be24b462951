"""What do a million distinct tags cost: numbering them, keeping them, weighing pictures by them, watching their losses?

    python benchmarks/million_tags.py                              # a million pictures, eight tags each
    python benchmarks/million_tags.py --pictures 100000 --tags 100000

The index is written first, without pictures; what is measured runs in a process of its own, imports apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdxl_training.data.index_files import INDEX, read_rows, write_rows
from sdxl_training.data.pictures import IndexedSource, Pictures, SourceRules
from sdxl_training.data.tag_cache import kept_tag_column
from sdxl_training.data.tag_categories import categories_of
from sdxl_training.weighting.normaliser import Bounds, figures_of
from sdxl_training.weighting.picture_weights import PictureWeights
from sdxl_training.weighting.residuals import LEVELS, ResidualRule, TagResiduals
from sdxl_training.weighting.static import FrequencyRule, static_log_weights
from sdxl_training.weighting.tag_lists import TagLists

A_PICTURE = 8


def write_index(folder: Path, pictures: int, tags: int) -> None:
    """Write an index of pictures whose tags are as frequent as words are, each on one at least."""
    generator = np.random.default_rng(0)
    reach = np.cumsum(1 / np.arange(1, tags + 1))
    number = np.searchsorted(reach, generator.random(pictures * A_PICTURE) * reach[-1]).clip(0, tags - 1)
    number[: min(tags, len(number))] = np.arange(min(tags, len(number)))
    order = generator.permutation(len(number)).reshape(pictures, A_PICTURE)

    def slices() -> Iterator[pa.Table]:
        for first in range(0, pictures, 2**16):
            rows = number[order[first : first + 2**16]]
            names = pa.array([b"%09d.png" % (first + row) for row in range(len(rows))], pa.binary())
            captions = [[", ".join(f"tag of number {tag}" for tag in row)] for row in rows.tolist()]
            columns = {column.name: pa.nulls(len(rows), column.type) for column in INDEX}
            columns |= {"file": names, "name": names, "captions": pa.array(captions, INDEX.field("captions").type)}
            columns |= {side: pa.array(np.full(len(rows), 1024, np.int32)) for side in ("height", "width")}
            yield pa.table(columns, schema=INDEX)

    write_rows(folder / "index.parquet", slices())


class Nowhere:
    """A source of no files."""

    identity = "a benchmark"


@dataclass(frozen=True)
class ByLoss:
    """What a run's dynamic weights follow."""

    residuals: TagResiduals

    def log_weights(self) -> NDArray[np.float64]:
        """Return the log weight of each tag."""
        return self.residuals.log_weights(0.5, 1.5)


@contextmanager
def timed(facts: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    facts[name] = time.perf_counter() - began


def measure(folder: Path) -> dict[str, float]:
    """Return seconds of each stage and the peak memory, in this process."""
    facts: dict[str, float] = {}
    with timed(facts, "read the index"):
        table = read_rows(folder / "index.parquet")
        pictures = Pictures([IndexedSource(Nowhere(), SourceRules(), table)])
    with timed(facts, "number the tags and keep them"):
        kept_tag_column(folder, pictures, [()])
    with timed(facts, "read them again"):
        column = kept_tag_column(folder, pictures, [()])
    share_P = np.ones(len(pictures))
    with timed(facts, "categories and lists"):
        categories = categories_of(column.names_K, {}, {}, ("artist", "character"))
        lists = TagLists.of(column.names_K, categories, column.offsets, column.tag_T)
    with timed(facts, "weights of tags"):
        images_K = lists.count()
        static_K = static_log_weights(lists.names_K, images_K, images_K, lists.category_K, FrequencyRule(min_count=0))
    with timed(facts, "weights of pictures"):
        residuals = TagResiduals(lists, ResidualRule())
        weights = PictureWeights(lists, share_P, lists.spread(static_K), Bounds(), ByLoss(residuals))
    facts["all but reading again"] = sum(facts.values()) - facts["read them again"]
    with timed(facts, "note the losses of 100 updates of 32"):
        generator = np.random.default_rng(1)
        for _ in range(100):
            pictures_G, levels_G = generator.integers(len(pictures), size=32), generator.integers(LEVELS, size=32)
            residuals.see(pictures_G, levels_G, generator.random(32) + 0.1)
    with timed(facts, "weights anew, by loss"):
        weights.refresh(1)
    facts["tags"] = len(column.names_K)
    facts["mean weight"] = figures_of(weights.all_of(len(pictures)), share_P, Bounds()).mean
    facts["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1_000_000)
    parser.add_argument("--tags", type=int, default=1_000_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), arguments.pictures, arguments.tags)
        command = [sys.executable, __file__, "--measure", folder]
        facts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {date.today()}, load average "
        f"{os.getloadavg()[0]:.1f}: {arguments.pictures:,} pictures, {facts.pop('tags'):,.0f} distinct tags, "
        f"{A_PICTURE} a picture\n"
    )
    print("| | |\n|---|---|")
    for name, value in facts.items():
        unit = "" if name in ("mean weight", "peak MiB") else ", s"
        print(f"| {name}{unit} | {value:,.{0 if name == 'peak MiB' else 6 if name == 'mean weight' else 2}f} |")


if __name__ == "__main__":
    main()
