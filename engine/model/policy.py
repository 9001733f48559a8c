"""The policy: a Llama-style decoder with Janus' text and image heads.

One set of modules serves the training forward and decoding. Parameter names are those of
transformers' `JanusForConditionalGeneration`, so a checkpoint maps one to one. Sequences are
never padded on the left and no pad is ever attended: a batch of different lengths is either
right-padded, which a causal model cannot see, or packed (engine/model/token_tree.py).
"""

import copy
from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JanusConfig, PreTrainedTokenizerBase
from transformers.models.janus.modeling_janus import JanusVQVAE

from engine.model.generator import TrunkShape
from engine.model.head import Head, LevelName
from engine.model.image_modules import Aligner, ImageHead, picture_side
from engine.model.layers import LanguageModel
from engine.model.linear import wants_fp32
from engine.model.rope import half_tables, head_dimension, rope_tables
from engine.model.sequences import Sequences
from engine.model.source import Checkpoint
from engine.model.token_tree import TokenTree
from engine.model.weight_source import OwnWeights, WeightSource
from kernels import linear_logprobs

PREFILL_TOKENS = 512  # prefilled together: few enough for their activations to stay in cache
DECODED_PIXELS = 16 * 384**2  # at a time


def trunk_shape(config: JanusConfig) -> TrunkShape:
    """The decoder's sizes."""
    text = config.text_config
    return TrunkShape(
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        head_dimension(config),
    )


class _Model(nn.Module):
    """Groups the modules under transformers' name `model`."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.language_model = LanguageModel(config)
        self.generation_embeddings = nn.Embedding(
            config.vq_config.num_embeddings, config.vq_config.embed_dim
        )
        self.generation_aligner = Aligner(config)
        self.generation_head = ImageHead(config)
        self.vqmodel = JanusVQVAE(config.vq_config)


class Policy(nn.Module):
    """A Janus policy with its tokenizer.

    Attributes:
        config: transformers' JanusConfig.
        tokenizer: the checkpoint's tokenizer; None only for models built from a bare config.
        bos, eos, pad, image_start: special token ids.
        source: the checkpoint it was loaded from, if any.
    """

    def __init__(
        self, config: JanusConfig, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.source: Checkpoint | None = None
        text = config.text_config
        self.model = _Model(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.language_model.embed_tokens.weight
        if tokenizer is not None:
            self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
            self.pad = tokenizer.pad_token_id
            self.image_start = tokenizer.convert_tokens_to_ids("<begin_of_image>")
        else:
            self.bos, self.eos, self.pad, self.image_start = 0, 1, 2, 3
        self.weights: WeightSource = OwnWeights(self.model.language_model)
        self._image_table: Tensor | None = None
        self.register_load_state_dict_post_hook(Policy.forget_image_table)

    def forget_image_table(self, _keys: object = None) -> None:
        """Make the table anew when it is next asked for: frozen weights have changed."""
        self._image_table = None

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def image_tokens(self) -> int:
        """Image tokens of one picture."""
        return self.config.vq_config.num_patches**2

    @property
    def context_length(self) -> int:
        return self.config.text_config.max_position_embeddings

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._image_table = None
        return super()._apply(fn, recurse)

    def freeze_generation(self) -> None:
        """Leave only the language model trainable, as T2I-R1 does."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(("model.language_model.", "lm_head.")))

    def set_training(self, *, attn_implementation: str, gradient_checkpointing: bool) -> None:
        """How training forwards run: see engine.model.attention and LanguageModel.forward."""
        trunk = self.model.language_model
        trunk.gradient_checkpointing = gradient_checkpointing
        for layer in trunk.decoder_layers():
            layer.self_attn.implementation = attn_implementation

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, tied ones once."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    # What a generator answers (engine/model/generator.py)

    @property
    def shape(self) -> TrunkShape:
        return trunk_shape(self.config)

    def head(self, level: LevelName) -> Head:
        """The text head, or the image head with its inner layer."""
        if level == "semantic":
            table = self.model.language_model.embed_tokens.weight
            return Head(self.lm_head.weight, self.lm_head.bias, table, eos=self.eos)
        head = self.model.generation_head
        last = head.vision_head
        return Head(last.weight, last.bias, self.image_table(), head.proj_out, own_ids=True)

    def image_table(self) -> Tensor:
        """aligner(codebook): (V_image, D), a constant table once `gen_*` is frozen."""
        frozen = not self.model.generation_embeddings.weight.requires_grad
        if frozen and self._image_table is not None:
            return self._image_table
        table = self.model.generation_aligner(self.model.generation_embeddings.weight)
        if frozen:
            self._image_table = table
        return table

    def embed_text(self, ids: Tensor) -> Tensor:
        """(...,) int64 -> (..., D)."""
        return self.model.language_model.embed_tokens(ids)

    def rotations(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 .. length - 1, (length, head_dim / 2) fp32."""
        return half_tables(self.config, length, self.device)

    def position_table(self) -> None:
        """Positions are rotations alone."""

    def prefill(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values (layers, U, Hkv, max L_i, head_dim) of U prompts (L_i,) int64.

        Shorter ones are right-padded, which a causal model cannot see; positions past L_i are junk.
        """
        ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        count, width = ids.shape
        shape, trunk = self.shape, self.model.language_model
        cos, sin = rope_tables(self.config, width, ids.device)
        size = (shape.layers, count, shape.kv_heads, width, shape.head_dim)
        keys = torch.empty(size, dtype=self.dtype, device=self.device)
        values = torch.empty_like(keys)
        few = max(1, PREFILL_TOKENS // max(1, width)) if self.device.type == "cpu" else count
        for start in range(0, count, few):
            rows = slice(start, start + few)
            parts = trunk.keys_values(self.embed_text(ids[rows]), cos, sin)
            for index, (k, v) in enumerate(parts):
                keys[index, rows], values[index, rows] = k, v
        return keys, values

    # Forward

    def hidden(self, embeds: Tensor, tree: TokenTree | None = None) -> Tensor:
        """Trunk forward.

        Args:
            embeds: (B, T, D), positions from 0; with a tree (1, N, D), its tokens.
        Returns: final-norm hidden states of embeds' shape.
        """
        trunk = self.model.language_model
        length = embeds.shape[1] if tree is None else tree.width
        cos, sin = rope_tables(self.config, length, embeds.device)
        if tree is not None:
            cos, sin = cos[tree.positions], sin[tree.positions]
        return trunk(embeds, cos, sin, tree)

    def completion_hidden(self, sequences: Sequences) -> Tensor:
        """Hidden states that predict each completion token, (B, T, D); zeros past a row's length."""
        head = self.head(sequences.level)
        tree = sequences.tree(own_ids=head.own_ids)
        if tree is None:
            hidden = self._padded_hidden(sequences, head)
        else:
            embeds = self.embed_text(tree.text_ids)
            if head.own_ids:
                embeds = torch.cat((embeds, head.embed(tree.other_ids)))
            hidden = tree.predict(self.hidden(embeds[None], tree)[0])
        return sequences.without_beyond(hidden)

    def _padded_hidden(self, sequences: Sequences, head: Head) -> Tensor:
        """`completion_hidden` of each row for itself, right-padded to the longest."""
        prompts, completions = sequences.prompts, sequences.completions
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        batch, steps = completions.shape
        # The last completion token predicts nothing that is scored, so it is not fed.
        total = int(lengths.max()) + steps - 1
        prompt_ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        embeds = F.pad(self.embed_text(prompt_ids), (0, 0, 0, total - prompt_ids.shape[1]))
        offsets = lengths[:, None] + torch.arange(steps - 1, device=self.device)
        rows = torch.arange(batch, device=self.device)[:, None]
        embeds = embeds.index_put((rows, offsets), head.embed(completions[:, :-1]))
        predict = lengths[:, None] - 1 + torch.arange(steps, device=self.device)
        return self.hidden(embeds)[rows, predict]

    def unconditional(self, prompt: Tensor) -> Tensor:
        """[BOS, pad, ..., pad, image-start] of the prompt's length, all attended."""
        ids = torch.full_like(prompt, self.pad)
        ids[0], ids[-1] = self.bos, self.image_start
        return ids

    # Scoring

    def text_logprobs(self, prompt_ids: Tensor, completion_ids: Tensor) -> Tensor:
        """Log-probs of a text completion. (L,), (T,) int64 -> (T,) fp32 nats; differentiable."""
        sequences = Sequences("semantic", [prompt_ids], completion_ids[None])
        head = self.head("semantic")
        hidden = head.features(self.completion_hidden(sequences)[0])
        return linear_logprobs(hidden, head.weight, completion_ids, bias=head.bias)

    def image_logprobs(
        self, prompt_ids: Tensor, image_ids: Tensor, cfg_weight: float | None = None
    ) -> Tensor:
        """Log-probs of image tokens under the conditional or the guided distribution.

        Args:
            prompt_ids: (L,) int64, ending with image-start.
            image_ids: (N,) int64.
            cfg_weight: None for the conditional distribution, a number for the guided one.
        Returns: (N,) fp32 nats; differentiable.
        """
        prompts, targets = [prompt_ids], image_ids[None]
        if cfg_weight is not None:
            prompts, targets = [prompt_ids, self.unconditional(prompt_ids)], targets.repeat(2, 1)
        head = self.head("token")
        features = head.features(self.completion_hidden(Sequences("token", prompts, targets)))
        mixed = features[0]
        if cfg_weight is not None:
            # The head's last layer is linear and the weights sum to one: mix before it.
            mixed = torch.lerp(features[1].float(), features[0].float(), cfg_weight)
        hidden = mixed.to(head.weight.dtype)
        return linear_logprobs(hidden, head.weight, image_ids, bias=head.bias)

    @torch.no_grad()
    def decode_images(self, image_ids: Tensor) -> Tensor:
        """Image tokens to pixels. (B, N) int64 -> (B, 3, H, W) in [0, 1], the policy's dtype.

        A few pictures at a time: one of 384 x 384 needs about 0.35 GB in fp32 meanwhile.
        """
        tokenizer, dtype = self.model.vqmodel, self.dtype
        if wants_fp32(self.lm_head.weight):
            tokenizer = copy.deepcopy(tokenizer).float()
        parts = image_ids.split(max(1, DECODED_PIXELS // picture_side(self.config) ** 2))
        pixels = [tokenizer.decode(part).to(dtype) for part in parts]
        return torch.cat(pixels).clamp_(-1, 1).add_(1).div_(2)
