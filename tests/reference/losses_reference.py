"""The losses written from their equations: float64, one image and class at a time, no stable forms."""

import math

import numpy as np


def binary_cross_entropy_table(logits, targets, class_weights=None, positive_weights=None):
    """`-w_c (v_c y log p + (1 - y) log(1 - p))`, 0 where y is NaN."""
    table = np.zeros(logits.shape)
    for (b, c), y in np.ndenumerate(targets):
        if math.isnan(y):
            continue
        p = 1 / (1 + math.exp(-logits[b, c]))
        w = 1 if class_weights is None else class_weights[c]
        v = 1 if positive_weights is None else positive_weights[c]
        table[b, c] = -w * (v * y * math.log(p) + (1 - y) * math.log(1 - p))
    return table


def asymmetric_loss_table(logits, targets, gamma_neg, gamma_pos, clip, class_weights=None):
    """Equations 4, 5 and 7 of Ridnik et al., ICCV 2021, 0 where y is NaN."""
    table = np.zeros(logits.shape)
    for (b, c), y in np.ndenumerate(targets):
        if math.isnan(y):
            continue
        p = 1 / (1 + math.exp(-logits[b, c]))
        p_m = max(p - clip, 0)
        w = 1 if class_weights is None else class_weights[c]
        table[b, c] = -w * (y * (1 - p) ** gamma_pos * math.log(p) + (1 - y) * p_m**gamma_neg * math.log(1 - p_m))
    return table


def softmax_cross_entropy_table(logits, targets, class_weights=None):
    """`-w_c y_c / sum(y) log softmax(z)_c` over the known classes of each image, 0 where y is NaN."""
    table = np.zeros(logits.shape)
    for b, row in enumerate(targets):
        known = [c for c in range(len(row)) if not math.isnan(row[c])]
        total = sum(math.exp(logits[b, c]) for c in known)
        labels = sum(row[c] for c in known)
        for c in known if labels else []:
            w = 1 if class_weights is None else class_weights[c]
            table[b, c] = -w * row[c] / labels * math.log(math.exp(logits[b, c]) / total)
    return table


def decoupled_softmax_table(logits, targets, class_weights=None):
    """`-w_l y_l / sum(y) log(e^z_l / (e^z_l + sum over other known j of (1 - y_j) e^z_j))`, 0 where y is NaN."""
    table = np.zeros(logits.shape)
    for b, row in enumerate(targets):
        known = [c for c in range(len(row)) if not math.isnan(row[c])]
        labels = sum(row[c] for c in known)
        for c in known if labels else []:
            w = 1 if class_weights is None else class_weights[c]
            own = math.exp(logits[b, c])
            rivals = sum((1 - row[j]) * math.exp(logits[b, j]) for j in known if j != c)
            table[b, c] = -w * row[c] / labels * math.log(own / (own + rivals))
    return table


def soft_top_k_table(logits, targets, k, alpha, class_weights=None):
    """`-w_l y_l / sum(y) log q_l` with `q = sigmoid(alpha (z + t))` that sums to k (None: sum(y)), 0 where y is NaN."""
    table = np.zeros(logits.shape)
    for b, row in enumerate(targets):
        known = [c for c in range(len(row)) if not math.isnan(row[c])]
        labels = sum(row[c] for c in known)
        mass = labels if k is None else k
        if not labels or mass >= len(known):
            continue
        q = soft_top_k(logits[b, known], mass, alpha)
        for c, share in zip(known, q, strict=True):
            w = 1 if class_weights is None else class_weights[c]
            table[b, c] = -w * row[c] / labels * math.log(share)
    return table


def soft_top_k(scores, mass, alpha):
    """`sigmoid(alpha (s + t))` of one image, t from a bracket far too wide."""
    low, high = -1e3, 1e3
    for _ in range(200):
        t = (low + high) / 2
        q = [1 / (1 + math.exp(-alpha * (s + t))) if alpha * (s + t) > -700 else 0.0 for s in scores]
        low, high = (low, t) if sum(q) > mass else (t, high)
    return q


def asymmetric_gradient(x, y, gamma_neg, gamma_pos, clip, detach_focal):
    """d loss / d logit of one hard label, differentiated by hand."""
    p = 1 / (1 + math.exp(-x))
    dp = p * (1 - p)
    if y == 1:
        through_log = -((1 - p) ** gamma_pos) / p * dp
        through_weight = gamma_pos * (1 - p) ** (gamma_pos - 1) * math.log(p) * dp
    else:
        p_m = p - clip
        if p_m <= 0:
            return 0.0
        through_log = p_m**gamma_neg / (1 - p_m) * dp
        through_weight = -gamma_neg * p_m ** (gamma_neg - 1) * math.log(1 - p_m) * dp
    return through_log if detach_focal else through_log + through_weight


def conditional_transport_of_one(patches, labels, label_weights, patch_weights, tau, rho):
    """Cost and both plans of one image: a double loop over the definition, without logarithms."""
    cosine = np.array([[a @ b / math.sqrt((a @ a) * (b @ b)) for b in labels] for a in patches])
    theta = np.array(patch_weights) / sum(patch_weights)
    known = [0.0 if math.isnan(w) else w for w in label_weights]
    beta = np.array(known) / sum(known)
    pull = np.exp(cosine / tau)
    forward, backward = np.zeros_like(pull), np.zeros_like(pull)
    there = back = 0.0
    for n in range(len(patches)):
        for m in range(len(labels)):
            forward[n, m] = beta[m] * pull[n, m] / sum(beta[j] * pull[n, j] for j in range(len(labels)))
            backward[n, m] = theta[n] * pull[n, m] / sum(theta[i] * pull[i, m] for i in range(len(patches)))
            there += theta[n] * forward[n, m] * (1 - cosine[n, m])
            back += beta[m] * backward[n, m] * (1 - cosine[n, m])
    return rho * there + (1 - rho) * back, forward, backward
