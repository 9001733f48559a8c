"""Make everything embedded from nothing: python -m engine.tiny.pretrain [--out DIR] [--stages ...].

Stages, each using what the earlier ones left in the output folder: `data` (prompt splits),
`tokenizer`, `vq` (image tokenizer), `examples` (tokenised pictures), `clean` (policy on right
captions), `noisy` (policy on careless ones), `clip` (the human-preference expert). What they
reached is written to report.json. About 75 minutes on two cores.
"""

# ruff: noqa: RUF009  `option` makes a dataclasses.field, which ruff cannot know

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, JanusConfig, JanusVisionConfig, LlamaConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from engine.model.policy import Policy
from engine.policy import load_policy
from engine.prompts.data import load_template
from engine.run.checkpoint import atomic_write_text
from engine.settings.errors import run_command
from engine.settings.options import check_fields, option, parse_args
from engine.tiny import supervised, vq
from engine.tiny.prompts import corpus, make_splits, write_rows
from engine.tiny.tokenizer import train_tokenizer
from engine.weights.read import folder_of, write_policy

STAGES = ("data", "tokenizer", "vq", "examples", "clean", "noisy", "clip")
Stage = Literal["data", "tokenizer", "vq", "examples", "clean", "noisy", "clip"]
WIDTH, LAYERS, HEADS, INTERMEDIATE, CONTEXT = 128, 5, 4, 384, 256
GUIDANCE = 1.5  # as strong as this model bears: its distributions are sharp already
STARTED_WITH = (  # of another policy's folder, beside its weights
    "tokenizer.json",
    "tokenizer_config.json",
    "prompt_template.json",
    "generation_config.json",
)
INSTRUCTION = {"system": "", "reasoning": "plan: {}"}


@dataclass(kw_only=True, slots=True)
class PretrainConfig:
    """Settings of `python -m engine.tiny.pretrain`."""

    # fmt: off
    out: str = option(str(Path(__file__).parent), "folder that gets data/ and weights/")
    work: str = option("runs/pretrain", "folder for what is not kept")
    stages: list[Stage] = option(STAGES, "what to make")
    start: str | None = option(None, "policy folder, or tiny: its image tokenizer and weights are the work folder's, as if the stages vq and clean had made them")
    seed: int = option(0, "seed of everything", at_least=0)
    threads: int = option(0, "CPU threads; 0: torch's choice", at_least=0)
    vq_steps: int = option(2600, "training steps of the image tokenizer", at_least=1)
    examples: int = option(16000, "tokenised pictures with right captions", at_least=64)
    noisy_examples: int = option(7200, "tokenised pictures with careless captions", at_least=64)
    steps: int = option(3100, "policy steps on right captions", at_least=1)
    noisy_steps: int = option(710, "policy steps on careless captions", at_least=1)
    resume: bool = option(False, "let the clean stage go on from the policy in the work folder")
    text_every: int = option(4, "steps between those that train the text level too", at_least=1)
    batch_size: int = option(32, "examples in a policy step", at_least=1)
    learning_rate: float = option(2e-3, "peak learning rate of the policy", above=0)
    plan_noise: float = option(0.1, "share of a plan's words that are wrong", at_least=0, at_most=1)
    image_noise: float = option(0.01, "share of a picture's properties that differ from its plan", at_least=0, at_most=1)
    clip_steps: int = option(600, "training steps of the human-preference expert", at_least=1)
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)


def policy_config(vocab_size: int) -> JanusConfig:
    """The tiny policy's configuration: Janus-Pro's architecture, a few sizes smaller."""
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
    )
    vision = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=WIDTH,
        num_image_tokens=64,
    )
    return JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq.vq_config(WIDTH),
        tie_word_embeddings=False,
    )


def _save_examples(path: Path, examples: list[supervised.Example]) -> None:
    np.savez_compressed(
        path,
        ids=np.stack([e.image_ids for e in examples]),
        prompts=np.array([e.prompt for e in examples]),
        plans=np.array([e.plan for e in examples]),
    )


def _load_examples(path: Path) -> list[supervised.Example]:
    with np.load(path, allow_pickle=False) as found:
        return [
            supervised.Example(str(prompt), str(plan), ids)
            for prompt, plan, ids in zip(
                found["prompts"], found["plans"], found["ids"], strict=True
            )
        ]


class Pretraining:
    """The stages, one method each."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.data = Path(config.out) / "data"
        self.weights = Path(config.out) / "weights"
        self.policy_folder = self.weights / "policy"
        self.work = Path(config.work)
        for folder in (self.data, self.policy_folder, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        if config.start is not None:
            policy, folder = load_policy(config.start), folder_of(config.start)
            save_file(policy.model.vqmodel.state_dict(), self.work / "vq.safetensors")
            write_policy(policy, self.work / "clean", companions=folder)
            for name in STARTED_WITH:
                atomic_write_text(self.policy_folder / name, (folder / name).read_text())

    def report(self, **found: Any) -> None:
        """Add to report.json."""
        path = self.weights / "report.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        atomic_write_text(path, json.dumps({**known, **found}, indent=2) + "\n")

    def make_data(self) -> None:
        train, held_out = make_splits(train=200, held_out=24, seed=1)
        write_rows(self.data / "train.jsonl", train)
        write_rows(self.data / "heldout.jsonl", held_out)
        self.report(prompts={"train": len(train), "held_out": len(held_out)})

    def make_tokenizer(self) -> None:
        train_tokenizer([*corpus(), INSTRUCTION["reasoning"]], self.policy_folder)
        text = json.dumps(INSTRUCTION, indent=2) + "\n"
        atomic_write_text(self.policy_folder / "prompt_template.json", text)
        guidance = json.dumps({"guidance_scale": GUIDANCE}, indent=2) + "\n"
        atomic_write_text(self.policy_folder / "generation_config.json", guidance)

    def _vq(self) -> JanusVQVAE:
        model = JanusVQVAE(vq.vq_config(WIDTH))
        model.load_state_dict(load_file(self.work / "vq.safetensors"))
        return model.eval()

    def make_vq(self) -> None:
        torch.manual_seed(self.config.seed)
        model = JanusVQVAE(vq.vq_config(WIDTH))
        vq.train_vq(model, steps=self.config.vq_steps, seed=self.config.seed, log=say)
        save_file(model.state_dict(), self.work / "vq.safetensors")

    def _fresh_policy(self) -> Policy:
        tokenizer = AutoTokenizer.from_pretrained(str(self.policy_folder))
        torch.manual_seed(self.config.seed)
        policy = Policy(policy_config(len(tokenizer)), tokenizer)
        policy.model.vqmodel = self._vq()
        supervised.initialise(policy)
        return policy

    def make_examples(self) -> None:
        policy = self._fresh_policy()
        pixels = vq.scene_pixels(random.Random("held out of the tokenizer's training"), 256)
        ids = vq.encode(policy.model.vqmodel, pixels)
        error = (policy.model.vqmodel.decode(ids).clamp(-1, 1) - pixels).abs().mean().item()
        self.report(vq={"mae_of_255": error * 127.5, "codes_used": len(ids.unique())})
        rows = (self.data / "heldout.jsonl").read_text().splitlines()
        banned = {json.loads(row)["prompt"] for row in rows}
        config = self.config
        noise = supervised.Noise(config.plan_noise, config.image_noise)
        for name, count, how in (
            ("clean", config.examples, supervised.Noise()),
            ("noisy", config.noisy_examples, noise),
        ):
            rng = random.Random(f"{config.seed}/{name}")
            examples = supervised.make_examples(policy, count, how, rng, banned)
            _save_examples(self.work / f"{name}.npz", examples)
            say(f"examples: {count} {name}")

    def _train(
        self, policy: Policy, name: str, steps: int, peak_lr: float, text_every: int
    ) -> None:
        supervised.train(
            policy,
            load_template(self.policy_folder, None),
            _load_examples(self.work / f"{name}.npz"),
            schedule=supervised.Schedule(steps, self.config.batch_size, peak_lr, text_every),
            seed=self.config.seed,
            log=say,
        )

    def make_clean(self) -> None:
        if self.config.resume:
            policy = load_policy(str(self.work / "clean"))
        else:
            policy = self._fresh_policy()
        self._train(
            policy, "clean", self.config.steps, self.config.learning_rate, self.config.text_every
        )
        write_policy(policy, self.work / "clean", companions=self.policy_folder)

    def make_noisy(self) -> None:
        policy = load_policy(str(self.work / "clean"))
        self._train(policy, "noisy", self.config.noisy_steps, self.config.learning_rate / 4, 2)
        write_policy(policy, self.policy_folder)

    def make_clip(self) -> None:
        from engine.tiny.clip import train_clip

        found = train_clip(
            self.weights / "hps",
            tokenizer_path=self.policy_folder / "tokenizer.json",
            steps=self.config.clip_steps,
            seed=self.config.seed,
            log=say,
        )
        self.report(clip=found)


def say(line: str) -> None:
    """A line of progress."""
    print(line, flush=True)


def main(argv: list[str]) -> None:
    """Run the asked stages in order."""
    config = parse_args(PretrainConfig, argv, description="Make the embedded tiny world.")
    if config.threads:
        torch.set_num_threads(config.threads)
    pretraining = Pretraining(config)
    for stage in STAGES:
        if stage in config.stages:
            say(f"stage {stage}")
            getattr(pretraining, f"make_{stage}")()


if __name__ == "__main__":
    sys.exit(run_command(main))
