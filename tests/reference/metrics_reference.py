"""The metrics written from their definitions: exact fractions, loops, no sorting tricks."""

import itertools
import math
from fractions import Fraction


def precision_recall_points(scores, targets):
    """(recall, precision) at each distinct score, from the highest down, over the images with a known target."""
    known = [(s, y) for s, y in zip(scores, targets, strict=True) if not math.isnan(y)]
    num_positive = sum(y == 1 for _, y in known)
    points = []
    for threshold in sorted({s for s, _ in known}, reverse=True):
        shown = [y for s, y in known if s >= threshold]
        found = sum(y == 1 for y in shown)
        points.append((Fraction(found, num_positive), Fraction(found, len(shown))))
    return points


def average_precision_of_class(scores, targets, flavour):
    if not any(y == 1 for y in targets):
        return math.nan
    points = precision_recall_points(scores, targets)
    if flavour == "voc11":
        return float(sum(max(p for r, p in points if r >= Fraction(k, 10)) for k in range(11)) / 11)
    total, previous = Fraction(0), Fraction(0)
    for recall, precision in points:
        if flavour == "envelope":
            precision = max(p for r, p in points if r >= recall)
        total += (recall - previous) * precision
        previous = recall
    return float(total)


def decisions(scores, threshold, top_k):
    """One row at a time: rank by (score down, class index up), keep k, then the threshold."""
    rows = []
    for row in scores:
        ranked = sorted(range(len(row)), key=lambda c: (-row[c], c))
        kept = set(ranked if top_k is None else ranked[:top_k])
        rows.append([c in kept and (threshold is None or row[c] >= threshold) for c in range(len(row))])
    return rows


def f_measures(decided, targets):
    """CP, CR, CF1, CF1_mean, OP, OR, OF1 and the number of classes without a known positive."""
    precisions, recalls, f1s = [], [], []
    all_hits = all_predicted = all_positives = skipped = 0
    for c in range(len(targets[0])):
        column = [(d[c], t[c]) for d, t in zip(decided, targets, strict=True) if not math.isnan(t[c])]
        hits = sum(d and y == 1 for d, y in column)
        predicted, positives = sum(d for d, _ in column), sum(y == 1 for _, y in column)
        all_hits, all_predicted, all_positives = all_hits + hits, all_predicted + predicted, all_positives + positives
        if not positives:
            skipped += 1
            continue
        precisions.append(hits / predicted if predicted else 0.0)
        recalls.append(hits / positives)
        f1s.append(harmonic(precisions[-1], recalls[-1]))
    cp, cr, cf1_mean = (sum(values) / len(values) for values in (precisions, recalls, f1s))
    op, overall_recall = all_hits / all_predicted if all_predicted else 0.0, all_hits / all_positives
    return (cp, cr, harmonic(cp, cr), cf1_mean, op, overall_recall, harmonic(op, overall_recall), skipped)


def harmonic(a, b):
    return 2 * a * b / (a + b) if a + b else 0.0


def rankings(scores, targets):
    """The targets of one image's known classes in every order that never puts a lower score first."""
    known = [(s, y) for s, y in zip(scores, targets, strict=True) if not math.isnan(y)]
    for order in itertools.permutations(known):
        if all(a[0] >= b[0] for a, b in itertools.pairwise(order)):
            yield [y for _, y in order]


def precision_at_k(scores, targets, k):
    """Mean over the rankings of the share of labels among the first k ranks."""
    values = [Fraction(sum(y == 1 for y in ranked[:k]), k) for ranked in rankings(scores, targets) if ranked]
    return float(sum(values) / len(values)) if values else math.nan


def ndcg_at_k(scores, targets, k):
    """Mean over the rankings of the gain of the first k ranks, divided by that of the best ranking."""
    gains = [discounted_gain(ranked[:k]) for ranked in rankings(scores, targets)]
    ideal = discounted_gain(sorted((y for y in targets if not math.isnan(y)), reverse=True)[:k])
    return math.fsum(gains) / len(gains) / ideal if ideal else math.nan


def discounted_gain(ranked):
    return math.fsum(y / math.log2(rank + 1) for rank, y in enumerate(ranked, start=1))
