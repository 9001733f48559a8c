"""Where a policy came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Entry(NamedTuple):
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a policy came from: what writing it again carries over.

    Attributes:
        folder: its folder; layout: of LAYOUTS.
        aside: tensors that the policy does not hold, still in their files.
        original: config.json in the original layout, where there is one.
    """

    folder: Path
    layout: str
    aside: Mapping[str, Entry]
    original: Mapping[str, Any] | None
