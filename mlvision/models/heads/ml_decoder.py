"""ML-Decoder: fixed queries for groups of classes."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mlvision.errors import check_fields
from mlvision.models.heads.base import NO_ASSETS, Assets, HeadConfig
from mlvision.models.heads.queries import MOST_LAYERS, MOST_WIDTH, QueryDecoder, QueryHead, divisor, tokens_of
from mlvision.types import Features


@dataclass(frozen=True)
class MLDecoderHeadConfig(HeadConfig):
    """ML-Decoder: fixed queries, one per group of classes, that attend to the cells of the map."""

    name: Annotated[str, "which head: a key of HEADS"] = "ml_decoder"
    num_groups: Annotated[int, "queries at most; where there are more classes, several share a query"] = 100
    width: Annotated[int, "width of tokens and queries"] = 768
    num_layers: Annotated[int, "layers in which the queries read the tokens"] = 1
    num_heads: Annotated[int, "heads of the attention; they divide the width"] = 8
    feedforward: Annotated[int, "width inside the feed-forward networks"] = 2048
    dropout: Annotated[float, "probability of dropping, throughout the head"] = 0.1

    def __post_init__(self) -> None:
        rules = (
            ("num_groups", 1 <= self.num_groups <= 100_000, "1 to 100000"),
            ("width", 1 <= self.width <= MOST_WIDTH, f"1 to {MOST_WIDTH}"),
            ("num_layers", 1 <= self.num_layers <= MOST_LAYERS, f"1 to {MOST_LAYERS}"),
            ("num_heads", self.num_heads >= 1 and self.width % self.num_heads == 0, divisor(self.width)),
            ("feedforward", 1 <= self.feedforward <= 4 * MOST_WIDTH, f"1 to {4 * MOST_WIDTH}"),
            ("dropout", 0 <= self.dropout < 1, "a probability in [0, 1)"),
        )
        check_fields(self, "head.", rules)

    def build(
        self, in_features: int, num_classes: int, map_features: int | None = None, assets: Assets = NO_ASSETS
    ) -> "MLDecoderHead":
        return MLDecoderHead(in_features, num_classes, self, map_features)


class MLDecoderHead(QueryHead):
    """Fixed random queries, one for each group of classes, read the map's cells in one layer.

    The queries are drawn once and never trained; they are saved with the weights, which mean nothing without them.

    Args:
        in_features: width of the pooled features.
        map_features: width of the map; as in_features where not given.

    Source: Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", WACV 2023, and its published code.

    DEVIATION: matrices start by Xavier's rule and the read-out uniformly within 1 / sqrt(width), as in Query2Label; the
    published read-out's scale depends on the number of groups. Of a ViT, the patches alone are read, so that every token is
    a cell. With more than one layer (the published code has one) the queries are normalised before the first alone.
    """

    queries: Tensor

    def __init__(
        self, in_features: int, num_classes: int, config: MLDecoderHeadConfig, map_features: int | None = None
    ):
        width, dropout = config.width, config.dropout
        super().__init__(num_classes, config.num_groups, width)
        self.tokens = nn.Linear(map_features or in_features, width)
        self.register_buffer("queries", torch.randn(self.read_out.num_queries, width))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.decoder = QueryDecoder(width, config.num_layers, config.num_heads, config.feedforward, dropout)

    def embed(self, features: Features) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q h w"]]:
        tokens = F.relu(self.tokens(tokens_of(features)))
        queries = self.queries.expand(len(tokens), -1, -1)  # dropped of each image by itself
        state = self.norm(queries + self.dropout(queries))  # where the self-attention stood
        embeddings, weights = self.decoder(state, tokens, tokens)
        return embeddings, weights.unflatten(2, features.map.shape[2:])
