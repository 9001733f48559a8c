"""Opening a run folder: which one a command means that names none."""

import pytest

from engine.run.folder import name_run
from engine.settings.train import TrainConfig


def run_at(folder, name: str, *, finished: bool) -> None:
    (folder / name).mkdir()
    (folder / name / "metrics.jsonl").write_text("{}\n")
    if finished:
        (folder / name / "summary.json").write_text("{}")


def named(folder, **options) -> str:
    config = TrainConfig(output_dir=str(folder), **options)
    name_run(config)
    return config.run_dir.name


@pytest.mark.parametrize(
    ("runs", "new", "resumed"),
    [
        ({}, "tiny-0", "tiny-0"),
        ({"tiny-0": False}, "tiny-0", "tiny-0"),  # the one to resume: open_run says so
        ({"tiny-0": True}, "tiny-0-2", "tiny-0"),
        ({"tiny-0": True, "tiny-0-2": False}, "tiny-0-2", "tiny-0-2"),
        ({"tiny-0": True, "tiny-0-2": True}, "tiny-0-3", "tiny-0-2"),
        ({"tiny-1": True}, "tiny-0", "tiny-0"),
    ],
)
def test_a_finished_run_is_left_alone(tmp_path, runs, new, resumed):
    for name, finished in runs.items():
        run_at(tmp_path, name, finished=finished)
    assert named(tmp_path) == new
    assert named(tmp_path, resume=True) == resumed


def test_a_name_that_is_given_is_kept(tmp_path):
    run_at(tmp_path, "mine", finished=True)
    assert named(tmp_path, run_name="mine") == "mine"
