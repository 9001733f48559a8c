"""The face of the policies: loading one from a checkpoint folder, and writing it as one."""

from pathlib import Path

import torch

from engine.model.policy import Policy as Policy
from engine.weights.adapter import merge_adapter
from engine.weights.read import read_policy
from engine.weights.save import save_folder


def load_policy(
    path: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    adapter: str | None = None,
) -> Policy:
    """Load a policy from a checkpoint folder, or "tiny" for the embedded default.

    Args:
        path: "tiny"; a folder in the original layout (`model_type: multi_modality`, as published
            for Janus-Pro and T2I-R1) or in transformers' (`janus`), of safetensors or pickled
            weights; or a hub id, owner/name.
        dtype: float32, bfloat16 or float16; None keeps the checkpoint's.
        device: None is the CPU.
        adapter: a folder in peft's layout whose low-rank adapter is merged into the weights.
    The understanding tower stays in its files, from where `save_policy` carries it over.
    Raises: UserError naming the file and key that cannot be used.
    """

    policy = read_policy(path, dtype=dtype, device=device)
    if adapter is not None:
        merge_adapter(policy, Path(adapter))
    return policy


def save_policy(
    policy: Policy,
    folder: str | Path,
    *,
    layout: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a policy as a checkpoint folder: weights, config, and its checkpoint's other files.

    Args:
        folder: made whole or not at all; an existing one is replaced if it is empty or was
            written by this function, and nothing was added.
        layout: "original", whose keys and shapes are those of the published checkpoints, or
            "transformers", for JanusForConditionalGeneration; None: the one it was loaded from.
        max_shard_bytes: most bytes of tensors in a file, but for a larger single tensor.
    Returns: the folder.
    Raises: UserError naming the folder, or the file and key that cannot be carried over.
    """

    return save_folder(policy, Path(folder), layout=layout, max_shard_bytes=max_shard_bytes)
