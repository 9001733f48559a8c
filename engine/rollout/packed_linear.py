"""Several linear layers of the same input as one matrix product, laid out for decoding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def packed(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The linears' weights (and biases) as one tensor, without a copy.

    The first call lays the parameters side by side in one storage and makes each a view of it;
    optimizer steps and loads write through, so later calls only look.
    """
    return _side_by_side([m.weight for m in linears]), (
        None if linears[0].bias is None else _side_by_side([m.bias for m in linears])
    )


def _side_by_side(parameters: list[nn.Parameter]) -> Tensor:
    first = parameters[0]
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for p in parameters:
        adjacent = p.untyped_storage().data_ptr() == storage and p.storage_offset() == offset
        if not (adjacent and p.is_contiguous()):
            break
        offset += p.numel()
    else:
        rows = sum(len(p) for p in parameters)
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    joined = torch.cat([p.detach() for p in parameters])
    for p, view in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        p.data = view
    return joined


class BlockedLinear:
    """Linears of the same input, for the many products of few rows that a rollout is made of.

    In torch's layout a CPU reads weights at a third to two thirds of the speed at which it reads
    them in oneDNN's blocks. The blocks are a copy, of the weights as they are when it is made.
    fp32, and bf16 where the CPU has instructions for it; elsewhere the weights stay as they are.

    Args:
        linears: all with a bias, or all without.
        rows: of the inputs; others work too, at less speed.
    """

    def __init__(self, *linears: nn.Linear, rows: int) -> None:
        self._weight, self._bias = packed(*linears)
        self._blocked = _has_blocks(self._weight)
        if self._blocked:
            self._weight = torch.ops.mkldnn._reorder_linear_weight.default(self._weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, K) -> (rows, all linears' outputs side by side)."""
        if not self._blocked:
            return F.linear(x, self._weight, self._bias)
        return torch.ops.mkldnn._linear_pointwise.default(
            x, self._weight, self._bias, "none", [], ""
        )


def _has_blocks(weight: Tensor) -> bool:
    """Whether this build of torch and this CPU multiply the weight in oneDNN's layout.

    The operators are those that torch.compile uses; `F.linear` gives the same without them.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or bf16
