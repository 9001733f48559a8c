"""Prompts and plans as token ids: the two stages of a Janus conversation."""

from collections.abc import Sequence

from torch import Tensor, tensor

from engine.model.policy import Policy
from engine.prompts.data import PromptTemplate, Row
from engine.settings.errors import UserError


class Conversation:
    """Encodes what the policy reads and decodes the plans that it writes."""

    def __init__(self, policy: Policy, template: PromptTemplate) -> None:
        if policy.tokenizer is None:
            raise ValueError("policy: wanted one with a tokenizer")
        self.policy, self.template, self.tokenizer = policy, template, policy.tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def stage1(self, prompt: str) -> Tensor:
        """What the plan continues: (L,) int64, BOS first."""
        ids = [self.policy.bos, *self.encode(self.template.stage1_text(prompt))]
        return tensor(ids, device=self.policy.device)

    def stage2(self, prompt: str, plan: str | None) -> Tensor:
        """What the image tokens continue: (L,) int64, BOS first, image-start last."""
        ids = self.encode(self.template.stage2_text(prompt, plan))
        return tensor([self.policy.bos, *ids, self.policy.image_start], device=self.policy.device)

    def plans(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Completions (B, T) with their mask as text, special tokens dropped."""
        return [
            self.tokenizer.decode(row[kept], skip_special_tokens=True).strip()
            for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)
        ]

    def check(self, rows: Sequence[Row], source: str, *, max_prompt: int, max_plan: int) -> None:
        """Raise UserError naming the first prompt that is too long for the model, or for the user."""
        spare = self.policy.context_length - max_plan
        for number, row in enumerate(rows, 1):
            prompt = row["prompt"]
            own, first = len(self.encode(prompt)), len(self.stage1(prompt))
            # A plan's tokens may split differently inside the second prompt: one spare token.
            second = len(self.stage2(prompt, "")) + 1 + self.policy.image_tokens
            if own > max_prompt:
                raise UserError(
                    f"{source}: prompt {number} ({prompt[:40]!r}) has {own} tokens, "
                    f"max_prompt_length is {max_prompt}"
                )
            if max(first, second) > spare:
                raise UserError(
                    f"{source}: prompt {number} ({prompt[:40]!r}) needs "
                    f"{max(first, second) + max_plan} tokens with its plan, "
                    f"the model's context is {self.policy.context_length}"
                )
