"""The peer: the published rollout's algorithm in eager PyTorch, written from its description.

What T2I-R1 (arXiv:2505.00703) does for the image tokens, on transformers' Llama: conditional and
unconditional rows interleaved, every row prefilled for itself, a growing DynamicCache, and at each
step the head, guidance, a softmax, `torch.multinomial`, the ids twice, codebook and aligner.

Not handicapped: inference mode, SDPA attention, fp32 softmax, no attention mask (prompts must be of
equal length, where the published right-padding and ours agree), and no log-probs unless asked for,
which the published loop leaves to a later forward pass. Ours returns them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaModel, StaticCache

from bench.rollout.transformers_images import CACHE
from engine.model.policy import Policy

PUBLISHED_ROWS = 32  # rows of one chunk: 16 images


@dataclass(slots=True)
class EagerRollout:
    """What the loop drew.

    Attributes:
        ids: (B, N) int64.
        logprobs, guided_logprobs: (B, N) fp32 nats of the fed tokens; None unless scored.
        gaps: (B, N) fp32, how far the fed token's guided logit is below the best; None unless
            scored.
    """

    ids: Tensor
    logprobs: Tensor | None = None
    guided_logprobs: Tensor | None = None
    gaps: Tensor | None = None


class EagerLoop:
    """The loop on a copy of a policy's weights.

    Args:
        policy: gives the trunk's weights (copied into transformers' LlamaModel) and the image
            modules (used as they are).

    Attributes:
        static_tokens: tokens that a StaticCache holds, as transformers' own Janus generation uses
            one; None for the DynamicCache of the published loop.
    """

    static_tokens: int | None = None

    def __init__(self, policy: Policy) -> None:
        config = policy.config.text_config
        config._attn_implementation = "sdpa"
        self.llama = LlamaModel(config).to(device=policy.device, dtype=policy.dtype).eval()
        self.llama.load_state_dict(policy.model.language_model.state_dict())
        # `to` has rounded the rotary frequencies as well, which from_pretrained leaves in fp32.
        self.llama.rotary_emb = type(self.llama.rotary_emb)(config).to(policy.device)
        self.policy = policy

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Tensor],
        *,
        cfg_weight: float = 5.0,
        chunk_rows: int | None = PUBLISHED_ROWS,
    ) -> Tensor:
        """Draw the image tokens of each prompt from torch's global generator.

        Args:
            prompts: B tensors (L,) int64 of one length, each ending with image-start.
            chunk_rows: rows decoded together, two an image; None: all at once.
        Returns: (B, N) int64.
        """
        size = len(prompts) if chunk_rows is None else chunk_rows // 2
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return torch.cat([self._chunk(chunk, cfg_weight, None).ids for chunk in chunks])

    @torch.inference_mode()
    def score(
        self,
        prompts: Sequence[Tensor],
        ids: Tensor,
        *,
        cfg_weight: float = 5.0,
        chunk_rows: int | None = PUBLISHED_ROWS,
    ) -> EagerRollout:
        """The same loop with the tokens given: what it thinks of another engine's choices.

        Args:
            ids: (B, N) int64, fed in place of draws.
        """
        size = len(prompts) if chunk_rows is None else chunk_rows // 2
        parts = [
            self._chunk(prompts[i : i + size], cfg_weight, ids[i : i + size])
            for i in range(0, len(prompts), size)
        ]
        return EagerRollout(
            ids,
            torch.cat([p.logprobs for p in parts]),
            torch.cat([p.guided_logprobs for p in parts]),
            torch.cat([p.gaps for p in parts]),
        )

    def _cache(self) -> Cache:
        if self.static_tokens is None:
            return DynamicCache(config=self.llama.config)
        return StaticCache(config=self.llama.config, max_cache_len=self.static_tokens)

    def _chunk(
        self, prompts: Sequence[Tensor], cfg_weight: float, given: Tensor | None
    ) -> EagerRollout:
        if len({len(p) for p in prompts}) != 1:
            raise ValueError("prompts: wanted one length")
        policy, model = self.policy, self.policy.model
        steps, count = policy.image_tokens, len(prompts)
        rows = [row for p in prompts for row in (p, policy.unconditional(p))]
        embeds = policy.embed_text(torch.stack(rows))  # (2B, L, D)
        cache = self._cache()
        ids = torch.empty((count, steps), dtype=torch.int64, device=embeds.device)
        scores = None
        if given is not None:
            scores = torch.empty((3, count, steps), device=embeds.device)
        for step in range(steps):
            output = self.llama(inputs_embeds=embeds, use_cache=True, **{CACHE: cache})
            logits = model.generation_head(output.last_hidden_state[:, -1])
            cond, uncond = logits[0::2], logits[1::2]
            guided = uncond + cfg_weight * (cond - uncond)
            if given is None:
                probs = torch.softmax(guided, dim=-1, dtype=torch.float32)
                drawn = torch.multinomial(probs, num_samples=1)[:, 0]
            else:
                drawn = given[:, step]
                at = drawn[:, None]
                scores[0, :, step] = cond.log_softmax(-1).gather(-1, at)[:, 0]
                scores[1, :, step] = guided.log_softmax(-1).gather(-1, at)[:, 0]
                scores[2, :, step] = guided.amax(-1) - guided.gather(-1, at)[:, 0]
            ids[:, step] = drawn
            pairs = torch.stack((drawn, drawn), dim=1).view(-1)
            embeds = model.generation_aligner(model.generation_embeddings(pairs))[:, None]
        return EagerRollout(ids) if scores is None else EagerRollout(ids, *scores)
