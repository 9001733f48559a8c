"""Drop-in ops for autoregressive image generators: guided sampling, log-probs, GRPO loss.

Importing this package pulls in torch only.
"""

from kernels.adamw import adamw
from kernels.cfg_sample import cfg_sample
from kernels.decode_attention import decode_attention, decode_attention_workspace
from kernels.grpo_loss import LossOutput, linear_grpo_loss
from kernels.head_sample import head_sample, head_workspace
from kernels.kv_append import kv_append
from kernels.linear_logprobs import linear_logprobs
from kernels.rms_norm import rms_norm
from kernels.sample_step import error_place, sample_step, sample_workspace
from kernels.state import AdamW
from kernels.swiglu import swiglu
from kernels.tiling import prefix_tiles, tile_rows

__all__ = [
    "AdamW",
    "LossOutput",
    "adamw",
    "cfg_sample",
    "decode_attention",
    "decode_attention_workspace",
    "error_place",
    "head_sample",
    "head_workspace",
    "kv_append",
    "linear_grpo_loss",
    "linear_logprobs",
    "prefix_tiles",
    "rms_norm",
    "sample_step",
    "sample_workspace",
    "swiglu",
    "tile_rows",
]
