"""Where a reward's differences come from: the plan, or the picture drawn from it.

For each prompt of a file some plans, for each plan some pictures, scored by the reward experts and,
where it can read them, by the tiny world's judge:

* `share_between_plans`: of the reward's variance within a prompt, by a nested analysis of variance
  with unbiased components; the rest is between pictures of the same plan.
* `best_of_N`: the score of the best of N pictures of one plan, chosen by the reward: what image-level
  training can gain while plans stay as they are. `rendered`: the judge's score of a perfect rendering of
  the plans.
* `reward_score_correlation`: within a plan, pictures pooled.
* `signal_plans`, `signal_images`: the share of signal in the gradient of each level: the squared norm of
  what the prompts' gradients have in common over their mean squared norm, by a sample of its entries.
* `distinct_plans`, and `distance_within_plan`, `distance_between_plans`: the mean absolute difference
  of two pictures' pixels.

A row a model: two models side by side by --models A B. Nothing is trained, no claim can be wrong, and
`correct` says that all numbers are finite. --picture FILE.png draws the best-of-N curves.
"""

# ruff: noqa: RUF009  `option` makes a dataclasses.field, which ruff cannot know

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.evaluate.judge import judge_scores, pair_distance
from engine.experts import build_ensemble, reward_paths
from engine.generate.pictures import Settings, generate, longest_plan
from engine.learner.credit import credit
from engine.learner.learner import Learner
from engine.learner.objective import level_loss
from engine.learner.optimizer import sampled
from engine.policy import load_policy
from engine.prompts.conversation import Conversation
from engine.prompts.data import Row, load_prompts, load_template, spread
from engine.settings.errors import UserError
from engine.settings.options import check_fields, option
from engine.settings.rewards import RewardConfig
from engine.settings.train import TrainConfig
from engine.tiny.judge import judge
from engine.tiny.world import read_plan, render
from engine.weights.read import folder_of, guidance_scale


@dataclass(kw_only=True, slots=True)
class Config(RewardConfig):
    """Settings of `python -m bench credit`."""

    json: bool = option(False, "print one JSON object instead of a table")
    threads: int = option(0, "torch threads; 0: torch's choice", at_least=0)
    models: list[str] = option(("tiny",), "checkpoint folders, or tiny")
    prompts: str = option("tiny", "prompt file, as in engine.train")
    count: int = option(32, "prompts, spread over the file; 0: all", at_least=0)
    plans: int = option(4, "plans of each prompt; 0: straight from the bare prompt", at_least=0)
    images: int = option(8, "pictures of each plan", at_least=2)
    seed: int = option(0, "seed of the sampling", at_least=0)
    gradients: bool = option(True, "the gradients' share of signal, too")
    picture: str | None = option(None, "PNG that gets the best-of-N curves")

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_rewards()
        if self.picture and importlib.util.find_spec("matplotlib") is None:
            raise UserError('--picture: needs pip install "t2i-engine[bench]" (matplotlib)')


def run(config: Config) -> dict[str, Any]:
    """Draw, score and analyse with every model."""
    rows = load_prompts(config.prompts)
    if config.count:
        rows = spread(rows, config.count)
    found = [diagnose(model, rows, config) for model in config.models]
    if config.picture:
        draw_curves(found, config.images, Path(config.picture))
    figures = [v for row in found for v in row.values() if isinstance(v, float)]
    return {"rows": found, "ratios": {}, "correct": bool(np.isfinite(figures).all())}


def diagnose(model: str, rows: list[Row], config: Config) -> dict[str, Any]:
    """One model's row."""
    policy = load_policy(model)
    conversation = Conversation(policy, load_template(folder_of(model), None))
    ensemble = build_ensemble(
        config.reward_funcs, model=model, device="cpu", paths=reward_paths(config),
        weights=config.reward_weights or None,
    )  # fmt: skip
    plans = max(1, config.plans)
    settings = Settings(
        seed=config.seed,
        max_completion_length=longest_plan(policy, None),
        cfg_weight=guidance_scale(model, None),
        images_per_plan=config.images,
        with_plan=config.plans > 0,
    )
    learner = _learner(policy, config, settings) if config.gradients else None
    by_prompt: list[dict[str, Any]] = []
    gradients: dict[str, list[Tensor]] = {}
    for number, row in enumerate(rows):
        batch = [row] * (plans * config.images)
        ids = number * len(batch) + torch.arange(len(batch))
        prompts = [row["prompt"]] * len(batch)
        made = generate(policy, conversation, prompts, ids, settings)
        scores = ensemble.score(prompts, made.pixels.float(), batch)
        judged = judge_scores(made.pixels, batch)
        reward = scores.total.double().numpy()
        by_prompt.append(
            {
                "reward": reward.reshape(plans, -1),
                "score": (reward if judged is None else judged).reshape(plans, -1),
                "rendered": _rendered(made.plans[:: config.images], row, judged is not None),
                "plans": len(set(made.plans)),
                **_distances(made.pixels, plans),
            }
        )
        if learner is not None:
            earned = credit(scores, ensemble.weights, learner.config)
            experience = learner.experience(made)
            learner.credit(experience, earned)
            for level, rows_of in zip(experience.levels, experience.parts[0], strict=True):
                learner.policy.zero_grad(set_to_none=True)
                level_loss(policy, rows_of, learner.config)["loss"].backward()
                grads = [p.grad for p in learner.parameters.values() if p.grad is not None]
                flat = torch.cat([g.double() for g in sampled(grads)])
                gradients.setdefault(level.name, []).append(flat)
    return {"provider": model, **_summary(by_prompt, config)} | {
        name: signal_share(gradients[level])
        for level, name in (("semantic", "signal_plans"), ("token", "signal_images"))
        if level in gradients
    }


def _learner(policy: Any, config: Config, settings: Settings) -> Learner:
    """What turns a prompt's samples into gradients, as a training would."""
    nested = config.plans > 1
    train = TrainConfig(
        prompts_per_step=1,
        num_generations=max(1, config.plans),
        images_per_plan=config.images,
        plans="on" if config.plans else "off",
        train_levels=["semantic", "token"] if nested else ["token"],
        advantages="nested" if nested else "group",
        advantage_scale="none",
        loss_type="level",
        level_weights=["semantic=1", "token=1"],
        cfg_weight=settings.cfg_weight,
        max_completion_length=settings.max_completion_length,
        beta=0.0,
        micro_batch_size=max(1, config.plans) * config.images,
    )
    return Learner(policy, train)


def _rendered(plans: list[str], row: Row, readable: bool) -> float:
    """The judge's mean score of the plans' perfect pictures; a plan that says nothing scores 0."""
    if not readable or not any(plans):
        return 0.0
    found = []
    for scene in map(read_plan, plans):
        pixels = None if scene is None else torch.from_numpy(render(scene)).permute(2, 0, 1)
        found.append(0.0 if pixels is None else float(judge(pixels[None] / 255, [row])[0]))
    return float(np.mean(found))


def _distances(pixels: Tensor, plans: int) -> dict[str, float]:
    """Mean absolute differences of pictures (plans * images, 3, H, W), within a plan and between."""
    by_plan = pixels.float().view(plans, -1, *pixels.shape[1:])
    found = {"distance_within_plan": pair_distance(by_plan[:, :4])}
    if plans > 1:
        found["distance_between_plans"] = pair_distance(by_plan[None, :, 0])
    return found


def _summary(by_prompt: list[dict[str, Any]], config: Config) -> dict[str, float]:
    reward = np.stack([p["reward"] for p in by_prompt])  # (prompts, plans, images)
    score = np.stack([p["score"] for p in by_prompt])
    found = {"score": float(score.mean()), "reward": float(reward.mean())}
    if config.plans > 1:
        found["share_between_plans"] = variance_between(reward)
    found["reward_score_correlation"] = within_correlation(reward, score)
    for n in (2, 4, 8, 16):
        if n <= config.images:
            found[f"best_of_{n}"] = best_of(reward, score, n)
    if any(p["rendered"] for p in by_prompt):
        found["rendered"] = float(np.mean([p["rendered"] for p in by_prompt]))
    if config.plans > 1:
        found["distinct_plans"] = float(np.mean([p["plans"] for p in by_prompt]))
    for name in ("distance_within_plan", "distance_between_plans"):
        if name in by_prompt[0]:
            found[name] = float(np.mean([p[name] for p in by_prompt]))
    return found


def variance_between(reward: np.ndarray) -> float:
    """Share of the variance within a prompt that is between its plans; (prompts, plans, images).

    Components of a nested analysis of variance: the mean squares between plans hold the pictures'
    variance too, which is taken out.
    """
    images = reward.shape[2]
    within = reward.var(2, ddof=1).mean()
    between = max(0.0, reward.mean(2).var(1, ddof=1).mean() - within / images)
    return float(between / max(between + within, 1e-12))


def within_correlation(reward: np.ndarray, score: np.ndarray) -> float:
    """Pearson's, of deviations from the plans' means (prompts, plans, images); 0 without any."""
    a, b = (x - x.mean(2, keepdims=True) for x in (reward, score))
    return float((a * b).sum() / max(np.sqrt((a**2).sum() * (b**2).sum()), 1e-12))


def best_of(reward: np.ndarray, score: np.ndarray, count: int) -> float:
    """Mean score of the picture of the best reward among `count` of a plan, over all subsets.

    A picture whose reward is the r-th smallest of m (from 0) is the best of a random subset with
    probability C(r, count - 1) / C(m, count).
    """
    images = reward.shape[2]
    order = np.argsort(reward, axis=2, kind="stable")
    ranked = np.take_along_axis(score, order, 2)
    chance = np.array([_choose(r, count - 1) / _choose(images, count) for r in range(images)])
    return float((ranked * chance).sum(2).mean())


def _choose(n: int, k: int) -> float:
    if k > n:
        return 0.0
    return float(np.prod([(n - i) / (i + 1) for i in range(k)]))


def signal_share(gradients: list[Tensor]) -> float:
    """|E g|^2 / E |g|^2 of independent gradients (K,), the first without bias: by pairs."""
    count = len(gradients)
    total = torch.stack(gradients)
    squares = total.square().sum()
    common = (total.sum(0).square().sum() - squares) / max(1, count * (count - 1))
    return float(common / (squares / count).clamp(min=1e-30))


def draw_curves(rows: list[dict[str, Any]], images: int, path: Path) -> None:
    """The score of the best of N pictures by N, a line a model; dotted: perfect renderings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for row in rows:
        counts = [1, *(n for n in (2, 4, 8, 16) if n <= images)]
        values = [row["score"], *(row[f"best_of_{n}"] for n in counts[1:])]
        (line,) = axes.plot(counts, values, marker="o", label=row["provider"])
        if "rendered" in row:
            axes.axhline(row["rendered"], color=line.get_color(), linestyle=":")
    axes.set_xlabel("pictures of one plan, of which the reward chooses")
    axes.set_ylabel("score")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
