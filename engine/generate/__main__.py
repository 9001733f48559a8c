"""The command that draws pictures for prompts.

    python -m engine.generate --prompt "a three-sided shape in the colour of grass"
    python -m engine.generate --model PATH --prompts FILE --out DIR --num_generations 4

The first draws a grid to look at. The second fills a folder, goes on where it was stopped, and can
name the files as a benchmark's evaluator expects them (engine/generate/benchmark_layouts.py).

Sample k of prompt i has the noise of sample id `65536 i + k`, whatever else is drawn. Pictures are
made in batches that are the same in every session: a batch that was cut off is drawn anew as a
whole, because the rounding, and so in rare cases a token, depends on what is in a batch. For the
same reason two runs give the same bytes only with the same --batch_size, threads and device.
"""

# ruff: noqa: RUF009  `option` makes a dataclasses.field, which ruff cannot know

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from engine.generate.benchmark_layouts import layout_files
from engine.generate.folder import PictureFolder
from engine.generate.pictures import Generation, Settings, generate, longest_plan
from engine.policy import load_policy
from engine.prompts.conversation import Conversation
from engine.prompts.data import PromptTemplate, Row, load_prompts, load_template
from engine.run.checkpoint import atomic_write_text
from engine.run.grids import save_grid
from engine.run.inside import inside
from engine.run.progress import Progress
from engine.settings.device import HELP, check_device, open_device
from engine.settings.errors import UserError, run_command
from engine.settings.options import check_fields, option, parse_args
from engine.weights.adapter import adapter_fingerprint
from engine.weights.fingerprint import checkpoint_fingerprint
from engine.weights.read import folder_of, guidance_scale

PICTURES = 1 << 16  # sample ids of one prompt


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """Settings of `python -m engine.generate`."""

    # fmt: off
    prompt: list[str] = option((), "prompts, for a grid to look at", group="what")
    prompts: str | None = option(None, "a prompt file instead: .json, .jsonl, .csv, .parquet, .txt, or tiny:heldout")
    num_generations: int = option(None, "pictures of each prompt; none: 4, for wise 1", at_least=1, at_most=PICTURES)
    out: str = option("generated", "folder for the pictures and manifest.jsonl; with --prompt for grid.png and plans.json")
    layout: Literal["plain", "t2i-compbench", "geneval", "wise"] = option("plain", "file names of --prompts, for a benchmark's evaluator")
    overwrite: bool = option(False, "start anew where the settings of --out's pictures differ")
    model: str = option("tiny", "a Janus-Pro checkpoint folder, or tiny", group="how", aliases=["model_name_or_path"])
    adapter: str | None = option(None, "an adapter folder in peft's layout, such as runs/NAME/adapter")
    cot: bool = option(True, "plan first; --no_cot: straight from the prompt to the picture")
    seed: int = option(0, "seed of the sampling", at_least=0, below=2**32)
    cfg_weight: float | None = option(None, "guidance weight; 1: no guidance; none: the checkpoint's own", at_least=0)
    temperature: float = option(1.0, "sampling temperature of plans and images", above=0)
    max_prompt_length: int = option(512, "longest prompt in tokens", at_least=1)
    max_completion_length: int | None = option(None, "longest plan in tokens; none: 512, in a context below 1024 40", at_least=1)
    reasoning_prompt_path: str | None = option(None, "file with the instruction to plan; {} is the prompt")
    batch_size: int = option(64, "pictures sampled at a time", at_least=1)
    device: str = option("auto", HELP)
    # fmt: on

    def __post_init__(self) -> None:
        if self.num_generations is None:
            self.num_generations = 1 if self.layout == "wise" else 4
        check_fields(self)
        check_device("device", self.device)
        if bool(self.prompt) == (self.prompts is not None):
            raise UserError("give either --prompt TEXT or --prompts FILE")
        if any(not text.strip() for text in self.prompt):
            raise UserError("--prompt: a prompt is empty")
        if self.prompt and self.layout != "plain":
            raise UserError(f"--layout {self.layout} names the pictures of --prompts FILE")


def main(argv: list[str]) -> None:
    """Write pictures with their plans: a grid of a few, or a folder for a file of prompts."""
    config = parse_args(GenerateConfig, argv, description="Pictures and plans for prompts.")
    template = load_template(folder_of(config.model), config.reasoning_prompt_path)
    if config.prompt:
        draw_grid([{"prompt": prompt} for prompt in config.prompt], template, config)
    elif config.prompts is not None:
        fill_folder(load_prompts(config.prompts), template, config)


def sampler(
    rows: Sequence[Row], template: PromptTemplate, config: GenerateConfig
) -> Callable[[range], Generation]:
    """Load the model, check that every prompt fits it, and return what draws pictures by number.

    Picture n is number n % num_generations of prompt n // num_generations.
    """
    device = open_device("device", config.device)
    policy = load_policy(config.model, device=device, adapter=config.adapter)
    conversation = Conversation(policy, template)
    plan = longest_plan(policy, config.max_completion_length) if config.cot else 0
    conversation.check(
        rows,
        config.prompts or "--prompt",
        max_prompt=min(config.max_prompt_length, policy.context_length),
        max_plan=plan,
    )
    how = Settings(
        seed=config.seed,
        max_completion_length=plan,
        cfg_weight=guidance_scale(config.model, config.cfg_weight),
        temperature=config.temperature,
        with_plan=config.cot,
    )

    def draw(numbers: range) -> Generation:
        ids = [sample_id(n, config.num_generations) for n in numbers]
        try:
            return generate(
                policy,
                conversation,
                [rows[n // config.num_generations]["prompt"] for n in numbers],
                torch.tensor(ids, device=policy.device),
                how,
            )
        except FloatingPointError as error:
            raise UserError(f"--model {config.model}: {error}") from error

    return draw


def sample_id(picture: int, num_generations: int) -> int:
    """The noise of a picture: a function of its prompt's number and its own among the prompt's."""
    return picture // num_generations * PICTURES + picture % num_generations


def record(row: Row, plan: str, picture: int, config: GenerateConfig) -> dict[str, Any]:
    """What is written down about a picture; the plan is null where none was asked for."""
    return {
        "prompt": row["prompt"],
        "plan": plan if config.cot else None,
        "seed": config.seed,
        "sample_id": sample_id(picture, config.num_generations),
    }


def batches(total: int, size: int) -> list[range]:
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def draw_grid(rows: list[Row], template: PromptTemplate, config: GenerateConfig) -> None:
    """grid.png with every picture over its plan, and plans.json."""
    draw = sampler(rows, template, config)
    each = config.num_generations
    made = [draw(numbers) for numbers in batches(len(rows) * each, config.batch_size)]
    plans = [plan for part in made for plan in part.plans]
    records = [record(rows[n // each], plan, n, config) for n, plan in enumerate(plans)]
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error
    save_grid(
        inside(out, "grid.png"),
        torch.cat([part.pixels.float().cpu() for part in made]),
        [f"{r['prompt']}\n{r['plan'] or ''}" for r in records],
        columns=each,
    )
    atomic_write_text(inside(out, "plans.json"), json.dumps(records, indent=2) + "\n")
    print(f"{out / 'grid.png'}: {len(plans)} pictures; plans in {out / 'plans.json'}")


def fill_folder(rows: list[Row], template: PromptTemplate, config: GenerateConfig) -> None:
    """The pictures of a prompt file that --out does not hold yet, and its manifest."""
    each = config.num_generations
    files = layout_files(config.layout, rows, each, config.prompts or "--prompts")
    folder = PictureFolder(
        Path(config.out),
        files.pictures,
        files.texts,
        settings(rows, template, config),
        shown={
            "model_path": config.model,
            "prompt_file": config.prompts,
            **({"adapter_path": config.adapter} if config.adapter else {}),
        },
        overwrite=config.overwrite,
    )
    found = len(folder.records)
    draw = None if folder.complete else sampler(rows, template, config)
    folder.begin()
    if files.altered:
        first = files.altered[0]
        print(
            f"note: {len(files.altered)} prompts are no file name as they are, and the evaluator "
            f"of {config.layout} reads the prompt there; the first is prompt {first + 1}: "
            f"{rows[first]['prompt'][:40]!r}",
            file=sys.stderr,
        )
    with Progress(len(files.pictures), found) as progress:
        for numbers in batches(len(files.pictures), config.batch_size):
            missing = [n for n in numbers if n not in folder.records]
            if not missing:
                continue
            assert draw is not None  # something is missing, so the folder was not complete
            made = draw(numbers)
            records = [
                record(rows[n // each], plan, n, config)
                for n, plan in zip(numbers, made.plans, strict=True)
            ]
            drawn = zip(made.pixels.float().cpu(), records, strict=True)
            folder.add(dict(zip(numbers, drawn, strict=True)))
            progress.advance(len(missing))
    folder.finish()
    print(f"{config.out}: {len(files.pictures)} pictures, {found} of them there before")


def settings(rows: list[Row], template: PromptTemplate, config: GenerateConfig) -> dict[str, Any]:
    """Everything but rounding that decides the pictures, their names and their manifest."""
    prompts = json.dumps(rows, sort_keys=True, default=str)
    adapter = {} if config.adapter is None else {"adapter": adapter_fingerprint(config.adapter)}
    names = ("layout", "num_generations", "cot", "seed", "temperature", "max_completion_length")
    return {
        "model": checkpoint_fingerprint(folder_of(config.model)),
        **adapter,
        "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16],
        "cfg_weight": guidance_scale(config.model, config.cfg_weight),
        **{name: getattr(config, name) for name in names},
        **(dataclasses.asdict(template) if config.cot else {"roles": template.roles}),
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
