"""The command that scores a policy on prompts, alone or against another.

    python -m engine.evaluate --model runs/tiny-0/policy --compare tiny

Prints one JSON object: the summary of engine.evaluate.evaluate, `cfg_weight`, and `intervals` (see
engine.evaluate.intervals) of the judge, the reward and each expert. With --compare also `compare`, the same
of the other model on the same prompts, seed and sample ids, and `difference`, the intervals of the
paired differences, model minus other: one that does not hold 0 is a difference of the models.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluate.intervals import intervals
from engine.evaluate.judge import EVAL_SEED, evaluate
from engine.experts import build_ensemble, open_pipeline, reward_device, reward_paths
from engine.generate.pictures import Settings, longest_plan
from engine.policy import load_policy
from engine.prompts.conversation import Conversation
from engine.prompts.data import PromptTemplate, Row, load_prompts, load_template
from engine.run.checkpoint import atomic_write_text
from engine.run.progress import Progress
from engine.settings.device import HELP, check_device, open_device
from engine.settings.errors import UserError, run_command
from engine.settings.options import check_fields, option, parse_args
from engine.settings.rewards import RewardConfig
from engine.weights.adapter import adapter_fingerprint
from engine.weights.fingerprint import checkpoint_fingerprint
from engine.weights.read import folder_of, guidance_scale
from rewards import RewardError, RewardPipeline

Records = list[dict[str, Any]]


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(RewardConfig):
    """Settings of `python -m engine.evaluate`."""

    # fmt: off
    model: str = option("tiny", "a Janus-Pro checkpoint folder, or tiny", group="what", aliases=["model_name_or_path"])
    adapter: str | None = option(None, "an adapter folder in peft's layout, merged into --model")
    compare: str | None = option(None, "another model, scored on the same prompts and seeds")
    prompts: str = option("tiny:heldout", "prompt file: .json, .jsonl, .csv, .parquet, .txt, tiny or tiny:heldout", aliases=["dataset_name"])
    out: str | None = option(None, "JSON file that gets the summary and a record a picture")
    num_generations: int = option(2, "pictures of each prompt", group="how", at_least=1)
    cot: bool = option(True, "plan first; --no_cot: straight from the prompt to the picture")
    seed: int = option(EVAL_SEED, "seed of the sampling", at_least=0, below=2**32)
    cfg_weight: float | None = option(None, "guidance weight; 1: no guidance; none: each checkpoint's own", at_least=0)
    temperature: float = option(1.0, "sampling temperature of plans and images", above=0)
    max_prompt_length: int = option(512, "longest prompt in tokens", at_least=1)
    max_completion_length: int | None = option(None, "longest plan in tokens; none: 512, in a context below 1024 40", at_least=1)
    reasoning_prompt_path: str | None = option(None, "file with the instruction to plan; {} is the prompt")
    device: str = option("auto", HELP)
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        check_device("device", self.device)
        self.check_rewards()


def main(argv: list[str]) -> None:
    """Print the scores of a model, or of two, with their intervals."""
    config = parse_args(EvaluateConfig, argv, description="Score a policy on prompts.")
    rows = load_prompts(config.prompts)
    models = [config.model] if config.compare is None else [config.model, config.compare]
    templates = []
    for model in models:
        # Before the first model is scored, which may take hours.
        checkpoint_fingerprint(folder_of(model))
        templates.append(load_template(folder_of(model), config.reasoning_prompt_path))
    if config.adapter is not None:
        adapter_fingerprint(config.adapter)
    device = reward_device(config, open_device("device", config.device))
    ensemble = build_ensemble(
        config.reward_funcs,
        model=config.model,
        device=device,
        dtype=config.reward_dtype,
        paths=reward_paths(config),
        weights=config.reward_weights or None,
    )
    adapters = (config.adapter, None)
    with open_pipeline(ensemble, device, config) as pipeline:
        scored = [
            score(model, adapter, template, rows, pipeline, config)
            for model, adapter, template in zip(models, adapters, templates, strict=False)
        ]
    tables = [score_table(records, config.num_generations) for _, records in scored]
    tasks = [row.get("task_type", "prompt") for row in rows]
    report, rest = report_on(scored[0][0], tables[0], tasks), {}
    if config.compare is not None:
        other = report_on(scored[1][0], tables[1], tasks)
        report["compare"] = {"model": config.compare, **other}
        # Where one model's pictures are the judge's and the other's not, it has no difference.
        shared = [name for name in tables[0] if name in tables[1]]
        paired = np.stack([tables[0][name] - tables[1][name] for name in shared], axis=1)
        report["difference"] = intervals(paired, shared, tasks)
        rest = {"compare_rows": scored[1][1]}
    if config.out:
        content = {"summary": report, "rows": scored[0][1], **rest}
        atomic_write_text(Path(config.out), json.dumps(content, indent=1) + "\n")
    print(json.dumps(report, indent=2))


def score(
    model: str,
    adapter: str | None,
    template: PromptTemplate,
    rows: list[Row],
    pipeline: RewardPipeline,
    config: EvaluateConfig,
) -> tuple[dict[str, Any], Records]:
    """The summary and records of one model, which is loaded and let go of again."""
    policy = load_policy(model, device=open_device("device", config.device), adapter=adapter)
    conversation = Conversation(policy, template)
    plan = longest_plan(policy, config.max_completion_length) if config.cot else 0
    conversation.check(
        rows,
        config.prompts,
        max_prompt=min(config.max_prompt_length, policy.context_length),
        max_plan=plan,
    )
    cfg_weight = guidance_scale(model, config.cfg_weight)
    with Progress(len(rows) * config.num_generations) as progress:
        try:
            summary, records = evaluate(
                policy,
                conversation,
                rows,
                generations=config.num_generations,
                settings=Settings(
                    seed=config.seed,
                    max_completion_length=plan,
                    cfg_weight=cfg_weight,
                    temperature=config.temperature,
                    with_plan=config.cot,
                ),
                ensemble=pipeline,
                progress=lambda done, total: progress.advance(done - progress.done),
            )
        except (RewardError, FloatingPointError) as error:
            raise UserError(f"{model}: {error}") from error
    return {**summary, "cfg_weight": cfg_weight}, records


def score_table(records: Records, generations: int) -> dict[str, np.ndarray]:
    """Name -> (P,) scores, each the mean over a prompt's adjacent records."""
    columns = {"reward": [r["reward"] for r in records]}
    if records[0]["scored_by"] == "judge":
        columns = {"judge": [r["score"] for r in records], **columns}
    for name in records[0]["rewards"]:
        columns[name] = [r["rewards"][name] for r in records]
    return {
        name: np.array(values).reshape(-1, generations).mean(1) for name, values in columns.items()
    }


def report_on(
    summary: dict[str, Any], table: dict[str, np.ndarray], tasks: list[str]
) -> dict[str, Any]:
    """The summary with the intervals of every column."""
    values = np.stack(list(table.values()), axis=1)
    return {**summary, "intervals": intervals(values, list(table), tasks)}


if __name__ == "__main__":
    sys.exit(run_command(main))
