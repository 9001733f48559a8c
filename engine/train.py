"""Train a policy with BiCoT-GRPO: python -m engine.train

The method is T2I-R1's (arXiv:2505.00703). Where the engine departs from it, and why:

* No padding semantics: every sequence means what it means alone. T2I-R1 right-pads and puts
  image-start after the pads, so its samples depend on their batch-mates.
* Old log-probs come from the sampler and the clip is live: with --num_iterations above 1 the
  ratio moves. T2I-R1's ratio is exp(logp - logp.detach()), always 1.
* The distribution that was sampled can be the one that is trained (--logprob_policy guided).
  T2I-R1 samples guided and trains the conditional one, which stays the default.
* Text and image tokens share one mean (--loss_type token), as published; or each level has its own.
* The image level never runs the text head; aligner(codebook) is a table.
* The detector's slips of the published code (see rewards/detection.py) are not repeated.
"""

import json
import resource
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nvtx
import torch

from engine.evaluate.judge import EVAL_SEED, evaluate, judge_scores
from engine.experts import build_ensemble, open_pipeline, reward_device, reward_paths
from engine.generate.pictures import Generation, Settings, generate
from engine.learner.credit import credit, zero_std_groups
from engine.learner.learner import Learner
from engine.learner.resample import resample
from engine.learner.watch import NothingLearned
from engine.memory import describe, require_memory
from engine.model.adapter import adapter_dropout, attach_adapter, require_peft
from engine.policy import load_policy, save_policy
from engine.prompts.conversation import Conversation
from engine.prompts.data import PromptSampler, Row, load_prompts, load_template, spread
from engine.report.__main__ import write_report
from engine.run.checkpoint import atomic_write_text, latest_checkpoint
from engine.run.folder import name_run, open_run, stop_on_signal
from engine.run.grids import save_grid
from engine.run.inside import inside
from engine.run.monitor import RunLogger
from engine.settings.device import enter_device, open_device
from engine.settings.errors import UserError, run_command
from engine.settings.options import parse_args, to_yaml
from engine.settings.train import TrainConfig
from engine.weights.adapter import save_adapter
from engine.weights.read import folder_of, guidance_scale
from engine.weights.save import require_replaceable
from rewards import RewardError, RewardPipeline, Scores


class Trainer:
    """Everything one run holds; `step` is the whole algorithm."""

    def __init__(self, config: TrainConfig, rows: list[Row], eval_rows: list[Row]) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        device = open_device("device", config.device)
        enter_device(device)
        folder = folder_of(config.model)
        template = load_template(folder, config.reasoning_prompt_path)
        dtype = getattr(torch, config.dtype)
        self.cfg_weight = guidance_scale(config.model, config.cfg_weight)
        config.cfg_weight = self.cfg_weight
        self.config, self.rows, self.eval_rows = config, rows, eval_rows
        self.policy = load_policy(config.model, dtype=dtype, device=device)
        if config.use_peft:
            attach_adapter(
                self.policy,
                r=config.lora_r,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                targets=config.adapted_layers,
                seed=config.seed,
                merge_in_place=config.lora_merge == "in_place",
            )
        self.conversation = Conversation(self.policy, template)
        for source, checked in ((config.dataset_name, rows), (config.eval_dataset, eval_rows)):
            self.conversation.check(
                checked,
                source,
                max_prompt=config.max_prompt_length,
                max_plan=config.max_completion_length,
            )
        self.learner = Learner(self.policy, config)
        self.reward_device = reward_device(config, self.policy.device)
        self.ensemble = build_ensemble(
            config.reward_funcs,
            model=config.model,
            device=self.reward_device,
            dtype=config.reward_dtype,
            paths=reward_paths(config),
            weights=config.reward_weights or None,
            on_error=config.on_reward_error,
        )
        self.sampler = PromptSampler(len(rows), config.prompts_per_step, config.seed)

    def step(
        self, step: int, pipeline: RewardPipeline
    ) -> tuple[dict[str, Any], Generation, Scores]:
        """One rollout and its updates. Returns metrics, what was generated, and its scores."""
        config = self.config
        started = time.perf_counter()
        chosen = [self.rows[i] for i in self.sampler.rows(step - 1)]
        batch = [row for row in chosen for _ in range(config.group_size)]  # B rows, groups adjacent
        prompts = [row["prompt"] for row in batch]
        first_sample = (step - 1) * config.images_per_step

        pipeline.prepare(prompts, batch)  # tokenised while the pictures are drawn
        with nvtx.annotate("rollout"):
            made = self._generate(prompts, first_sample)  # plans (B, T), images (B, N), pixels
        rolled = time.perf_counter()
        handle = pipeline.submit(prompts, made.pixels.float(), batch)  # beside what follows
        with nvtx.annotate("reference"):
            experience = self.learner.experience(made)  # old and reference log-probs (B, T), (B, N)
        scores = handle.result()  # total (B,)
        resampled = 0
        if config.dynamic_sampling == "resample":
            # Noise of its own for each attempt: no run has so many samples.
            resampled = resample(
                made,
                scores,
                batch,
                draw=lambda asked, n: self._generate(asked, first_sample + n * (1 << 40)),
                pipeline=pipeline,
                group_size=config.group_size,
            )
            experience = self.learner.experience(made) if resampled else experience
        earned = credit(scores, self.ensemble.weights, config)  # advantages (B,) of each level
        self.learner.credit(experience, earned)
        scored = time.perf_counter()
        with nvtx.annotate("update"):
            for n in range(config.num_iterations):
                with adapter_dropout(self.policy, config.seed, step, n):
                    metrics = self.learner.update(step, experience)  # one loss over both levels
        ended = time.perf_counter()

        tokens = int(made.text.mask.sum()) + made.image.ids.numel()
        lengths = made.text.mask.sum(1).float()
        groups = scores.total.view(-1, config.group_size)
        metrics |= {
            "step": step,
            "reward": scores.total.mean(),
            "reward_std": groups.std(1).mean(),
            "zero_std_groups": zero_std_groups(scores.total, config.group_size),
            "resampled_groups": resampled,
            "completion_length": lengths.mean(),
            "images_per_s": len(batch) / (ended - started),
            "tokens_per_s": tokens / (rolled - started),
            "seconds/rollout": rolled - started,
            "seconds/rewards_exposed": handle.seconds_exposed,
            "seconds/reference": scored - rolled - handle.seconds_exposed,
            "seconds/train": ended - scored,
            "seconds/step": ended - started,
        }
        for level, varied in earned.varied.items():
            metrics[f"zero_std_groups/{level}"] = 1 - varied.float().mean()
        metrics |= {f"rewards/{name}": values.mean() for name, values in scores.by_expert.items()}
        metrics |= {f"rewards_skipped/{name}": count for name, count in scores.skipped.items()}
        judged = judge_scores(made.pixels, batch)
        if judged is not None:
            metrics["judge"] = float(judged.mean())
        return metrics, made, scores

    def _generate(self, prompts: list[str], first_sample: int) -> Generation:
        ids = first_sample + torch.arange(len(prompts), device=self.policy.device)
        settings = self.settings(self.config.seed, images_per_plan=self.config.images_per_plan)
        return generate(self.policy, self.conversation, prompts, ids, settings)

    def settings(self, seed: int, *, images_per_plan: int = 1) -> Settings:
        """How pictures are drawn, in training and in its evaluations."""
        return Settings(
            seed=seed,
            max_completion_length=self.config.max_completion_length,
            cfg_weight=self.cfg_weight,
            temperature=self.config.temperature,
            images_per_plan=images_per_plan,
            with_plan=self.config.plans == "on",
        )


@dataclass(slots=True)
class Stopped(Exception):
    """The user asked the run to stop."""

    reason: str


def _evaluate(
    trainer: Trainer, when: str, pipeline: RewardPipeline, logger: RunLogger, stop: list[str]
) -> dict[str, Any]:
    """Evaluate before or after training, once a run; the result is kept in eval/."""
    config = trainer.config
    path = inside(config.run_dir, f"eval/{when}.json")
    if path.exists():
        return json.loads(path.read_text())["summary"]

    def progress(done: int, total: int) -> None:
        if stop:
            raise Stopped(stop[0])
        logger.say(f"evaluation {when} training: {done}/{total} pictures")

    summary, records = evaluate(
        trainer.policy,
        trainer.conversation,
        trainer.eval_rows,
        generations=config.eval_generations,
        settings=trainer.settings(EVAL_SEED),
        ensemble=pipeline,
        pictures=inside(config.run_dir, f"eval/{when}"),
        progress=progress,
    )
    atomic_write_text(path, json.dumps({"summary": summary, "rows": records}, indent=1))
    return summary


def _show_samples(
    trainer: Trainer,
    step: int,
    made: Generation,
    scores: Scores,
    prompts: list[str],
    logger: RunLogger,
) -> None:
    """A grid of the step's first pictures, two of each group, with plans and rewards."""
    size = trainer.config.group_size
    chosen = [i for i in range(len(prompts)) if i % size < 2][:16]
    path = inside(trainer.config.run_dir, f"samples/step-{step:06d}.png")
    save_grid(
        path,
        made.pixels[chosen].float().cpu(),
        [f"{prompts[i]}\n{made.plans[i]}" for i in chosen],
        columns=4,
        title=f"step {step}",
        scores=[float(scores.total[i]) for i in chosen],
    )
    logger.image("samples", step, path)
    logger.text("plans", step, "\n\n".join(f"{prompts[i]}: {made.plans[i]}" for i in chosen))


def train(config: TrainConfig) -> None:
    """Run, or resume, one training: evaluation, steps, evaluation, report."""
    started = time.monotonic()
    rows, eval_rows = load_prompts(config.dataset_name), load_prompts(config.eval_dataset)
    if config.eval_prompts:
        eval_rows = spread(eval_rows, config.eval_prompts)
    require_memory(config)
    name_run(config)
    result = inside(config.run_dir, "adapter" if config.use_peft else "policy")
    require_replaceable(result)  # now rather than when the run is over
    if config.use_peft:
        require_peft()
    trainer = Trainer(config, rows, eval_rows)
    done = 0
    found = latest_checkpoint(config.run_dir) if config.resume else None
    earlier = open_run(config, to_yaml(config), found)
    if found is not None:
        done = trainer.learner.restore(found)
    logger = RunLogger(config.run_dir, config.max_steps, resume=config.resume)
    watch = NothingLearned(config.max_zero_std_steps)
    summary: dict[str, Any] = {"eval": {}, "steps": config.max_steps, "seed": config.seed}
    try:
        with (
            stop_on_signal() as stop,
            open_pipeline(trainer.ensemble, trainer.reward_device, config) as pipeline,
        ):
            if config.resume:
                logger.truncate_after(done)
            if config.eval_generations:
                summary["eval"]["before"] = _evaluate(trainer, "before", pipeline, logger, stop)
            for step in range(done + 1, config.max_steps + 1):
                metrics, made, scores = trainer.step(step, pipeline)
                done = step
                if step % config.logging_steps == 0 or step == config.max_steps:
                    logger.log(metrics)
                if step % config.sample_steps == 0 or step in (1, config.max_steps):
                    chosen = [rows[i] for i in trainer.sampler.rows(step - 1)]
                    prompts = [r["prompt"] for r in chosen for _ in range(config.group_size)]
                    _show_samples(trainer, step, made, scores, prompts, logger)
                if step % config.save_steps == 0 or step == config.max_steps or stop:
                    trainer.learner.save(step)
                watch.look(metrics["zero_std_groups"], scores)
                if stop and step < config.max_steps:
                    raise Stopped(stop[0])
            if config.eval_generations:
                summary["eval"]["after"] = _evaluate(trainer, "after", pipeline, logger, stop)
    except Stopped as stopped:
        saved = f"saved at step {done}; " if done else ""
        logger.say(f"{stopped.reason}: {saved}continue with --resume")
        return
    except RewardError as error:
        # Rewards are awaited before anything of a step is changed: this is the step before.
        if done:
            trainer.learner.save(done)
        log = inside(config.run_dir, "reward_error.txt")
        atomic_write_text(log, "".join(traceback.format_exception(error)))
        saved = f"; saved at step {done}, continue with --resume" if done else ""
        raise UserError(f"after step {done}: {error} (details in {log}){saved}") from error
    finally:
        logger.close()
    seconds = earlier + time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    summary |= {"seconds": seconds, "peak_memory_mib": peak, "torch": torch.__version__}
    if config.use_peft:
        save_adapter(trainer.policy, inside(config.run_dir, "adapter"), base=config.model)
    else:
        save_policy(trainer.policy, inside(config.run_dir, "policy"))
    path = inside(config.run_dir, "summary.json")
    atomic_write_text(path, json.dumps(summary, indent=2) + "\n")
    report = write_report(config.run_dir)
    _print_result(summary, report)


def _print_result(summary: dict[str, Any], report: Path) -> None:
    scores = summary["eval"]
    if scores:
        before, after = scores["before"], scores["after"]
        print(f"held-out score: {before['mean']:.3f} before, {after['mean']:.3f} after")
        for task, value in before["by_task"].items():
            print(f"  {task:10} {value['mean']:.3f} -> {after['by_task'][task]['mean']:.3f}")
        narrowed = [held.get("diversity") for held in (before, after)]
        if all(narrowed):
            plans, pixels = (
                " -> ".join(f"{held[name]:.3f}" for held in narrowed)
                for name in ("distinct_plans", "pixel_distance")
            )
            print(f"  diversity  distinct plans {plans}, distance of pictures {pixels}")
    print(f"report: {report}")


def main(argv: list[str]) -> None:
    """Parse the command line and train, or print the plan."""
    config = parse_args(TrainConfig, argv, description="Train a policy with BiCoT-GRPO.")
    if config.plan:
        print(describe(config))
    else:
        train(config)


if __name__ == "__main__":
    sys.exit(run_command(main))
