"""Numbers of weights: of a model, and of what a run adds to it."""

from dataclasses import dataclass

import torch
from transformers import JanusConfig

from engine.model.adapter import TARGETS
from engine.model.policy import Policy
from engine.settings.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of weights, of a model's own modules built without memory.

    Attributes:
        language_model: decoder, token embedding and text head (once if tied): what trains.
        trunk: of it, the decoder layers' linear layers.
        image_modules: embedding of image tokens, aligner and image head.
        image_tokenizer: the VQ model.
        understanding: the tower that stays on disk; 0 where there are no weight files.
        adapters: of LoRA at the flags' rank; 0 without.
    """

    language_model: int
    trunk: int
    image_modules: int
    image_tokenizer: int
    understanding: int = 0
    adapters: int = 0

    @property
    def policy(self) -> int:
        return self.language_model + self.image_modules + self.image_tokenizer


def count_weights(model: JanusConfig, config: TrainConfig, understanding: int = 0) -> Counts:
    """The weights of a model, and of the adapters that the flags ask for."""
    with torch.device("meta"):
        policy = Policy(model)
    sizes = {"language": 0, "trunk": 0, "tokenizer": 0, "image": 0}
    adapters = 0
    targets = set(config.adapted_layers or TARGETS) if config.use_peft else set()
    for name, parameter in policy.named_parameters():
        if name.startswith(("model.language_model.", "lm_head.")):
            sizes["language"] += parameter.numel()
        elif name.startswith("model.vqmodel."):
            sizes["tokenizer"] += parameter.numel()
        else:
            sizes["image"] += parameter.numel()
        if ".layers." in name and parameter.ndim == 2 and "language_model" in name:
            sizes["trunk"] += parameter.numel()
            if name.split(".")[-2] in targets:
                adapters += config.lora_r * sum(parameter.shape)
    return Counts(
        language_model=sizes["language"],
        trunk=sizes["trunk"],
        image_modules=sizes["image"],
        image_tokenizer=sizes["tokenizer"],
        understanding=understanding,
        adapters=adapters,
    )
