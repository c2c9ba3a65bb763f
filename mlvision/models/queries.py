"""Heads of queries: each asks the cells of the map for one label, or for a group of labels, by cross-attention."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mlvision.errors import check_fields
from mlvision.models.heads import Head, HeadConfig, set_bias
from mlvision.types import Features, HeadOutput

MOST_LAYERS, MOST_WIDTH = 64, 8192  # more than any paper has, fewer than any machine waits for


class Attention(nn.Module):
    """Attention of several heads: as torch runs it, or with its weights at hand.

    DEVIATION: keys have no bias. It would add the same to all scores of a query, which their softmax does not see.
    """

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        for linear in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(linear.weight, gain=0.5**0.5)  # as torch does, where the three are one matrix
        nn.init.xavier_uniform_(self.out.weight)
        for linear in (self.query, self.value, self.out):
            nn.init.zeros_(linear.bias)

    def forward(
        self, queries: Float[Tensor, "B Q D"], keys: Float[Tensor, "B N D"], values: Float[Tensor, "B N D"]
    ) -> Float[Tensor, "B Q D"]:
        """What the queries read, by torch's kernel that never holds the weights: for many queries."""
        dropout = self.dropout if self.training else 0.0
        return self._join(F.scaled_dot_product_attention(*self._project(queries, keys, values), dropout_p=dropout))

    def with_weights(
        self, queries: Float[Tensor, "#B Q D"], keys: Float[Tensor, "B N D"], values: Float[Tensor, "B N D"]
    ) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q N"]]:
        """The same, and how much of each token a query reads: the mean over the heads, before dropout; sums to 1."""
        q, k, v = self._project(queries, keys, values)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        read = F.dropout(weights, self.dropout, self.training).to(v.dtype) @ v
        return self._join(read), weights.mean(1)

    def _project(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, heads, tokens, width of a head]` each."""
        projected = (self.query(queries), self.key(keys), self.value(values))
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        return q, k, v

    def _join(self, heads: Float[Tensor, "B heads Q d"]) -> Float[Tensor, "B Q D"]:
        return self.out(heads.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """An attention, and what follows it: a residual and a norm, a feed-forward network, a residual and a norm."""

    def __init__(self, width: int, num_heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.attention = Attention(width, num_heads, dropout)
        self.norm_attention = nn.LayerNorm(width)
        wide, narrow = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        for linear in (wide, narrow):
            nn.init.xavier_uniform_(linear.weight)
        self.feedforward = nn.Sequential(wide, nn.ReLU(), nn.Dropout(dropout), narrow)
        self.norm_feedforward = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def _take(self, state: Float[Tensor, "#B Q D"], read: Float[Tensor, "B Q D"]) -> Float[Tensor, "B Q D"]:
        """The next state of what had this one and has read that."""
        state = self.norm_attention(state + self.dropout(read))
        return self.norm_feedforward(state + self.dropout(self.feedforward(state)))


class TokenLayer(Layer):
    """Tokens read each other."""

    def forward(self, tokens: Float[Tensor, "B N D"], place: Float[Tensor, "N D"]) -> Float[Tensor, "B N D"]:
        placed = tokens + place
        return self._take(tokens, self.attention(placed, placed, tokens))


class QueryLayer(Layer):
    """Queries read tokens, and not each other."""

    def forward(
        self,
        state: Float[Tensor, "#B Q D"],
        position: Float[Tensor, "Q D"] | float,
        keys: Float[Tensor, "B N D"],
        values: Float[Tensor, "B N D"],
    ) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q N"]]:
        read, weights = self.attention.with_weights(state + position, keys, values)
        return self._take(state, read), weights


class QueryDecoder(nn.Module):
    """Queries read tokens, layer by layer; like both published codes' decoder, it has no self-attention of the queries."""

    def __init__(self, width: int, num_layers: int, num_heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(QueryLayer(width, num_heads, feedforward, dropout) for _ in range(num_layers))

    def forward(
        self,
        state: Float[Tensor, "#B Q D"],
        keys: Float[Tensor, "B N D"],
        values: Float[Tensor, "B N D"],
        position: Float[Tensor, "Q D"] | float = 0.0,
    ) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q N"]]:
        """What the queries have read, and how much of each token in the last layer.

        Args:
            state: what they start from; one set for all images, or one for each.
            position: added to the state wherever it asks.
        """
        weights = []
        for layer in self.layers:
            state, of_tokens = layer(state, position, keys, values)
            weights.append(of_tokens)
        return state, weights[-1]


class GroupLinear(nn.Module):
    """One logit a class from the query of its group, by weights of the class's own.

    Class c belongs to query c // per_query; the last query's missing classes are padding. With a query for each class it is
    one weight vector a class. Queries that would have nothing but padding are not made: 150 classes in at most 100 groups
    are 75 groups of two.

    Attributes:
        num_queries: how many there are.
        per_query: classes of one query.
    """

    def __init__(self, num_classes: int, max_queries: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.per_query = math.ceil(num_classes / min(max_queries, num_classes))
        self.num_queries = math.ceil(num_classes / self.per_query)
        self.weight = nn.Parameter(torch.empty(self.num_queries, width, self.per_query))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(self, embeddings: Float[Tensor, "B Q D"]) -> Float[Tensor, "B C"]:
        """Logits in the weights' own precision also under autocast, as in LinearHead."""
        with torch.autocast(embeddings.device.type, enabled=False):
            logits = torch.einsum("bqd,qdk->bqk", embeddings.to(self.weight.dtype), self.weight)
            return logits.flatten(1)[:, : self.num_classes] + self.bias

    def of_classes(self, maps: Float[Tensor, "B Q h w"]) -> Float[Tensor, "B C h w"]:
        """Each class's map: the one of its query."""
        return maps.repeat_interleave(self.per_query, 1)[:, : self.num_classes]


class QueryHead(Head):
    """A head whose queries read the map. The maps are what each class's query attends to, and sum to 1 over the cells.

    `embed` reads out one embedding a query, the rest a logit a class.
    """

    map_kind = "mass"

    def __init__(self, num_classes: int, max_queries: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.read_out = GroupLinear(num_classes, max_queries, width)

    def start_at(self, logits: Float[Tensor, " C"]) -> None:
        set_bias(self.read_out.bias, logits)

    def embed(self, features: Features) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q h w"]]:
        """What each query has read, and how much of it in which cell: the mean over the heads of the last layer."""
        raise NotImplementedError

    def forward(self, features: Features) -> HeadOutput:
        """Logits, maps, and as the embedding the pooled features, which are not read."""
        embeddings, maps = self.embed(features)
        return HeadOutput(self.read_out(embeddings), self.read_out.of_classes(maps), features.pooled)


@dataclass(frozen=True)
class MLDecoderHeadConfig(HeadConfig):
    name: Annotated[str, "which head: a key of HEADS"] = "ml_decoder"
    num_groups: Annotated[int, "queries at most; where there are more classes, several share a query"] = 100
    width: Annotated[int, "width of tokens and queries"] = 768
    num_layers: Annotated[int, "layers in which the queries read the tokens"] = 1
    num_heads: Annotated[int, "heads of the attention; they divide the width"] = 8
    feedforward: Annotated[int, "width inside the feed-forward networks"] = 2048
    dropout: Annotated[float, "probability of dropping, throughout the head"] = 0.1


class MLDecoderHead(QueryHead):
    """Fixed random queries, one for each group of classes, read the map's cells in one layer.

    The queries are drawn once and never trained; they are saved with the weights, which mean nothing without them.

    Args:
        in_features: width of the pooled features.
        map_features: width of the map; as in_features where not given.

    Raises:
        InputError: an option outside its range.

    Source: Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", WACV 2023, and its published code.

    DEVIATION: matrices start by Xavier's rule and the read-out uniformly within 1 / sqrt(width), as in Query2Label; the
    published read-out's scale depends on the number of groups. Of a ViT, the patches alone are read, so that every token is
    a cell. With more than one layer (the published code has one) the queries are normalised before the first alone.
    """

    queries: Tensor

    def __init__(
        self, in_features: int, num_classes: int, config: MLDecoderHeadConfig, map_features: int | None = None
    ):
        rules = (
            ("num_groups", 1 <= config.num_groups <= 100_000, "1 to 100000"),
            ("width", 1 <= config.width <= MOST_WIDTH, f"1 to {MOST_WIDTH}"),
            ("num_layers", 1 <= config.num_layers <= MOST_LAYERS, f"1 to {MOST_LAYERS}"),
            ("num_heads", config.num_heads >= 1 and config.width % config.num_heads == 0, _divisor(config.width)),
            ("feedforward", 1 <= config.feedforward <= 4 * MOST_WIDTH, f"1 to {4 * MOST_WIDTH}"),
            ("dropout", 0 <= config.dropout < 1, "a probability in [0, 1)"),
        )
        check_fields(config, "head.", rules)
        width, dropout = config.width, config.dropout
        super().__init__(num_classes, config.num_groups, width)
        self.tokens = nn.Linear(map_features or in_features, width)
        self.register_buffer("queries", torch.randn(self.read_out.num_queries, width))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.decoder = QueryDecoder(width, config.num_layers, config.num_heads, config.feedforward, dropout)

    def embed(self, features: Features) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q h w"]]:
        tokens = F.relu(self.tokens(_tokens(features)))
        queries = self.queries.expand(len(tokens), -1, -1)  # dropped of each image by itself
        state = self.norm(queries + self.dropout(queries))  # where the self-attention stood
        embeddings, weights = self.decoder(state, tokens, tokens)
        return embeddings, weights.unflatten(2, features.map.shape[2:])


@dataclass(frozen=True)
class Query2LabelHeadConfig(HeadConfig):
    name: Annotated[str, "which head: a key of HEADS"] = "query2label"
    width: Annotated[int, "width to which tokens are projected; 0: none, the map's own as published (2048)"] = 0
    encoder_layers: Annotated[int, "layers in which the tokens read each other"] = 1
    decoder_layers: Annotated[int, "layers in which the queries read the tokens"] = 2
    num_heads: Annotated[int, "heads of the attention; they divide the width"] = 4
    feedforward: Annotated[int, "width inside the feed-forward networks; 0: 4 times the width, 8192 as published"] = 0
    dropout: Annotated[float, "probability of dropping, throughout the head"] = 0.1


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
            ("num_heads", config.num_heads >= 1 and width % config.num_heads == 0, _divisor(width)),
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
        tokens = self.project(_tokens(features))
        place = _sines(grid[0], grid[1], self.queries)
        for layer in self.encoder:
            tokens = layer(tokens, place)
        state = torch.zeros_like(self.queries)[None]
        embeddings, weights = self.decoder(state, tokens + place, tokens, position=self.queries)
        return self.norm(embeddings), weights.unflatten(2, grid)


def _tokens(features: Features) -> Float[Tensor, "B N D"]:
    return features.map.flatten(2).mT


def _divisor(width: int) -> str:
    return f"a divisor of the width, {width}"


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
