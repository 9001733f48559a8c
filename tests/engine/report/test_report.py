"""The run's report, pictures and logger, on made-up run folders."""

import io
import json
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.report import __main__ as report
from engine.report.__main__ import find_divergence, write_report
from engine.report.data import pair_rows
from engine.report.hacking import correlation, expert_correlations, rolling_mean
from engine.run import monitor
from engine.run.grids import grid_png, save_grid, wrap
from engine.run.monitor import RunLogger
from engine.settings.errors import UserError
from engine.tiny.prompts import TASK_TYPES, draw
from engine.tiny.world import plan_text, render

VOID = {"meta", "img", "br", "rect", "path", "circle"}  # tags we write without an end


class Balance(HTMLParser):
    """Collects tags that are left open or closed out of turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def pictures(count: int) -> tuple[torch.Tensor, list[str], list[dict]]:
    """`count` pictures (count, 3, 64, 64) in [0, 1], their plans and their prompt rows."""
    rng = random.Random(0)
    drawn = [draw(TASK_TYPES[i % len(TASK_TYPES)], rng) for i in range(count)]
    pixels = np.stack([render(scene) for _, scene in drawn])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return images, [plan_text(scene) for _, scene in drawn], [row for row, _ in drawn]


def metrics_rows(steps: int, *, part_at: int | None = None) -> list[dict]:
    """Metrics of a run whose judge follows the reward, up to the step `part_at`."""
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, steps + 1):
        reward = 0.45 + 0.3 * (1 - np.exp(-step / 60))
        judge = reward - 0.05
        if part_at is not None and step > part_at:
            judge -= 0.008 * (step - part_at)
        noise, apart = rng.normal(0, 0.02), rng.normal(0, 0.01, 3)
        seconds = {"seconds/rollout": 2.0, "seconds/train": 1.4, "seconds/rewards_exposed": 0.1}
        rows.append(
            {
                "step": step,
                "loss": float(rng.normal(0, 0.01)),
                "reward": reward + noise,
                "judge": judge + noise + apart[0],
                "reward_std": 0.1,
                "rewards/clip": reward + noise + apart[1],
                "rewards/detector": 0.9 - judge - noise + apart[2],
                "kl": 0.0002 * step,
                "entropy": 1.2 - 0.002 * step,
                "clip_fraction": 0.01,
                "policy_drift": 1e-4,
                "completion_length": 11.0,
                "grad_norm": 0.8,
                "lr": 1e-4,
                "images_per_s": 18.0,
                "tokens_per_s": 1400.0,
                **seconds,
            }
        )
    return rows


def make_run(
    folder: Path, *, steps: int = 100, count: int = 21, part_at: int | None = None
) -> Path:
    """A whole run folder, as the trainer leaves it."""
    images, plans, prompts = pictures(count)
    (folder / "eval").mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in metrics_rows(steps, part_at=part_at)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.yaml").write_text(yaml.safe_dump({"max_steps": steps, "beta": 0.01}))
    evaluations = {}
    for when, score in (("before", 0.4), ("after", 0.61)):
        rows = []
        for i, row in enumerate(prompts):
            name = f"eval/{when}_{i}.png"
            pixels = (images[i].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / name)
            rows.append({**row, "plan": plans[i], "score": score, "reward": score, "image": name})
        (folder / f"eval/{when}.json").write_text(json.dumps({"rows": rows}))
        evaluations[when] = {
            "mean": score,
            "by_task": {task: {"mean": score, "n": 3} for task in TASK_TYPES},
            "rewards": {"clip": score, "detector": score - 0.1},
        }
    summary = {"eval": evaluations, "seconds": 412.0, "images_per_s": 18.2}
    (folder / "summary.json").write_text(json.dumps(summary))
    save_grid(folder / "samples/step_0001.png", images[:8], plans[:8], columns=4, title="step 1")
    return folder


def test_report_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run"))
    text = path.read_text()
    balance = Balance()
    balance.feed(text)
    assert not balance.wrong and not balance.open
    assert not re.search(r"https?:|url\(|<script|<link", text)
    assert set(re.findall(r'src="([^,]*)', text)) == {"data:image/png;base64"}
    assert "not complete" not in text
    assert '0.400 <span class="arrow">→</span> 0.610' in text
    assert '<span class="up">+0.210</span>' in text
    for task in TASK_TYPES:
        assert f'<span class="tag">{task}</span>' in text
    assert "did not part" in text
    assert "Least in step with the judge: <b>detector</b>" in text
    assert not list(path.parent.glob(".*.tmp"))


def test_report_says_where_reward_and_judge_part(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run", part_at=60)).read_text()
    assert "did not part" not in text
    assert re.search(r"steps \d+–\d+: reward \+0\.\d+ while judge -0\.\d+", text)
    assert 'fill="#d98b00"' in text  # the stretch is shaded in the curve


@pytest.mark.parametrize(
    "gone", ["config.yaml", "metrics.jsonl", "summary.json", "eval/after.json", "eval/before.json"]
)
def test_report_of_an_interrupted_run(tmp_path: Path, gone: str) -> None:
    run = make_run(tmp_path / "run", steps=25, count=7)
    (run / gone).unlink()
    (run / "eval/before_0.png").unlink()
    text = write_report(run).read_text()
    assert "This run is not complete" in text and f"{gone} is missing" in text


def test_report_with_only_the_first_steps(tmp_path: Path) -> None:
    row = {"step": 1, "reward": None, "loss": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 2, "rew')
    text = write_report(tmp_path).read_text()
    assert "cut short" in text and "was not evaluated" in text and "holds no judge" in text


def test_report_escapes_prompts_and_keeps_to_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3, count=7)
    secret = tmp_path / "secret.png"
    Image.new("RGB", (9, 9)).save(secret)
    row = {
        "prompt": "<script>alert(1)</script>",
        "task_type": "<b>",
        "plan": '"><img src=x onerror=alert(1)>',
        "score": 0.5,
        "image": "../secret.png",
    }
    for when in ("before", "after"):
        (run / f"eval/{when}.json").write_text(json.dumps({"rows": [row]}))
    text = write_report(run).read_text()
    assert "<script" not in text and "<img src=x" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert text.count("no picture") == 2


def test_report_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "no such run folder" in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    assert report.main([str(tmp_path)]) == 2
    assert "metrics.jsonl:2" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "summary.json").write_text("{")
    assert report.main([str(tmp_path)]) == 2
    assert "summary.json" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "summary.json").unlink()
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


def test_pairs_meet_by_prompt_not_by_place() -> None:
    before = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}, {"prompt": "a", "n": 3}]
    after = [{"prompt": "b", "n": 4}, {"prompt": "a", "n": 5}]
    pairs = pair_rows({"before": before, "after": after})
    numbers = [tuple(row and row["n"] for row in pair) for pair in pairs]
    assert numbers == [(1, 5), (2, 4), (3, None)]


@pytest.mark.parametrize("seed", range(20))
def test_divergence_is_found_where_it_is_and_only_there(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = np.arange(120)
    reward = 0.5 + 0.002 * steps + rng.normal(0, 0.02, 120)
    level = 0.45 + 0.002 * steps + rng.normal(0, 0.02, 120)
    assert find_divergence(steps, reward, level) == []  # both rise
    parting = level - 0.007 * np.maximum(0, steps - 60)
    (start, end, text), *_ = find_divergence(steps, reward, parting)
    assert 50 <= start < end <= 119 and end > 70
    assert text.startswith(f"steps {start}–{end}: reward +0.")
    assert find_divergence(steps, reward[::-1], parting) == []  # both fall


def test_divergence_leaves_out_missing_scores_and_short_runs() -> None:
    steps = np.arange(0, 80)
    reward, judge = steps * 0.01, 1 - steps * 0.01
    sparse = np.where(steps % 2 == 0, judge, np.nan)
    found = find_divergence(steps, reward, sparse)
    assert found and all(start % 2 == 0 and end % 2 == 0 for start, end, _ in found)
    assert find_divergence(steps[:10], reward[:10], judge[:10]) == []
    with pytest.raises(ValueError, match="one length"):
        find_divergence(steps, reward, judge[:-1])


def test_statistics() -> None:
    assert rolling_mean([1, float("nan"), 4], 3).tolist() == [1.0, 2.5, 4.0]
    assert np.isnan(rolling_mean([float("nan")] * 3)).all()
    assert correlation([1, 2, 3, float("nan")], [2, 4, 6, 0]) == pytest.approx(1.0)
    assert correlation([1, 1, 1], [1, 2, 3]) is None
    ranked = expert_correlations({"up": [1, 2, 3], "flat": [1, 1, 1], "down": [3, 2, 0]}, [1, 2, 3])
    assert [name for name, _ in ranked] == ["down", "up", "flat"]


def test_grid_keeps_pixels_and_wraps_captions(tmp_path: Path) -> None:
    images, plans, _ = pictures(3)
    path = tmp_path / "deep/grid.png"
    save_grid(path, images, plans, columns=2, scale=2, scores=[0.1, 0.2, 0.3])
    sheet = np.asarray(Image.open(path))
    first = sheet[14 : 14 + 128, 14 : 14 + 128]
    wanted = (images[0].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
    assert (first[::2, ::2] == wanted).all() and (first[1::2, 1::2] == wanted).all()
    assert (sheet[14 + 132 :, 14 : 14 + 128] < 128).any()  # ink under the picture
    assert list(path.parent.iterdir()) == [path]
    font = ImageFont.load_default(13)
    for line in wrap("a few words and one" + "very" * 40 + "long", font, 120):
        assert font.getlength(line) <= 120
    longer = grid_png(images, [plan + " and more words" * 4 for plan in plans], columns=2, scale=2)
    assert Image.open(io.BytesIO(longer)).height > sheet.shape[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": ["one"]}, "captions"),
        ({"columns": 0}, "columns"),
        ({"scores": [1.0]}, "scores"),
        ({"images": torch.full((2, 3, 8, 8), float("nan"))}, "finite"),
        ({"images": torch.zeros(2, 8, 8)}, "images"),
    ],
)
def test_grid_refuses(tmp_path: Path, change: dict, message: str) -> None:
    arguments = {"images": torch.zeros(2, 3, 8, 8), "captions": ["a", "b"], "columns": 2} | change
    with pytest.raises(ValueError, match=message):
        save_grid(tmp_path / "grid.png", **arguments)
    assert not list(tmp_path.iterdir())


def test_logger_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, 10, resume=False, quiet=True)
    for step in range(1, 8):
        logger.log({"step": step, "reward": torch.tensor(step / 10), "kl": float("nan")})
    logger.close()
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "rew')  # a kill in mid-line
    with pytest.raises(UserError, match="a run is there already"):
        RunLogger(tmp_path, 10, resume=False, quiet=True)

    logger = RunLogger(tmp_path, 10, resume=True, quiet=True)
    assert logger.truncate_after(5) == 5
    logger.log({"step": 6, "reward": 0.9, "kl": 0.5})
    logger.text("plan", 6, "large plain red circle center")
    logger.image("samples", 6, torch.rand(3, 8, 8))
    save_grid(tmp_path / "grid.png", torch.rand(1, 3, 8, 8), ["a"], columns=1)
    logger.image("samples", 7, tmp_path / "grid.png")
    logger.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["kl"] is None and rows[0]["reward"] == pytest.approx(0.1)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("reward")[-1].value == pytest.approx(0.9)
    assert [event.step for event in events.Images("samples")] == [6, 7]


def test_logger_says_little_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "SummaryWriter", _NoWriter)
    logger = RunLogger(tmp_path, 400, resume=False)
    for step in range(1, 401):
        logger.log({"step": step, "reward": 0.5, "kl": 0.001, "images_per_s": 20.0})
    logger.close()
    lines = capsys.readouterr().err.splitlines()
    assert 20 <= len(lines) <= 22
    assert "step 400/400, reward 0.500, KL 0.0010, images/s 20.0" in lines[-1]
    assert "left" in lines[1]


def test_logger_draws_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(monitor, "SummaryWriter", _NoWriter)
    monkeypatch.setattr(sys, "stderr", Terminal())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    logger = RunLogger(tmp_path, 4, resume=True)
    logger.truncate_after(2)
    logger.log({"step": 3, "reward": 0.5, "kl": 0.001})
    logger.log({"step": 4, "reward": 0.75, "kl": 0.002})
    logger.say("evaluating")
    logger.close()
    drawn = sys.stderr.getvalue()
    assert "2/4" in drawn and "4/4" in drawn and "reward 0.750" in drawn
    assert "evaluating\n" in drawn


class _NoWriter:
    """Stands in for TensorBoard where a test is about something else."""

    def __init__(self, *_, **__) -> None: ...

    def add_scalar(self, *_) -> None: ...

    def close(self) -> None: ...
