"""GIT answering yes/no questions about a picture (GIT-large-VQAv2, arXiv:2205.14100)."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GitConfig

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


class GitVQA(QuestionExpert):
    """The attribute expert: mean P(yes) over "{attribute} {noun}?" of each thing in the row.

    Departures from T2I-R1's `git` reward: it gives 0 to spatial and numeracy rows without asking
    and 1 to rows that name nothing. Both are constant within a prompt's group and so teach
    nothing; here their nouns are asked for, or the whole prompt where nothing is named.
    """

    name = "git"

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
            checkpoint: a transformers folder of model_type "git", as microsoft/git-large-vqav2:
                config.json, preprocessor_config.json, the tokenizer's files, and weights as
                safetensors or pytorch_model.bin, whole or sharded.
            dtype: of weights and activations; P(yes) itself is fp32.
            batch_size: pictures in one forward; bounds the memory.
        Raises: ValueError naming the file, and the key, that cannot be used.
        """
        folder = Path(checkpoint)
        config = config_from(GitConfig, read_config(folder, "git"), folder)
        if config.num_image_with_embedding is not None:
            raise ValueError(f"{folder / 'config.json'}: a GIT for video, wanted one for pictures")
        tokenizer = read_tokenizer(folder, config)
        start = token_id(tokenizer, "[CLS]", folder)
        super().__init__(
            # GIT was trained on questions that start with [CLS] and end open.
            lambda text: [start, *tokenizer(text, add_special_tokens=False).input_ids],
            read_transform(folder, config.vision_config.image_size),
            pad=config.pad_token_id,
            max_tokens=config.max_position_embeddings,
            device=device,
            batch_size=batch_size,
        )
        self._answers = token_id(tokenizer, "yes", folder), token_id(tokenizer, "no", folder)
        self._model: Any = build_model(
            AutoModelForCausalLM,
            config,
            folder / "config.json",
            device=device,
            dtype=dtype,
        )
        load_weights(self._model, weight_files(folder))
        # Eager attention would write out every picture's P x P scores.
        self._model.git.image_encoder.config._attn_implementation = "sdpa"

    def _answer(self, pixels: Tensor, grid: QuestionGrid) -> Tensor:
        git = self._model.git
        B, K, T = grid.ids.shape
        image = git.visual_projection(git.image_encoder(pixels).last_hidden_state)  # (B, P, D)
        text = git.embeddings(grid.ids.view(B * K, T)).view(B, K * T, -1)
        P = image.shape[1]
        # A token sees the picture and the tokens before it in its own question. Pads come
        # after all that is read, so nothing that counts sees them.
        own = torch.ones(T, T, dtype=torch.bool, device=text.device).tril()
        mask = torch.block_diag(*[own] * K)
        mask = torch.cat((mask.new_ones(K * T, P), mask), dim=1)  # (K*T, P + K*T)
        heads = self._model.config.num_attention_heads
        for layer in git.encoder.layer:
            attention = layer.attention.self
            image_keys = split_heads(attention.key(image), heads)
            image_values = split_heads(attention.value(image), heads)
            mixed = F.scaled_dot_product_attention(
                split_heads(attention.query(text), heads),
                torch.cat((image_keys, split_heads(attention.key(text), heads)), dim=2),
                torch.cat((image_values, split_heads(attention.value(text), heads)), dim=2),
                attn_mask=mask,
            )
            text = layer.feed_forward_chunk(layer.attention.output(merge_heads(mixed), text))
            if layer is git.encoder.layer[-1]:
                break  # nothing reads the picture's last states
            # The picture does not see the questions: one pass serves all of them.
            mixed = F.scaled_dot_product_attention(
                split_heads(attention.query(image), heads), image_keys, image_values
            )
            image = layer.feed_forward_chunk(layer.attention.output(merge_heads(mixed), image))
        hidden = grid.last(text.view(B, K, T, -1))
        head = self._model.output
        return yes_probability(hidden, head.weight, head.bias, self._answers)
