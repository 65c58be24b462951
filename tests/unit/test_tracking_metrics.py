"""metrics.jsonl survives kills and resumes; every back end says the same."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxl_training.records import UserError
from sdxl_training.tracking.metrics_file import FILE_NAME, MetricsFile, keep_through, metric_columns, read_metrics
from sdxl_training.tracking.tracker import BACK_ENDS, Trackers, open_trackers


def write_steps(run_dir: Path, first: int, last: int, resumed_at: int = 0) -> Path:
    file = MetricsFile(run_dir, resumed_at)
    for step in range(first, last + 1):
        file.scalars(step, {"loss": 1 / step, "images": 4 * step, "skipped": 0})
    file.close()
    return run_dir / FILE_NAME


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=5))
def test_every_float_comes_back_bit_for_bit_from_strictly_valid_json(tmp_path_factory, values):
    run_dir = tmp_path_factory.mktemp("run")
    file = MetricsFile(run_dir, 0)
    for step, value in enumerate(values):
        file.scalars(step, {"loss": value})
    file.close()

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    for line in (run_dir / FILE_NAME).read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    for value, row in zip(values, read_metrics(run_dir / FILE_NAME), strict=True):
        assert repr(row["loss"]) == repr(value)


def test_a_line_can_be_read_before_the_file_is_closed(tmp_path):
    file = MetricsFile(tmp_path, 0)
    file.scalars(1, {"loss": 0.5})
    assert read_metrics(tmp_path / FILE_NAME) == [{"step": 1, "loss": 0.5}]
    file.close()


def test_skipped_is_written_only_where_it_is_not_zero(tmp_path):
    file = MetricsFile(tmp_path, 0)
    file.scalars(1, {"loss": 0.5, "skipped": 0})
    file.scalars(2, {"loss": math.nan, "skipped": 1})
    file.close()
    assert (tmp_path / FILE_NAME).read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": "nan", "skipped": 1}\n'


def test_a_file_cut_anywhere_and_resumed_anywhere_ends_equal_to_an_uninterrupted_one(tmp_path):
    path = write_steps(tmp_path, 1, 3)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        complete = sum(1 for line in whole[:cut].splitlines() if line.endswith(b"}"))
        for resumed_at in range(complete + 1):
            path.write_bytes(whole[:cut])
            assert write_steps(tmp_path, resumed_at + 1, 3, resumed_at).read_bytes() == whole


def test_keep_through_counts_what_it_drops_and_leaves_no_temporary_file(tmp_path):
    path = write_steps(tmp_path, 1, 6)
    with path.open("ab") as file:
        file.write(b'{"step": 7, "lo')
    assert keep_through(path, 4) == 3
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert keep_through(path, 4) == 0
    assert list(tmp_path.iterdir()) == [path]
    assert keep_through(tmp_path / "absent.jsonl", 4) == 0


def test_a_tail_of_zeros_from_a_power_cut_is_dropped(tmp_path):
    path = write_steps(tmp_path, 1, 2)
    with path.open("ab") as file:
        file.write(b"\0" * 4096)
    assert len(read_metrics(path)) == 2
    assert keep_through(path, 9) == 1


@pytest.mark.parametrize(
    "line", ["not json", "[1]", "{}", '{"step": null}', '{"step": "soon"}', '{"step": 1, "x": [2]}']
)
def test_a_broken_line_in_the_middle_is_named_and_the_file_left_alone(tmp_path, line):
    path = write_steps(tmp_path, 1, 2)
    path.write_text(line + "\n" + path.read_text())
    before = path.read_bytes()
    for read in (read_metrics, lambda path: keep_through(path, 1)):
        with pytest.raises(UserError, match=r"metrics\.jsonl line 1"):
            read(path)
    assert path.read_bytes() == before


def test_columns_are_nan_where_a_line_lacks_the_key_and_empty_without_a_file(tmp_path):
    columns = metric_columns(write_steps(tmp_path, 1, 3), ("step", "images", "lr"))
    assert columns["step"].tolist() == [1, 2, 3]
    assert columns["images"].tolist() == [4, 8, 12]
    assert all(math.isnan(value) for value in columns["lr"])
    assert metric_columns(tmp_path / "absent", ("step",))["step"].size == 0


def test_tensorboard_has_the_same_names_and_forgets_steps_after_the_resume(tmp_path):
    first = open_trackers(["tensorboard"], tmp_path, 0)
    for step in range(1, 6):
        first.scalars(step, {"loss": step, "lr": 0.5})
    first.close()
    second = open_trackers(["tensorboard"], tmp_path, 3)
    second.scalars(4, {"loss": 40, "lr": 0.5})
    Image.new("RGB", (8, 6), "red").save(tmp_path / "grid.png")
    second.picture(4, "samples", tmp_path / "grid.png")
    second.close()

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert set(events.Tags()["scalars"]) == set(read_metrics(tmp_path / FILE_NAME)[0]) - {"step"}
    (picture,) = events.Images("samples")
    assert (picture.step, picture.width, picture.height) == (4, 8, 6)


def test_jsonl_is_always_kept_and_an_unknown_back_end_is_refused_by_name(tmp_path):
    trackers = open_trackers([], tmp_path, 0)
    trackers.scalars(1, {"loss": 1.0})
    trackers.close()
    assert len(read_metrics(tmp_path / FILE_NAME)) == 1
    with pytest.raises(UserError, match=r"'wandb'.*jsonl, tensorboard"):
        open_trackers(["wandb"], tmp_path, 0)
    assert next(iter(BACK_ENDS)) == "jsonl"


def test_no_trackers_do_nothing(tmp_path):
    silent = Trackers()
    silent.scalars(1, {"loss": 1.0})
    silent.picture(1, "samples", tmp_path / "absent.png")
    silent.close()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_loses_no_line_it_wrote(tmp_path):
    program = (
        "import os, pathlib, sys\n"
        "from sdxl_training.tracking.metrics_file import MetricsFile\n"
        "file = MetricsFile(pathlib.Path(sys.argv[1]), 0)\n"
        "for step in range(1, 8): file.scalars(step, {'loss': 0.5})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert ended.returncode == -9
    assert [row["step"] for row in read_metrics(tmp_path / FILE_NAME)] == list(range(1, 8))
