"""Image tokens by transformers' own generate."""

import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration, StaticCache


def greedy_images(theirs: JanusForConditionalGeneration, ids: Tensor) -> Tensor:
    """(B, L) prompts -> (B, N) image tokens, by the model's generation settings."""
    length = ids.shape[1] + theirs.model.vision_model.config.num_image_tokens
    return theirs.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_mode="image",
        do_sample=False,
        # The one it would make: in transformers 5.17 it fails to, for want of an argument.
        past_key_values=StaticCache(theirs.config.get_text_config(), max_cache_len=length),
    )
