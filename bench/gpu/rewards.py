"""The GPU check's rewards: experts on the device against the CPU, and the side stream at work."""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu.models import Item
from bench.gpu.timing import wall_seconds
from bench.rewards import models as reward_models
from bench.rewards.suite import EXPERTS, Batch, make_batch, one_at_a_time
from rewards import Ensemble, RewardPipeline, Scores

# A detector's score is a step function of near-ties: one in ten may fall on the other side.
TOLERANCE, SHARE = 5e-3, 0.9
ROUNDING = 1e-4  # of a score, from one thread or stream to another
SIDE_BY_SIDE = ("hps", "git", "blip", "orm")  # of the overlap
MAIN_WIDTH = 1024  # of the matrices that the main stream multiplies meanwhile
REPEATS = 5


def items(device: torch.device, experts: tuple[str, ...] = EXPERTS, images: int = 64) -> list[Item]:
    """Every expert in fp32 against itself on the CPU; the pipeline against no pipeline."""
    found: list[Item] = [(name, partial(expert_rows, name, device)) for name in experts]
    return [*found, ("pipeline", lambda: [overlap(device, experts, images)])]


def expert_rows(name: str, device: torch.device) -> list[dict[str, Any]]:
    """Scores on the device, in a batch and one at a time, and images a second of both."""
    batch = make_batch(16)
    here = on(batch, device)
    with tempfile.TemporaryDirectory() as folder:
        made = reward_models.write(name, Path(folder))
        expected, expert = made().score(*batch), made(device=device)
    row: dict[str, Any] = {"expert": name, "shape": f"16 images of {batch[1].shape[-1]} pixels"}
    errors = (expert.score(*here).cpu() - expected).abs()
    row |= {
        "max_error": errors.max().item(),
        "correct": (errors <= TOLERANCE).float().mean().item() >= SHARE,
    }
    if row["correct"]:
        single = _median(lambda: one_at_a_time(expert, here), device)
        batched = _median(lambda: expert.score(*here), device)
        row |= {"images_per_s": 16 / batched, "batched_vs_single": single / batched}
    return [row]


def overlap(device: torch.device, experts: tuple[str, ...], images: int) -> dict[str, Any]:
    """Experts beside matrix products of about their length: scores, and what is hidden.

    As `python -m bench overlap`, with products in place of the reference forward.
    """
    batch = make_batch(images)
    here = on(batch, device)
    loaded = []
    for name in SIDE_BY_SIDE:
        if name in experts:
            with tempfile.TemporaryDirectory() as folder:
                loaded.append(reward_models.write(name, Path(folder))(device=device))
    ensemble = Ensemble(loaded)
    x = torch.randn(MAIN_WIDTH, MAIN_WIDTH, device=device) / MAIN_WIDTH**0.5
    expected = ensemble.score(*here)
    reward = _median(lambda: ensemble.score(*here), device)
    products = max(1, round(reward / _median(lambda: x @ x, device)))

    def multiply() -> None:
        y = x
        for _ in range(products):
            y = y @ x

    main = _median(multiply, device)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    same = True
    with RewardPipeline(ensemble, device) as pipeline:

        def step(beside: bool) -> Scores:
            handle = pipeline.submit(*here)
            if not beside:
                handle.result()
            multiply()
            return handle.result()

        for beside in (False, True):  # warm up
            same = same and torch.allclose(step(beside).total, expected.total, atol=ROUNDING)
        for _ in range(REPEATS):
            for beside, found in seconds.items():
                found.append(wall_seconds(partial(step, beside), device))
    apart, together = (statistics.median(found) for found in seconds.values())
    return {
        "check": "reward experts beside the main stream",
        "correct": same,
        "reward_seconds": reward,
        "main_seconds": main,
        "seconds_apart": apart,
        "seconds_together": together,
        "hidden_share_of_possible": (apart - together) / min(reward, main),
    }


def on(batch: Batch, device: torch.device) -> Batch:
    prompts, images, rows = batch
    return prompts, images.to(device), rows


def _median(run: Callable[[], object], device: torch.device) -> float:
    run()
    return statistics.median(wall_seconds(run, device) for _ in range(REPEATS))
