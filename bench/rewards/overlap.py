"""Reward seconds that a training step waits for, with the pipeline and without it.

The tiny default run: its policy, prompts, four experts and batch of 64. After a rollout the step needs
the rewards and the log-probs of the frozen reference. `sequential` computes one after the other;
`pipeline` scores in the worker thread while the main thread runs the reference, as the trainer does.
Both use torch.set_num_threads(1), so that on two cores the worker and the main thread have one
each. Scores and log-probs of both must be equal. They take turns on the same rollout.

No pipeline can hide more than the shorter of the two pieces of work: `bound_seconds` is
min(reward seconds, reference seconds), both from `sequential`. `hidden_share_of_possible` is what the
pair of them took less, sequential - pipeline, over that bound, medians; a slower reference
forward beside the worker counts against it. Wanted: 0.5.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from engine.generate.pictures import Generation
from engine.learner.levels import Experience
from engine.prompts.data import load_prompts
from engine.settings.errors import UserError
from engine.settings.options import check_fields, option
from engine.settings.train import TrainConfig
from engine.train import Trainer
from rewards import RewardPipeline, Scores
from rewards.pipeline import Span

COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")
BAR, GAP, LEFT, WIDTH = 26, 8, 170, 1000  # pixels of the timeline


@dataclass(kw_only=True, slots=True)
class Config:
    """Settings of `python -m bench overlap`."""

    json: bool = option(False, "print one JSON object instead of a table")
    threads: int = option(1, "torch threads of each of the two threads", at_least=1)
    prompts: int = option(8, "prompts of the rollout, 8 pictures each", at_least=1)
    repeats: int = option(7, "timed runs of each", at_least=1)
    write: str = option("", "PNG file that gets the timeline of the median runs")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.write and not Path(self.write).parent.is_dir():
            raise UserError(f"--write: no folder {Path(self.write).parent}")


@dataclass(slots=True)
class Measured:
    """One run of both pieces of work; times in seconds, spans from its start."""

    total: float
    exposed: float
    reference: Span
    rewards: list[Span]
    scores: Scores
    experience: Experience


def run(config: Config) -> dict:
    """The suite's {"rows", "ratios", "correct"}."""
    torch.set_num_threads(config.threads)
    settings = TrainConfig(prompts_per_step=config.prompts, threads=config.threads, device="cpu")
    trainer = Trainer(settings, load_prompts(settings.dataset_name), [])
    chosen = [trainer.rows[i] for i in trainer.sampler.rows(0)]
    batch = [row for row in chosen for _ in range(settings.group_size)]
    prompts = [row["prompt"] for row in batch]
    made = trainer._generate(prompts, 0)
    providers = {"sequential": False, "pipeline": True}
    found: dict[str, list[Measured]] = {name: [] for name in providers}
    with RewardPipeline(trainer.ensemble, "cpu") as pipeline:

        def measure(beside: bool) -> Measured:
            return _measure(trainer, pipeline, made, prompts, batch, beside)

        warm = [measure(beside) for beside in providers.values()]
        correct = _agree(*warm)
        for _ in range(config.repeats if correct else 0):
            for name, beside in providers.items():
                found[name].append(measure(beside))
    shape = f"tiny: {len(batch)} images, {len(trainer.ensemble.experts)} experts, 2 threads of 1"
    rows, medians = [], {}
    for name, runs in found.items():
        row: dict = {"provider": name, "shape": shape, "correct": correct}
        if correct:
            row |= {
                "seconds": statistics.median(m.total for m in runs),
                "exposed_seconds": statistics.median(m.exposed for m in runs),
                "reward_seconds": statistics.median(_length(m.rewards) for m in runs),
                "reference_seconds": statistics.median(
                    m.reference.end - m.reference.start for m in runs
                ),
            }
            medians[name] = min(runs, key=lambda m, s=row["seconds"]: abs(m.total - s))
        rows.append(row)
    if not correct:
        return {"rows": rows, "ratios": {}, "correct": False}
    one, other = rows
    bound = min(one["reward_seconds"], one["reference_seconds"])
    other["bound_seconds"] = bound
    other["hidden_seconds"] = one["seconds"] - other["seconds"]
    if config.write:
        draw_timeline(medians).save(config.write)
    ratios = {"hidden_share_of_possible": other["hidden_seconds"] / bound}
    return {"rows": rows, "ratios": ratios, "correct": True}


def _measure(
    trainer: Trainer,
    pipeline: RewardPipeline,
    made: Generation,
    prompts: list[str],
    batch: list[dict],
    beside: bool,
) -> Measured:
    """Rewards and reference log-probs of a rollout. Args: beside: at the same time."""
    pixels = made.pixels.float()
    start = time.perf_counter()
    handle = pipeline.submit(prompts, pixels, batch)
    if not beside:
        handle.result()
    before = time.perf_counter()
    experience = trainer.learner.experience(made)
    after = time.perf_counter()
    scores = handle.result()
    total = time.perf_counter() - start
    return Measured(
        total,
        handle.seconds_exposed,
        Span("reference", before - start, after - start),
        [Span(s.expert, s.start - start, s.end - start) for s in handle.spans],
        scores,
        experience,
    )


def _agree(a: Measured, b: Measured) -> bool:
    pairs = [
        (a.scores.total, b.scores.total),
        (a.experience.levels[-1].ref, b.experience.levels[-1].ref),
    ]
    pairs += [(s, b.scores.by_expert[name]) for name, s in a.scores.by_expert.items()]
    return all(torch.isfinite(x).all() and torch.allclose(x, y, atol=1e-5) for x, y in pairs)


def _length(spans: list[Span]) -> float:
    return spans[-1].end - spans[0].start


def draw_timeline(runs: dict[str, Measured]) -> Image.Image:
    """Who worked when: two lanes, main thread and worker, for each provider."""
    longest = max(m.total for m in runs.values())
    font = ImageFont.load_default(13)
    height = len(runs) * (2 * (BAR + GAP) + 2 * GAP) + 3 * BAR
    sheet = Image.new("RGB", (LEFT + WIDTH + 2 * GAP, height), "white")
    pen = ImageDraw.Draw(sheet)
    experts = [s.expert for s in next(iter(runs.values())).rewards]
    color = {name: COLORS[1 + i % (len(COLORS) - 1)] for i, name in enumerate(experts)}
    color["reference"] = COLORS[0]
    scale = WIDTH / longest
    top = GAP
    for name, measured in runs.items():
        lanes = {"main thread": [measured.reference], "worker thread": measured.rewards}
        for lane, spans in lanes.items():
            pen.text((GAP, top + 5), f"{name}: {lane}", "black", font)
            for span in spans:
                box = (LEFT + span.start * scale, top, LEFT + span.end * scale, top + BAR)
                pen.rectangle(box, fill=color[span.expert], outline="white")
            top += BAR + GAP
        top += 2 * GAP
    x = LEFT
    for name, shade in color.items():
        pen.rectangle((x, top + 4, x + 12, top + 16), fill=shade)
        pen.text((x + 18, top + 2), name, "black", font)
        x += 40 + int(font.getlength(name))
    pen.text((GAP, top + 2), f"{longest:.3f} s in all", "black", font)
    return sheet
