"""Query2Label: a learnt query for each class."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlvision.errors import check_fields
from mlvision.models.heads.base import NO_ASSETS, Assets, HeadConfig
from mlvision.models.heads.queries import (
    MOST_LAYERS,
    MOST_WIDTH,
    QueryDecoder,
    QueryHead,
    TokenLayer,
    divisor,
    tokens_of,
)
from mlvision.types import Features


@dataclass(frozen=True)
class Query2LabelHeadConfig(HeadConfig):
    """Query2Label: a transformer encoder and decoder with one learnt query per class."""

    name: Annotated[str, "which head: a key of HEADS"] = "query2label"
    width: Annotated[int, "width to which tokens are projected; 0: none, the map's own as published (2048)"] = 0
    encoder_layers: Annotated[int, "layers in which the tokens read each other"] = 1
    decoder_layers: Annotated[int, "layers in which the queries read the tokens"] = 2
    num_heads: Annotated[int, "heads of the attention; they divide the width"] = 4
    feedforward: Annotated[int, "width inside the feed-forward networks; 0: 4 times the width, 8192 as published"] = 0
    dropout: Annotated[float, "probability of dropping, throughout the head"] = 0.1

    def build(
        self, in_features: int, num_classes: int, map_features: int | None = None, assets: Assets = NO_ASSETS
    ) -> "Query2LabelHead":
        return Query2LabelHead(in_features, num_classes, self, map_features)


class Query2LabelHead(QueryHead):
    """A learnt query for each class reads the map's cells, after the cells have read each other.

    The queries are positions: added wherever the decoder asks, to a state that starts at zero. Sines of a cell's row and
    column are added to what it is asked by, never to what is read of it.

    Args:
        in_features: width of the pooled features.
        map_features: width of the map; as in_features where not given.

    Raises:
        InputError: an option outside its range.

    Source: Liu et al., "Query2Label: A Simple Transformer Way to Multi-Label Classification", 2021 (arXiv 2107.10834), and
    its published code.

    DEVIATION: the positions are those of the grid at hand, not of the one square grid that the head was built for. The
    read-out's bias starts at zero. Of a ViT, the patches alone are read, so that every token is a cell.
    """

    def __init__(
        self, in_features: int, num_classes: int, config: Query2LabelHeadConfig, map_features: int | None = None
    ):
        map_width = map_features or in_features
        width = config.width or map_width
        rules = (
            (
                "width",
                0 < width <= MOST_WIDTH and width % 4 == 0,
                f"a multiple of 4 up to {MOST_WIDTH}, or 0 where the map's {map_width} is one",
            ),
            ("encoder_layers", 0 <= config.encoder_layers <= MOST_LAYERS, f"0 to {MOST_LAYERS}"),
            ("decoder_layers", 1 <= config.decoder_layers <= MOST_LAYERS, f"1 to {MOST_LAYERS}"),
            ("num_heads", config.num_heads >= 1 and width % config.num_heads == 0, divisor(width)),
            ("feedforward", 0 <= config.feedforward <= 4 * MOST_WIDTH, f"0 to {4 * MOST_WIDTH}"),
            ("dropout", 0 <= config.dropout < 1, "a probability in [0, 1)"),
        )
        check_fields(config, "head.", rules)
        sizes = (config.num_heads, config.feedforward or 4 * width, config.dropout)
        super().__init__(num_classes, num_classes, width)
        self.project = nn.Linear(map_width, width) if config.width else nn.Identity()
        self.encoder = nn.ModuleList(TokenLayer(width, *sizes) for _ in range(config.encoder_layers))
        self.decoder = QueryDecoder(width, config.decoder_layers, *sizes)
        self.queries = nn.Parameter(torch.randn(num_classes, width))
        self.norm = nn.LayerNorm(width)

    def embed(self, features: Features) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q h w"]]:
        grid = features.map.shape[2:]
        tokens = self.project(tokens_of(features))
        place = _sines(grid[0], grid[1], self.queries)
        for layer in self.encoder:
            tokens = layer(tokens, place)
        state = torch.zeros_like(self.queries)[None]
        embeddings, weights = self.decoder(state, tokens + place, tokens, position=self.queries)
        return self.norm(embeddings), weights.unflatten(2, grid)


def _sines(height: int, width: int, like: Float[Tensor, "Q D"]) -> Float[Tensor, "N D"]:
    """Half of the channels tell a cell's row, half its column, each counted from 1 and as a share of a full turn."""
    rows, columns = (_waves(count, like) for count in (height, width))
    grid = (height, width, -1)
    return torch.cat([rows[:, None].expand(grid), columns.expand(grid)], 2).flatten(0, 1)


def _waves(count: int, like: Float[Tensor, "Q D"]) -> Float[Tensor, "n d"]:
    """Sine and cosine in turn, at frequencies from 1 down to nearly 1 / 10,000."""
    channels = like.shape[1] // 2
    dtype = torch.promote_types(like.dtype, torch.float32)
    turn = torch.arange(1, count + 1, device=like.device, dtype=dtype) * (2 * math.pi / count)
    frequencies = 10_000 ** -(torch.arange(0, channels, 2, device=like.device, dtype=dtype) / channels)
    angles = turn[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1).to(like.dtype)
