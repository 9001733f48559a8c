"""A small loss problem and its solution written out token by token in plain fp64."""

import torch
from torch import Tensor

from kernels import linear_grpo_loss
from kernels.reference import loss as reference_loss

N, D, V = 14, 6, 11
TENSORS = ("hidden", "uncond_hidden", "weight", "bias")


def plain_loss(
    tensors: dict[str, Tensor], targets: Tensor, advantages: Tensor, options: dict
) -> dict[str, Tensor]:
    """The loss token by token, guidance applied to the logits. Skips tokens of weight 0."""
    temperature = options.get("temperature", 1.0)
    logits = tensors["hidden"] @ tensors["weight"].T + tensors["bias"]
    if options.get("cfg_weight") is not None:
        blank = tensors["uncond_hidden"] @ tensors["weight"].T + tensors["bias"]
        logits = blank + options["cfg_weight"] * (logits - blank)
    probs = (logits / temperature).softmax(-1)
    logps = [probs[i, t].log() for i, t in enumerate(targets.tolist())]
    weights = options.get("token_weights", torch.full((len(targets),), 1 / len(targets)))
    old, ref = options.get("old_logprobs"), options.get("ref_logprobs")
    sequences = options.get("sequence_ids")
    high, low = 1 + options.get("clip_high", 0.2), 1 - options.get("clip_low", 0.2)
    totals = {k: torch.zeros((), dtype=torch.float64) for k in ("loss", "kl", "clip", "entropy")}
    for i, logp in enumerate(logps):
        w, a = weights[i].double(), advantages[i].double()
        if w == 0:
            continue
        ratio = torch.ones_like(logp) * (logp - logp.detach()).exp()
        if sequences is not None:
            mates = [
                j for j in range(len(logps)) if sequences[j] == sequences[i] and weights[j] != 0
            ]
            mean = sum(logps[j].detach() - old[j] for j in mates) / len(mates)
            ratio = mean.exp() * ratio
        elif old is not None:
            ratio = (logp - old[i]).exp()
        clipped = bool(ratio > high) if a > 0 else bool(ratio < low) if a < 0 else False
        edge = high if a > 0 else low
        surrogate = edge * a if clipped else ratio * a
        if options.get("dual_clip") is not None and a < 0 and ratio > options["dual_clip"]:
            surrogate, clipped = options["dual_clip"] * a, True
        kl = torch.zeros_like(logp)
        if ref is not None:
            kl = (ref[i] - logp).exp() - (ref[i] - logp) - 1
        totals["loss"] = totals["loss"] + w * (-surrogate + options.get("beta", 0.0) * kl)
        share = w / weights.sum().double()
        totals["kl"] = totals["kl"] + share * kl.detach()
        totals["clip"] = totals["clip"] + share * clipped
        entropy = -(probs[i] * probs[i].log()).sum().detach()
        totals["entropy"] = totals["entropy"] + share * entropy
    return totals | {"logprobs": torch.stack(logps).detach()}


def problem(
    seed: int = 0, cfg_weight: float = 1.0
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Tensors, targets, advantages of both signs and zero, and current (guided) log-probs."""
    torch.manual_seed(seed)
    shapes = {"hidden": (N, D), "uncond_hidden": (N, D), "weight": (V, D), "bias": (V,)}
    tensors = {k: torch.randn(s) for k, s in shapes.items()}
    targets = torch.randint(V, (N,))
    advantages = torch.randn(N)
    advantages[3] = 0
    mixed = torch.lerp(tensors["uncond_hidden"], tensors["hidden"], cfg_weight)
    logits = mixed @ tensors["weight"].T + tensors["bias"]
    return tensors, targets, advantages, logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def check(options: dict, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Compare value, metrics and all gradients with plain_loss; returns the output."""
    check_one(linear_grpo_loss, options | {"chunk_rows": 5}, seed, dtype)  # ragged chunks
    check_one(reference_loss.linear_grpo_loss, options, seed, dtype)
    return check_one(linear_grpo_loss, options, seed, dtype)


def check_one(loss, options: dict, seed: int, dtype: torch.dtype):
    tensors, targets, advantages, _ = problem(seed)
    guided = options.get("cfg_weight") is not None
    ours = {k: t.to(dtype, copy=True).requires_grad_() for k, t in tensors.items()}
    exact = {k: t.double().requires_grad_() for k, t in tensors.items()}
    output = loss(
        ours["hidden"],
        ours["weight"],
        targets,
        advantages,
        bias=ours["bias"],
        uncond_hidden=ours["uncond_hidden"] if guided else None,
        **options,
    )
    expected = plain_loss(exact, targets, advantages, options)
    close = {"rtol": 1e-4, "atol": 2e-5}
    for name, value in (
        ("loss", output.loss),
        ("kl", output.kl),
        ("clip", output.clip_fraction),
        ("entropy", output.entropy),
        ("logprobs", output.logprobs),
    ):
        torch.testing.assert_close(
            value.double(), expected[name], **close, msg=lambda m, name=name: f"{name}: {m}"
        )
    output.loss.backward()
    expected["loss"].backward()
    for name in TENSORS if guided else (n for n in TENSORS if n != "uncond_hidden"):
        got, want = ours[name].grad.double(), exact[name].grad
        torch.testing.assert_close(got, want, **close, msg=lambda m, name=name: f"{name}.grad: {m}")
    return output


def old_with_both_clips(cfg_weight: float = 1.0) -> Tensor:
    """Old log-probs that put ratios at 0.4 .. 2.2 around the current ones."""
    return problem(cfg_weight=cfg_weight)[3] - torch.linspace(-0.9, 0.8, N)
