"""Image tokens by transformers' own `generate`, over the releases that we allow."""

import inspect

import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration, LlamaModel, StaticCache

# Until transformers 5.23 a forward's cache was called past_key_values.
_NAMES = inspect.signature(LlamaModel.forward).parameters
CACHE = "cache" if "cache" in _NAMES else "past_key_values"


@torch.no_grad()
def generated_tokens(
    model: JanusForConditionalGeneration, ids: Tensor, *, do_sample: bool
) -> Tensor:
    """(B, L) prompts of one length -> (B, N) image tokens, by the model's generation settings.

    Drawn from all tokens, not from the 50 likeliest, which would cost it one more pass.
    """
    length = ids.shape[1] + model.model.vision_model.config.num_image_tokens
    # The cache that it would make itself; 5.17 fails to, for want of an argument.
    cache = StaticCache(model.config.get_text_config(), max_cache_len=length)
    return model.generate(
        input_ids=ids,
        # Without a mask of its own, transformers' image mode fails.
        attention_mask=torch.ones_like(ids),
        generation_mode="image",
        do_sample=do_sample,
        **{CACHE: cache},
        **({"top_k": 0} if do_sample else {}),
    )
