"""What an update did, by a sample of the weights: whether what was meant, and whose doing it is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.learner.optimizer import master_of, sampled


class Probe:
    """Follows a sample of the trained weights through one update.

    Args:
        parameters: those of the optimizer.
        optimizer: about to make its step.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._seen = list(sampled(parameters))
        self._exact = self._masters()

    def _masters(self) -> list[Tensor]:
        return [m.double() for m in master_of(self._optimizer, self._parameters)]

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """After the step.

        Returns: `weights_changed`, the share of the weights that the model computes with which have
            changed; `update_cosine`, between the change of the weights that the optimizer keeps
            and the one that AdamW's formula gives in fp64 from its moments (NaN where there is
            none). In bf16 without the missing bits, at T2I-R1's learning rate, about 0.1.
        """
        optimizer, changed, count = self._optimizer, 0, 0
        for before, after in zip(self._seen, sampled(self._parameters), strict=True):
            changed += int((before != after).sum())
            count += len(before)
        applied = [a - b for a, b in zip(self._masters(), self._exact, strict=True)]
        meant: list[Tensor] = []
        kept = {name: self._moments(name) for name in ("exp_avg", "exp_avg_sq")}
        group = optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        for i, p in enumerate(self._parameters):
            step = float(optimizer.state[p].get("step", 0)) if p in optimizer.state else 0.0
            if step == 0:
                meant.append(torch.zeros_like(applied[i]))
                continue
            mean = kept["exp_avg"][i] / (1 - beta1**step)
            root = (kept["exp_avg_sq"][i] / (1 - beta2**step)).sqrt() + group["eps"]
            decay = group["weight_decay"] * self._exact[i]
            meant.append(-float(group["lr"]) * (mean / root + decay))
        cosine = torch.cosine_similarity(torch.cat(applied), torch.cat(meant), dim=0)
        none = not any(bool(m.any()) for m in meant)
        return {
            "weights_changed": changed / max(1, count),
            "update_cosine": float("nan") if none else float(cosine),
        }

    def _moments(self, name: str) -> list[Tensor]:
        states = [self._optimizer.state.get(p, {}) for p in self._parameters]
        full = [
            s[name] if name in s else torch.zeros_like(p)
            for s, p in zip(states, self._parameters, strict=True)
        ]
        plain = [t.dequantize() if hasattr(t, "codes") else t for t in full]
        return [t.double() for t in sampled(plain)]


class GradientShares:
    """Which level how much of a step's gradient is of, by a sample of its entries.

    The gradients of levels are added up one after the other; `close` is called after each.

    Args: parameters: those that train.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._sum: Tensor | None = None
        self._squares: dict[str, Tensor] = {}

    def close(self, level: str) -> None:
        """All of a level's gradient is there now."""
        grads = [
            p.grad if p.grad is not None else p.new_zeros(()).expand(p.shape)
            for p in self._parameters
        ]
        found = torch.cat([g.double() for g in sampled(grads)])
        own = found if self._sum is None else found - self._sum
        self._sum, self._squares[level] = found, own.square().sum()

    def metrics(self) -> dict[str, Tensor]:
        """`gradient_share/LEVEL`: its squared norm over the sum of all levels'."""
        total = sum(self._squares.values(), torch.zeros((), dtype=torch.float64))
        return {f"gradient_share/{name}": s / total for name, s in self._squares.items()}
