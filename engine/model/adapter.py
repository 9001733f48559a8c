"""A low-rank adapter on the language model's linear layers, by peft (LoRA, arXiv:2106.09685).

peft wraps each adapted layer: its own weight stays where it was, frozen, and W x becomes
W x + B (A x) alpha / r. A decode step wants one product a layer, so the rollout reads W + B A
alpha / r through `MergedWeights`, made anew for each rollout and gone with it. peft is imported
where an adapter is attached and nowhere else: it takes seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.layers import LanguageModel
from engine.model.policy import Policy
from engine.model.weight_source import LayerWeights, LinearWeights, OwnWeights, packed
from engine.settings.errors import UserError

ADAPTER = "default"  # peft's own name for the only one
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def require_peft() -> None:
    """Raise UserError naming the extra where peft cannot be imported."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'--use_peft needs the extra [peft] ({error}): pip install "t2i-engine[peft]"'
        ) from error


def attach_adapter(
    policy: Policy,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = (),
    seed: int = 0,
    merge_in_place: bool = False,
) -> None:
    """Put a fresh adapter on a policy, in place, and leave nothing else trainable.

    B is zero, so that the policy computes what it did before.

    Args:
        r: the rank; alpha: B A is scaled by alpha / r.
        dropout: of the adapter's input; active only under `adapter_dropout`.
        targets: names of TARGETS; none: all of them.
        seed: of A, which is drawn on the CPU and so is the same on every device.
        merge_in_place: see MergedWeights.
    Adapters are fp32 whatever the policy's dtype: at learning rates of 1e-4 an update of a 16-bit
    weight rounds to nothing.
    Raises: UserError where peft is missing.
    """
    require_peft()
    import peft

    names = "|".join(targets or TARGETS)
    config = peft.LoraConfig(
        r=r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # peft's readers want the former
        lora_dropout=dropout,
        # A full match, unlike a list of names, which would find transformers' vision tower too.
        target_modules=rf"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.({names})",
    )
    with torch.random.fork_rng(_devices(policy)):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, policy, ADAPTER)
    for parameter in policy.trainable().values():
        parameter.data = parameter.data.float()
    policy.weights = MergedWeights(policy.model.language_model, in_place=merge_in_place)
    policy.eval()  # the wrappers are born in training mode


def adapted(module: nn.Module) -> dict[str, Any]:
    """The layers that carry an adapter, peft's wrappers, by name; {} without one."""
    return {name: layer for name, layer in module.named_modules() if _is_wrapper(layer)}


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def _devices(policy: Policy) -> list[torch.device]:
    """Those beside the CPU whose generator is to be put back."""
    return [policy.device] if policy.device.type == "cuda" else []


def _is_on(module: Any) -> bool:
    return _is_wrapper(module) and not module.disable_adapters


def _base(module: Any) -> nn.Linear:
    return module.get_base_layer() if _is_wrapper(module) else module


@contextmanager
def adapter_off(policy: Policy) -> Iterator[None]:
    """The policy without its adapter for the duration, whatever happens; as it is without one."""
    layers = list(adapted(policy.model.language_model).values())
    were_off = [layer.disable_adapters for layer in layers]
    # peft freezes what it switches off, and thaws what it switches on.
    trained = {p: p.requires_grad for layer in layers for p in layer.parameters()}
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, was_off in zip(layers, were_off, strict=True):
            layer.enable_adapters(not was_off)
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)


@contextmanager
def adapter_dropout(policy: Policy, *seeds: int) -> Iterator[None]:
    """The adapter's dropout at work for the duration; nothing where there is none.

    Args:
        seeds: the masks are a function of these alone, so that a resumed run draws them again.
    """
    layers = [
        module
        for layer in adapted(policy.model.language_model).values()
        for module in layer.lora_dropout.modules()
        if isinstance(module, nn.Dropout)
    ]
    if not layers:
        yield
        return
    with torch.random.fork_rng(_devices(policy)):
        torch.manual_seed(hash(seeds))
        try:
            for module in layers:
                module.train()
            yield
        finally:
            for module in layers:
                module.eval()


def merged(weight: Tensor, delta: Tensor) -> Tensor:
    """weight + delta in fp32, or weight's dtype where that is wider, rounded once to the latter."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + delta.to(wide)).to(weight.dtype)


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """What an adapted layer multiplies with, as a tensor of its own: (N, K), the layer's dtype."""
    return merged(layer.get_base_layer().weight, layer.get_delta_weight(ADAPTER))


def plain_state(policy: Policy) -> dict[str, tuple[Tensor, Callable[[], Tensor]]]:
    """A policy's state as if it had no adapter: the merged weights under the plain names.

    Returns: name -> (a tensor of that shape and dtype, what gives the values).
    """
    layers = adapted(policy)
    found: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {}
    for name, tensor in policy.state_dict().items():
        place, _, kind = name.rpartition(".base_layer.")
        if place in layers and kind == "weight":
            found[f"{place}.{kind}"] = tensor, partial(merged_weight, layers[place])
        elif ".lora_" not in name:
            plain = f"{place}.{kind}" if place in layers else name
            found[plain] = tensor, partial(_itself, tensor)
    return found


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class MergedWeights(OwnWeights):
    """A WeightSource of an adapted trunk: W + B A alpha / r, the rest where it is.

    While the adapter is off, the weights are the trunk's own.

    Args:
        in_place: False: as new tensors, which live as long as the rollout that asked for them.
            True: in the place of W, which waits in host memory until `release`; meanwhile the
            modules compute with the merged weights too.
    """

    def __init__(self, trunk: LanguageModel, *, in_place: bool = False) -> None:
        super().__init__(trunk)
        self._in_place = in_place
        self._kept: dict[Any, Tensor] = {}  # the wrappers' own W, on the host
        self._merged = False

    @property
    def version(self) -> int:
        """Another number after every update, and while the adapter is off."""
        # In place W is written in every rollout; it does not train.
        parts = self._trunk.named_parameters()
        written = sum(p._version for n, p in parts if not self._in_place or ".lora_" in n)
        return ~written if self._is_off() else written

    def _is_off(self) -> bool:
        layers = adapted(self._trunk).values()
        return not self._merged and any(layer.disable_adapters for layer in layers)

    def layers(self) -> Iterator[LayerWeights]:
        if self._in_place and not self._is_off() and not self._merged:
            self._merge()
        return super().layers()

    @torch.no_grad()
    def _merge(self) -> None:
        for layer in adapted(self._trunk).values():
            weight = layer.get_base_layer().weight
            if layer not in self._kept:
                host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.is_cuda)
                self._kept[layer] = host.copy_(weight)
            weight.copy_(merged_weight(layer))
            layer._disable_adapters = True  # not enable_adapters: nothing is to be frozen
        self._merged = True

    @torch.no_grad()
    def release(self) -> None:
        """Put W back, bit for bit."""
        if not self._merged:
            return
        for layer, kept in self._kept.items():
            layer.get_base_layer().weight.copy_(kept, non_blocking=True)
            layer._disable_adapters = False
        self._merged = False

    @torch.no_grad()
    def _joined(self, where: str, *linears: nn.Linear) -> LinearWeights:
        bases = [_base(m) for m in linears]
        if not any(map(_is_on, linears)):
            return packed(where, *bases)
        rows = [len(m.weight) for m in bases]
        weight = bases[0].weight.new_empty((sum(rows), bases[0].weight.shape[1]))
        for m, part in zip(linears, weight.split(rows), strict=True):
            part.copy_(merged_weight(m) if _is_on(m) else m.weight)
        bias = None if bases[0].bias is None else torch.cat([m.bias for m in bases])
        return LinearWeights(weight, bias)
