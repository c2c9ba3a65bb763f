"""What heads of queries share: each query asks the cells of the map for one label, or for a group of labels, by
cross-attention."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mlvision.models.heads.base import Head, set_bias
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


def tokens_of(features: Features) -> Float[Tensor, "B N D"]:
    """The cells of the map, row by row."""
    return features.map.flatten(2).mT


def divisor(width: int) -> str:
    """What is expected of a number of attention heads."""
    return f"a divisor of the width, {width}"
