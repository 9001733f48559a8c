"""Layers that wait in host memory and stream to the device beside the compute."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class LayerStream:
    """Keeps alike layers in host memory, pinned for a GPU; two of them are on the device.

    While a layer computes, the next one's weights are copied on a stream of their own. For modules
    that run in their order, forward only: an inference pass over a frozen model.

    Args:
        layers: of the same shapes; their parameters move to the host.
        device: where they compute.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._layers, self._device = list(layers), device
        self._cuda = device.type == "cuda"
        self._host = [[self._to_host(p.detach()) for p in m.parameters()] for m in self._layers]
        self._staged = [[torch.empty_like(t, device=device) for t in self._host[0]] for _ in "ab"]
        self._holds: list[int | None] = [None, None]  # the layer in each
        self._copies = torch.cuda.Stream(device) if self._cuda else None
        for index, layer in enumerate(self._layers):
            self._point(index, self._host[index])
            layer.register_forward_pre_hook(lambda *_, i=index: self._arrive(i))
            layer.register_forward_hook(lambda *_, i=index: self._point(i, self._host[i]))

    def _to_host(self, weight: Tensor) -> Tensor:
        if not self._cuda:
            return weight.cpu()
        host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True)
        return host.copy_(weight)

    def _point(self, index: int, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self._layers[index].parameters(), weights, strict=True):
            parameter.data = weight

    def _arrive(self, index: int) -> None:
        """Before layer `index` computes: its weights are there, and the next one's on their way."""
        if self._holds[index % 2] != index:
            self._copy(index)
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copies)
        self._point(index, self._staged[index % 2])
        following = index + 1
        if following < len(self._layers):
            self._copy(following)

    def _copy(self, index: int) -> None:
        place: Any = nullcontext()
        if self._copies is not None:
            # Its place was the layer's before this one, whose work is queued already.
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
            place = torch.cuda.stream(self._copies)
        with place:
            for staged, host in zip(self._staged[index % 2], self._host[index], strict=True):
                staged.copy_(host, non_blocking=True)
        self._holds[index % 2] = index
