"""The heads written from their equations: float64, one image at a time, one query and cell after another.

`state` is a head's state_dict as numpy arrays, `cells` an image's map `[D, h, w]`.
"""

import math

import numpy as np


def csra_of_one(cells, weights, bias, temperatures, lam):
    """Logits `[C]` and the scores of all heads `[C, h, w]`; weights `[heads, C, D]`."""
    num_heads, num_classes, _ = weights.shape
    logits = bias.copy()
    maps = np.zeros((num_classes, *cells.shape[1:]))
    for head, c in np.ndindex(num_heads, num_classes):
        w = weights[head, c]
        scores = {place: cells[(slice(None), *place)] @ w / math.sqrt(w @ w) for place in np.ndindex(cells.shape[1:])}
        if temperatures[head] == 99:
            attended = max(scores.values())
        else:
            total = sum(math.exp(temperatures[head] * s) for s in scores.values())
            attended = sum(s * math.exp(temperatures[head] * s) / total for s in scores.values())
        logits[c] += sum(scores.values()) / len(scores) + lam * attended
        for place, s in scores.items():
            maps[(c, *place)] += s
    return logits, maps + bias[:, None, None]


def ml_decoder_of_one(cells, state, num_heads, num_classes):
    """Logits `[C]`, maps `[C, h, w]` and the queries' embeddings `[Q, D]`, without dropout."""
    tokens = [np.maximum(_linear(state, "tokens", cells[:, r, c]), 0) for r, c in np.ndindex(cells.shape[1:])]
    queries = [_norm(state, "norm", query + query) for query in state["queries"]]
    nowhere = np.zeros_like(queries[0])
    embeddings, maps = _decode(state, queries, [nowhere] * len(queries), tokens, tokens, num_heads, cells.shape[1:])
    return (*_read_out(state, embeddings, maps, num_classes), np.array(embeddings))


def query2label_of_one(cells, state, num_heads, num_classes):
    """Logits `[C]`, maps `[C, h, w]` and the queries' embeddings `[C, D]`, without dropout."""
    h, w = cells.shape[1:]
    projected = "project.weight" in state
    tokens = [cells[:, r, c] for r, c in np.ndindex(h, w)]
    tokens = [_linear(state, "project", t) for t in tokens] if projected else tokens
    places = [position(r, c, h, w, len(tokens[0])) for r, c in np.ndindex(h, w)]
    for number in range(_count(state, "encoder")):
        placed = [t + p for t, p in zip(tokens, places, strict=True)]
        name = f"encoder.{number}"
        tokens = [_follow(state, name, t, _attend(state, name, p, placed, tokens, num_heads)[0])
                  for t, p in zip(tokens, placed, strict=True)]  # fmt: skip
    keys = [t + p for t, p in zip(tokens, places, strict=True)]
    queries = state["queries"]
    embeddings, maps = _decode(state, np.zeros_like(queries), queries, keys, tokens, num_heads, (h, w))
    embeddings = [_norm(state, "norm", e) for e in embeddings]
    return (*_read_out(state, embeddings, maps, num_classes), np.array(embeddings))


def position(row, column, h, w, width):
    """Channels 2k and 2k + 1 of each half: sine and cosine of a turn, over 10000 to the 2k / half."""
    half = width // 2
    channels = []
    for share in ((row + 1) / h, (column + 1) / w):
        for k in range(half // 2):
            angle = 2 * math.pi * share / 10_000 ** (2 * k / half)
            channels += [math.sin(angle), math.cos(angle)]
    return np.array(channels)


def _decode(state, starts, positions, keys, values, num_heads, grid):
    embeddings, maps = [], []
    for embedding, place in zip(starts, positions, strict=True):
        for number in range(_count(state, "decoder.layers")):
            name = f"decoder.layers.{number}"
            read, weights = _attend(state, name, embedding + place, keys, values, num_heads)
            embedding = _follow(state, name, embedding, read)
        embeddings.append(embedding)
        maps.append(np.reshape(weights, grid))
    return embeddings, maps


def _attend(state, name, asking, keys, values, num_heads):
    """What one query reads, and its weights: the mean over the heads."""
    name = f"{name}.attention"
    q = _linear(state, f"{name}.query", asking)
    ks = [state[f"{name}.key.weight"] @ key for key in keys]
    vs = [_linear(state, f"{name}.value", value) for value in values]
    size = len(q) // num_heads
    read, mean = np.zeros_like(q), np.zeros(len(keys))
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        pulls = [math.exp(q[part] @ k[part] / math.sqrt(size)) for k in ks]
        for n, pull in enumerate(pulls):
            weight = pull / sum(pulls)
            read[part] += weight * vs[n][part]
            mean[n] += weight / num_heads
    return _linear(state, f"{name}.out", read), mean


def _follow(state, name, before, read):
    x = _norm(state, f"{name}.norm_attention", before + read)
    inner = np.maximum(_linear(state, f"{name}.feedforward.0", x), 0)
    return _norm(state, f"{name}.norm_feedforward", x + _linear(state, f"{name}.feedforward.3", inner))


def _read_out(state, embeddings, maps, num_classes):
    weight, bias = state["read_out.weight"], state["read_out.bias"]
    per_query = weight.shape[2]
    logits = [
        embeddings[c // per_query] @ weight[c // per_query, :, c % per_query] + bias[c] for c in range(num_classes)
    ]
    return np.array(logits), np.array([maps[c // per_query] for c in range(num_classes)])


def _linear(state, name, x):
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def _norm(state, name, x):
    spread = math.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
    return (x - x.mean()) / spread * state[f"{name}.weight"] + state[f"{name}.bias"]


def _count(state, name):
    """How many numbered modules there are under a name."""
    return len({key[len(name) + 1 :].split(".")[0] for key in state if key.startswith(f"{name}.")})
