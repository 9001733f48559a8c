"""The optimizer of a run: AdamW that loses nothing in 16 bits, torch's own, or torchao's 8-bit one."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.settings.errors import UserError
from engine.settings.train import TrainConfig
from kernels.adamw import adamw, master
from kernels.state import AdamW

# The least share of the weights that a step of size lr must be able to change.
LEAST_MOVABLE = 0.1
SAMPLED = 1 << 16  # weights looked at


class ExactAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) on weights of any of fp32 and bf16, as if all were fp32.

    A bf16 weight's missing 16 bits are part of its state, `low`; see kernels.adamw. The model sees
    the bf16 weight, the optimizer the fp32 one.

    Args:
        params: parameters, contiguous.
        lr, betas, eps, weight_decay: AdamW's.
        state_dtype: of the moments; bfloat16 is rounded stochastically.
        seed: of that rounding.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.state_dtype, self.seed = state_dtype, seed

    def fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What a parameter's state is before its first update."""
        state = {"step": torch.zeros(())}
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, dtype=self.state_dtype)
        if parameter.dtype != torch.float32:
            state["low"] = torch.zeros_like(parameter, dtype=torch.int16)
        return state

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, grad_scale: float | Tensor = 1.0
    ) -> None:
        """One update.

        Args: grad_scale: what gradients are multiplied by first, a number or a 0-dim fp32 tensor.
        """
        assert closure is None
        stream = 0
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state.update(self.fresh_state(p))
                    state["step"] += 1
                    settings = AdamW(
                        step=int(state["step"]),
                        lr=group["lr"],
                        beta1=beta1,
                        beta2=beta2,
                        eps=group["eps"],
                        weight_decay=group["weight_decay"],
                        seed=self.seed,
                    )
                    tensors = state.get("low"), state["exp_avg"], state["exp_avg_sq"]
                    adamw(p, p.grad, *tensors, settings, grad_scale=grad_scale, stream=stream)
                stream += 1


def build_optimizer(
    parameters: dict[str, torch.nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """The optimizer that the flags ask for.

    Raises: UserError where nothing trains, and where the learning rate is too small for weights of
        this dtype, so that a run would train nothing and say nothing.
    """
    if not parameters:
        raise UserError("nothing to train: no weight of the policy takes a gradient")
    values = list(parameters.values())
    shared: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.weight_decay,
    }
    dtypes = {p.dtype for p in values}
    exact = config.optim == "adamw" and (
        dtypes != {torch.float32} or config.optim_state_dtype != "float32"
    )
    if config.optim_state_dtype != "float32" and config.optim != "adamw":
        raise UserError(f"--optim_state_dtype: belongs to --optim adamw, not to {config.optim}")
    if exact and torch.float16 in dtypes:
        raise UserError(
            "--dtype float16: adamw keeps the missing bits of bfloat16 weights; take that, "
            "--use_peft, whose adapters are float32, or --optim adamw_torch"
        )
    _require_movable(values, config, exact=config.optim == "adamw")
    if exact:
        dtype = getattr(torch, config.optim_state_dtype)
        return ExactAdamW(values, **shared, state_dtype=dtype, seed=config.seed)
    if config.optim == "adamw_8bit":
        return _eight_bits(values, shared)
    # One kernel for all on CUDA; on a CPU a loop over the parameters, as ever.
    return torch.optim.AdamW(values, **shared, fused=values[0].is_cuda or None)


def _eight_bits(values: list[torch.nn.Parameter], shared: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f'--optim adamw_8bit: needs pip install "t2i-engine[torchao]": {reason}'
        ) from error
    # Rounds bf16 weights stochastically: unbiased where ours is exact.
    half = values[0].dtype == torch.bfloat16
    optimizer = AdamW8bit(values, **shared, bf16_stochastic_round=half)
    optimizer.fresh_state = partial(_first_state, optimizer)
    return optimizer


def _first_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, Any]:
    """A parameter's state as the optimizer itself makes it: by a step of size 0."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    parameter.grad = torch.zeros_like(parameter)
    set_rate(optimizer, 0.0)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        _set(group, rate)
    parameter.grad = None
    return optimizer.state.pop(parameter)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        _set(group, rate)


def _set(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # torchao's compiled step reads it
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _require_movable(
    values: Sequence[torch.nn.Parameter], config: TrainConfig, *, exact: bool
) -> None:
    """Raise UserError where a step of size lr changes next to no weight of its dtype."""
    if config.learning_rate == 0:  # asked for by name: a run for its rewards
        return
    weights = torch.cat([w.float() for w in sampled(values)])
    wide = exact or values[0].dtype == torch.float32
    bits = 24 if wide else {torch.bfloat16: 8, torch.float16: 11}[values[0].dtype]
    # Half a unit in the last place of w = m 2^e, 1/2 <= m < 1, is 2^(e - bits - 1).
    half = torch.exp2((weights.frexp().exponent - bits - 1).float())
    share = float(((half <= config.learning_rate) | (weights == 0)).float().mean())
    if share < LEAST_MOVABLE:
        held = "float32" if wide else config.dtype
        advice = "" if wide else ", or --optim adamw, which keeps the bits that are missing"
        raise UserError(
            f"learning_rate {config.learning_rate:g}: too small for {held}: a step of that size "
            f"changes {share:.1%} of the weights; wanted a larger one{advice}"
        )


@torch.no_grad()
def sampled(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Evenly spaced elements of each, about SAMPLED of all: copies, on the CPU."""
    total = sum(t.numel() for t in tensors)
    step = max(1, total // SAMPLED)
    for t in tensors:
        some = t.detach().flatten()[:: min(step, max(1, t.numel() // 4))]
        yield some.to("cpu", copy=True)


def master_of(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]
) -> list[Tensor]:
    """`sampled` of the weights that the optimizer keeps, fp32: with a bf16 weight's missing bits."""
    weights, found = list(sampled(parameters)), []
    states = [optimizer.state.get(p, {}) for p in parameters]
    lows = sampled([s["low"] if "low" in s else p for s, p in zip(states, parameters, strict=True)])
    for weight, low in zip(weights, lows, strict=True):
        found.append(master(weight, low) if low.dtype == torch.int16 else weight.float())
    return found
