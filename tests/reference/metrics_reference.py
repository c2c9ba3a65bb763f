"""The metrics written from their definitions: exact fractions, loops, no sorting tricks."""

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
