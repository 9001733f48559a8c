"""What ties image tokens to the trunk: Janus' generation aligner on its way in, its head out."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JanusConfig

from engine.model.linear import Linear


def picture_side(config: JanusConfig) -> int:
    """Pixels of a picture's side: its grid of tokens, doubled between the decoder's levels."""
    vq = config.vq_config
    return vq.num_patches * 2 ** (len(vq.channel_multiplier) - 1)


class Aligner(nn.Module):
    """Maps a codebook vector to the trunk's width (Janus' generation aligner)."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        vq = config.vq_config
        self.fc1 = Linear(vq.embed_dim, vq.projection_dim)
        self.hidden_layers = nn.ModuleList(
            Linear(vq.projection_dim, vq.projection_dim) for _ in range(1, vq.num_hidden_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        for layer in self.hidden_layers:
            x = layer(F.gelu(x))
        return x


class ImageHead(nn.Module):
    """Linear, GELU, Linear onto the image codebook."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        vq = config.vq_config
        self.proj_out = Linear(vq.image_token_embed_dim, vq.projection_dim)
        self.vision_head = nn.Linear(vq.projection_dim, vq.num_embeddings)

    def features(self, hidden: Tensor) -> Tensor:
        """(..., D) -> the input of the last layer, in which guidance is linear."""
        return F.gelu(self.proj_out(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.vision_head(self.features(hidden))
