"""Frozen weights that wait in host memory and visit the device for the time of one use."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


class Offload:
    """The modules of one expert: on the host between uses, their values never copied back.

    Frozen weights are the same on both sides, so leaving the device is dropping a copy. The host
    side is pinned where there is a CUDA device, which lets the copies run beside other streams.
    """

    def __init__(self, owner: object, device: torch.device | str) -> None:
        """
        Args:
            owner: its attributes that are modules move; other tensors stay where they are.
            device: where they are used.
        Raises: ValueError for a module with a trainable parameter, whose changes would be lost.
        """
        self._device = torch.device(device)
        modules = [m for m in vars(owner).values() if isinstance(m, nn.Module)]
        for module in modules:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    raise ValueError(f"{name}: a trainable parameter cannot be offloaded")
        tensors = chain.from_iterable(chain(m.parameters(), m.buffers()) for m in modules)
        distinct = {id(tensor): tensor for tensor in tensors}.values()
        pin = self._device.type == "cuda"
        self._weights: list[tuple[Tensor, Tensor]] = []
        for tensor in distinct:
            host = tensor.detach().cpu()
            self._weights.append((tensor, host.pin_memory() if pin else host))
        self._leave()

    @property
    def nbytes(self) -> int:
        """Bytes that the modules take on the device while they are there."""
        return sum(host.nbytes for _, host in self._weights)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The modules are on the device inside, on the current stream."""
        try:
            # Weights that inference mode made could not be used outside of it.
            with torch.inference_mode(False):
                for tensor, host in self._weights:
                    tensor.data = host.to(self._device, non_blocking=True, copy=True)
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with torch.inference_mode(False):
            for tensor, host in self._weights:
                tensor.data = host
