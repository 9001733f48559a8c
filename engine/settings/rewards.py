"""The reward experts' flags, the same for every command that scores pictures."""

# ruff: noqa: RUF009  `option` makes a dataclasses.field, which ruff cannot know

import re
from dataclasses import dataclass
from typing import Literal

from engine.settings.device import check_device
from engine.settings.errors import UserError
from engine.settings.options import nearest, option

# Reward experts by name; engine/experts.py says what each one is.
EXPERTS = ("hps", "imagereward", "gdino", "owl", "git", "blip", "orm", "ocr")


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """What a settings class of a command that scores pictures inherits from."""

    # fmt: off
    reward_funcs: list[str] = option(("hps", "gdino", "git", "orm"), f"reward experts: {', '.join(EXPERTS)}, or package.module:Class", group="rewards")
    reward_weights: list[float] = option((), "a weight for each of reward_funcs; none: all equal", at_least=0)
    hps_ckpt_path: str | None = option(None, "weights of the human-preference expert")
    imagereward_ckpt_path: str | None = option(None, "weights of the human-preference expert by ImageReward")
    imagereward_config_path: str | None = option(None, "BERT vocabulary of ImageReward")
    git_ckpt_path: str | None = option(None, "weights of the VQA expert")
    blip_ckpt_path: str | None = option(None, "weights of the VQA expert by BLIP")
    gdino_ckpt_path: str | None = option(None, "weights of the detector")
    gdino_config_path: str | None = option(None, "BERT vocabulary of the detector, with a .pth also its architecture")
    owl_ckpt_path: str | None = option(None, "weights of the detector by OWLv2")
    orm_ckpt_path: str | None = option(None, "weights of the outcome reward model")
    reward_device: str | None = option(None, "cpu, cuda or cuda:N; none: the policy's")
    reward_dtype: Literal["float32", "bfloat16", "float16"] | None = option(None, "precision of experts that have a path; none: each one's own")
    reward_offload: bool = option(False, "keep an expert's weights in host memory while it is not scoring")
    reward_timeout: float = option(600.0, "seconds that the experts may take for a batch; 0: any time", at_least=0)
    # fmt: on

    def check_rewards(self) -> None:
        """Raise UserError naming the flag that cannot be."""
        names = self.reward_funcs
        if not names or len(set(names)) < len(names):
            raise UserError(f"reward_funcs must name at least one, each once, got {names}")
        for name in names:
            if name not in EXPERTS and not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
                raise UserError(
                    f"--reward_funcs: expected {', '.join(EXPERTS)} or package.module:Class "
                    f"(nearest: {nearest(name, EXPERTS)}), got {name!r}"
                )
        weights = self.reward_weights
        if weights and (len(weights) != len(self.reward_funcs) or sum(weights) == 0):
            raise UserError(
                f"reward_weights must be {len(self.reward_funcs)} numbers, one for each of "
                f"reward_funcs and not all 0, got {weights}"
            )
        if self.reward_device is not None:
            check_device("reward_device", self.reward_device, auto=False)
