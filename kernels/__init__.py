"""Drop-in ops for autoregressive image generators: guided sampling, log-probs, GRPO loss.

Importing this package pulls in torch only.
"""

from kernels.cfg_sample import cfg_sample
from kernels.grpo_loss import LossOutput, linear_grpo_loss
from kernels.linear_logprobs import linear_logprobs

__all__ = ["LossOutput", "cfg_sample", "linear_grpo_loss", "linear_logprobs"]
