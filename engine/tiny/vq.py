"""Train the tiny world's image tokenizer: transformers' JanusVQVAE on rendered scenes.

The codebook lives on the unit sphere, as Janus' does: latents are normalised before the
nearest code is chosen, codes follow an exponential moving average of the latents assigned
to them (van den Oord et al., arXiv:1711.00937, appendix A), and codes that nothing uses are
restarted on latents of the current batch. The first steps run without quantisation: a codebook
learnt from an untrained encoder collapses.
"""

import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from engine.tiny.world import BACKGROUND, IMAGE_SIZE, place, random_object, render

GRID = 8  # image tokens a side
CODES = 512
EMA_DECAY = 0.98
RESTART_BELOW = 0.02  # mean assignments a batch under which a code is restarted
CONTINUOUS = 0.15  # share of the steps that train the autoencoder without its codebook


def vq_config(hidden_size: int) -> JanusVQVAEConfig:
    """The tokenizer's configuration beside a language model of the given width."""
    return JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=CODES,
        latent_channels=64,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 2],
        num_res_blocks=1,
        num_patches=GRID,
        projection_dim=hidden_size,
        image_token_embed_dim=hidden_size,
    )


def scene_pixels(rng: random.Random, count: int) -> torch.Tensor:
    """(count, 3, 64, 64) float32 in [-1, 1]: pictures of random scenes, every combination."""
    pictures = []
    for _ in range(count):
        number = rng.choice((1, 1, 2, 2, 2, 3, 4))
        objects = tuple(random_object(rng, allow_held_out=True) for _ in range(number))
        pictures.append(torch.from_numpy(render(place(objects, rng))))
    return torch.stack(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)


@torch.no_grad()
def encode(vq: JanusVQVAE, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, 64, 64) in [-1, 1] -> (B, 64) int64 image tokens, nearest code on the sphere."""
    latents = F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1)
    flat = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    return (flat @ vq.quantize.embedding.weight.T).argmax(-1).view(len(pixels), -1)


def _initialise(vq: JanusVQVAE) -> None:
    for module in vq.modules():
        # transformers' standard deviation of 0.02 starves a network this narrow of signal.
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            assert module.bias is not None
            torch.nn.init.zeros_(module.bias)
    codebook = vq.quantize.embedding.weight
    codebook.data = F.normalize(torch.randn_like(codebook), dim=-1)


def train_vq(
    vq: JanusVQVAE,
    *,
    steps: int,
    batch_size: int = 5,
    peak_lr: float = 1.2e-3,
    seed: int = 0,
    resume: bool = False,
    log: Callable[[str], None] = print,
    checkpoint: Callable[[], None] = lambda: None,
) -> None:
    """Train the tokenizer in place; reports the reconstruction error on the way.

    `resume` goes on from the weights as they are, codebook included.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    vq.train()
    codebook = vq.quantize.embedding.weight
    codebook.requires_grad_(False)
    if not resume:
        _initialise(vq)
    usage = torch.ones(CODES)
    sums = codebook.data.clone()
    optimizer = torch.optim.AdamW(
        [p for p in vq.parameters() if p.requires_grad], lr=peak_lr, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_lr, total_steps=steps, pct_start=0.05
    )
    background = torch.tensor(BACKGROUND).view(1, 3, 1, 1) / 127.5 - 1
    started = time.monotonic()
    for step in range(1, steps + 1):
        pixels = scene_pixels(rng, batch_size)
        latents = F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1)
        flat = latents.permute(0, 2, 3, 1).reshape(-1, codebook.shape[1])  # (B * 64, 8)
        quantised = resume or step > CONTINUOUS * steps
        with torch.no_grad():
            ids = (flat @ codebook.T).argmax(-1)
            counts = torch.bincount(ids, minlength=CODES).float()
            usage.lerp_(counts, 1 - EMA_DECAY)
            sums.lerp_(torch.zeros_like(sums).index_add_(0, ids, flat), 1 - EMA_DECAY)
            codebook.data = F.normalize(sums, dim=-1)
            dead = usage < RESTART_BELOW
            if not resume and step == int(CONTINUOUS * steps):
                dead[:] = True
            if dead.any() and step < 0.8 * steps:
                fresh = flat[torch.randint(len(flat), (int(dead.sum()),))]
                codebook.data[dead] = fresh
                sums[dead] = fresh * 0.2
                usage[dead] = 0.2
        codes = codebook[ids].view(len(pixels), GRID, GRID, -1).permute(0, 3, 1, 2)
        commitment = (codes.detach() - latents).square().mean()
        through = latents + (codes - latents).detach() if quantised else latents
        rebuilt = vq.decoder(vq.post_quant_conv(through))
        # Objects cover a small part of the canvas: their pixels count four times.
        weight = 1 + 3 * ((pixels - background).abs().amax(1, keepdim=True) > 0.02)
        error = (rebuilt - pixels).abs() + (rebuilt - pixels).square()
        loss = (weight * error).mean() + 0.25 * commitment * quantised
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            mae = (rebuilt - pixels).abs().mean().item() * 127.5
            used = int((usage > RESTART_BELOW).sum())
            seconds = time.monotonic() - started
            log(
                f"vq {step}/{steps} mae {mae:.2f}/255 commitment {commitment.item():.4f} "
                f"codes {used}/{CODES} {seconds:.0f} s"
            )
            checkpoint()
    vq.eval()
    assert pixels.shape[-1] == IMAGE_SIZE
