"""The seams hold strangers: another trunk, and weights from elsewhere, without a change in engine/.

The stranger is shaped like GPT-2: learned positions, LayerNorm, GELU, biases, one linear head over
image codes, pictures asked for by class. It goes through rollout, scoring and loss.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.model.generator import Generator, TrunkShape
from engine.model.head import Head
from engine.model.sequences import Sequences
from engine.model.weight_source import LayerWeights, LinearWeights, NormWeights
from engine.rollout import sample_images
from kernels import linear_grpo_loss, linear_logprobs

CODES, CLASSES, WIDTH, HEADS, LAYERS, TOKENS = 40, 9, 32, 2, 2, 6


class GPT(nn.Module):
    """The stranger; every method is one that `Generator` asks for."""

    shape, pad, image_tokens = TrunkShape(LAYERS, WIDTH, HEADS, HEADS, WIDTH // HEADS), 0, TOKENS
    context_length, version, dtype, device = 16, 0, torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        sizes = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "up": (64, WIDTH), "down": (WIDTH, 64)}  # fmt: skip
        self.tables = nn.ParameterList(
            torch.randn(n, WIDTH) for n in (CLASSES, CODES, self.context_length, CODES)
        )
        self.linears = nn.ModuleList(
            nn.ModuleDict({k: nn.Linear(n, m) for k, (m, n) in sizes.items()})
            for _ in range(LAYERS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS + 1))
        self.tables[3].data *= 0.2  # not so sure of itself that noise is idle
        self.weights = self

    def layers(self):
        for i, layer in enumerate(self.linears):
            linears = {k: LinearWeights(m.weight, m.bias) for k, m in layer.items()}
            norms = {"norm1": self.norm(2 * i), "norm2": self.norm(2 * i + 1)}
            yield LayerWeights(**norms, **linears, activation="gelu")

    def norm(self, index=2 * LAYERS):
        norm = self.norms[index]
        return NormWeights(norm.weight, norm.eps, norm.bias, kind="layer")

    def head(self, level):
        return Head(self.tables[3], None, self.tables[1], own_ids=True)

    def unconditional(self, prompt):
        return torch.cat((prompt[:0].new_full((len(prompt) - 1,), self.pad), prompt[-1:]))

    def embed_text(self, ids):
        return F.embedding(ids, self.tables[0])

    def rotations(self, length):
        half = torch.zeros(length, WIDTH // HEADS // 2)
        return half + 1, half

    def position_table(self):
        return self.tables[2]

    def forward(self, x):
        """Embeddings (B, T, D) -> states, and each layer's keys and values (B, H, T, hd)."""
        x, kept = x + self.tables[2][: x.shape[1]], []
        for i, layer in enumerate(self.linears):
            y = layer["qkv"](self.norms[2 * i](x)).unflatten(-1, (3, HEADS, -1))
            q, k, v = y.permute(2, 0, 3, 1, 4)
            kept.append((k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["out"](mixed.transpose(1, 2).flatten(2))
            x = x + layer["down"](F.gelu(layer["up"](self.norms[2 * i + 1](x))))
        return self.norms[-1](x), kept

    def prefill(self, prompts):
        _, kept = self(self.embed_text(nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)))
        return torch.stack([k for k, _ in kept]), torch.stack([v for _, v in kept])

    def completion_hidden(self, sequences):
        drawn = self.head(sequences.level).embed(sequences.completions[:, :-1])
        prompts = [self.embed_text(p) for p in sequences.prompts]
        states = [self(torch.cat((p, d))[None])[0][0] for p, d in zip(prompts, drawn, strict=True)]
        return torch.stack([s[len(p) - 1 :] for s, p in zip(states, prompts, strict=True)])


@pytest.fixture
def stranger() -> Generator:
    torch.manual_seed(0)
    return GPT()


PROMPTS = [torch.tensor([3, 5, 1]), torch.tensor([4, 1]), torch.tensor([3, 5, 1])]


def scored(generator, prompts, ids, weight):
    """(cond, guided) log-probs (B, N) by the training forward."""
    head = generator.head("token")
    blank = [generator.unconditional(p) for p in prompts]
    cond, uncond = (
        head.features(generator.completion_hidden(Sequences("token", asked, ids))).flatten(0, 1)
        for asked in (prompts, blank)
    )
    guidance = {"uncond_hidden": uncond, "cfg_weight": weight}
    return [
        linear_logprobs(cond, head.weight, ids.flatten(), **more).view_as(ids)
        for more in ({}, guidance)
    ]


@pytest.mark.usefixtures("decoder")
def test_a_stranger_s_rollout_is_what_its_own_forward_says(stranger):
    drawn = sample_images(stranger, PROMPTS, cfg_weight=3.0, seed=2)
    assert drawn.ids.shape == (3, TOKENS) and not torch.equal(drawn.ids[0], drawn.ids[2])
    with torch.no_grad():
        cond, guided = scored(stranger, PROMPTS, drawn.ids, 3.0)
    torch.testing.assert_close(drawn.logprobs, cond, rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn.guided_logprobs, guided, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("decoder")
def test_a_stranger_s_greedy_tokens_are_the_likeliest_of_its_own_forward(stranger):
    drawn = sample_images(stranger, PROMPTS, cfg_weight=3.0, greedy=True)
    with torch.no_grad():
        _, best = scored(stranger, PROMPTS, drawn.ids, 3.0)
        for code in range(CODES):
            other = drawn.ids.clone()
            other[:, -1] = code
            _, guided = scored(stranger, PROMPTS, other, 3.0)
            assert (guided[:, -1] <= best[:, -1] + 1e-5).all()


def test_a_stranger_learns_what_it_is_rewarded_for(stranger):
    """GRPO on one code: its share of the drawn tokens grows."""
    optimizer = torch.optim.AdamW(stranger.parameters(), lr=3e-3)
    prompts, shares = PROMPTS[:1] * 16, []
    for step in range(20):
        drawn = sample_images(stranger, prompts, cfg_weight=1.0, seed=step)
        rewards = (drawn.ids == 7).float().mean(1)
        shares.append(float(rewards.mean()))
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        head = stranger.head("token")
        hidden = stranger.completion_hidden(Sequences("token", prompts, drawn.ids))
        loss = linear_grpo_loss(
            head.features(hidden).flatten(0, 1),
            head.weight,
            drawn.ids.flatten(),
            advantages.repeat_interleave(TOKENS),
            old_logprobs=drawn.logprobs.flatten(),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(shares[-5:]) / 5 > sum(shares[:5]) / 5 + 0.1, shares


class Merged:
    """The policy's layers with an adapter's product added to one projection."""

    def __init__(self, base, scale: float) -> None:
        self.base, self.scale, self.version = base, scale, 1

    def layers(self):
        for layer in self.base.layers():
            rank1 = torch.ones_like(layer.out.weight) * self.scale
            out = LinearWeights(layer.out.weight + rank1, layer.out.bias)
            yield replace(layer, out=out)

    def norm(self):
        return self.base.norm()


@pytest.mark.usefixtures("decoder")
def test_other_weights_draw_other_tokens(new_policy, make_prompts):
    policy, prompts = new_policy(), make_prompts(6, 9)
    plain = sample_images(policy, prompts, seed=1)
    policy.weights = Merged(policy.weights, 0.0)
    assert torch.equal(sample_images(policy, prompts, seed=1).ids, plain.ids)
    policy.weights.scale = 0.3
    assert not torch.equal(sample_images(policy, prompts, seed=1).ids, plain.ids)
