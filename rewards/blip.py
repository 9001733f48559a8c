"""BLIP-VQA answering yes/no questions about a picture (arXiv:2201.12086): GIT's alternative."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForVisualQuestionAnswering, BlipConfig

from rewards.checkpoint import (
    build_model,
    config_from,
    load_weights,
    read_config,
    read_tokenizer,
    token_id,
    weight_files,
)
from rewards.yes_no import (
    QuestionExpert,
    QuestionGrid,
    merge_heads,
    read_transform,
    split_heads,
    yes_probability,
)


class BlipVQA(QuestionExpert):
    """The attribute expert by BLIP: mean P(yes), as the first token of the decoder's answer.

    The questions are those of `GitVQA` and are fed as transformers' BlipProcessor does, with
    [CLS] in front where Salesforce's own code puts [ENC].
    """

    name = "blip"

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        """
        Args:
            checkpoint: a transformers folder of BlipForQuestionAnswering, as
                Salesforce/blip-vqa-base: config.json, preprocessor_config.json, the tokenizer's
                files, and weights as safetensors or pytorch_model.bin, whole or sharded.
            dtype: of weights and activations; P(yes) itself is fp32.
            batch_size: pictures in one forward; bounds the memory.
        Raises: ValueError naming the file, and the key, that cannot be used.
        """
        folder = Path(checkpoint)
        config = config_from(BlipConfig, read_config(folder, "blip"), folder)
        text = config.text_config
        if text.bos_token_id is None or not 0 <= text.bos_token_id < text.vocab_size:
            raise ValueError(f"{folder / 'config.json'}: text_config has no usable bos_token_id")
        tokenizer = read_tokenizer(folder, config)
        super().__init__(
            lambda text: tokenizer(text).input_ids,
            read_transform(folder, config.vision_config.image_size),
            pad=text.pad_token_id,
            max_tokens=text.max_position_embeddings,
            device=device,
            batch_size=batch_size,
        )
        self._start = text.bos_token_id
        self._answers = token_id(tokenizer, "yes", folder), token_id(tokenizer, "no", folder)
        self._model: Any = build_model(
            AutoModelForVisualQuestionAnswering,
            config,
            folder / "config.json",
            device=device,
            dtype=dtype,
        )
        load_weights(self._model, weight_files(folder))

    def _answer(self, pixels: Tensor, grid: QuestionGrid) -> Tensor:
        B, K, T = grid.ids.shape
        image = self._model.vision_model(pixels).last_hidden_state  # (B, P, D)
        encoder, decoder = self._model.text_encoder, self._model.text_decoder
        # The questions of a picture lie side by side in one row, so that each layer projects
        # the picture once. A token sees the real tokens of its own question.
        text = encoder.embeddings(grid.ids.view(B * K, T)).view(B, K * T, -1)
        real = torch.arange(T, device=text.device) < grid.lengths[..., None]  # (B, K, T)
        own = torch.block_diag(*[real.new_ones(T, T)] * K)
        hidden = (own & real.view(B, 1, K * T))[:, None].logical_not()
        bias = text.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(text.dtype).min)
        states = encoder.encoder(
            text, attention_mask=bias, encoder_hidden_states=image
        ).last_hidden_state.view(B * K, T, -1)
        answer = decoder.bert.embeddings(grid.ids.new_full((B * K, 1), self._start))
        heads = self._model.config.text_config.num_attention_heads
        # transformers' own decoder drops the mask of its cross-attention and so would read pads.
        for layer in decoder.bert.encoder.layer:
            # Attention over the one token there is returns its value.
            answer = layer.attention.output(layer.attention.self.value(answer), answer)
            cross = layer.crossattention.self
            mixed = F.scaled_dot_product_attention(
                split_heads(cross.query(answer), heads),
                split_heads(cross.key(states), heads),
                split_heads(cross.value(states), heads),
                attn_mask=real.view(B * K, 1, 1, T),
            )
            answer = layer.crossattention.output(merge_heads(mixed), answer)
            answer = layer.feed_forward_chunk(answer)
        head = decoder.cls.predictions
        final = head.transform(answer).view(B, K, -1)
        return yes_probability(final, head.decoder.weight, head.decoder.bias, self._answers)
