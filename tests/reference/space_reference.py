"""Scores, log-odds and decisions of groups of classes, from their definitions: loops, no trick against overflow."""

import math
from fractions import Fraction


def slices(groups):
    """(start, stop) of each group."""
    stops = [sum(groups[: i + 1]) for i in range(len(groups))]
    return list(zip([0, *stops], stops, strict=False))


def scores(row, groups):
    found = []
    for start, stop in slices(groups):
        own = row[start:stop]
        if len(own) == 1:
            found.append(1 / (1 + math.exp(-own[0])))
        else:
            found += [math.exp(z) / sum(math.exp(other) for other in own) for z in own]
    return found


def log_odds(row, groups):
    """log(p / (1 - p)), where 1 - p is what the others of the group have; the logit of a class for itself."""
    found = []
    for start, stop in slices(groups):
        own = row[start:stop]
        for c, z in enumerate(own):
            others = [other for i, other in enumerate(own) if i != c]
            found.append(z - _log_sum_exp(others) if others else z)
    return found


def _log_sum_exp(values):
    """By the largest, as a sum of exact fractions of the rest."""
    top = max(values)
    return top + math.log(sum(Fraction(math.exp(value - top)) for value in values))


def decide(row, groups, threshold):
    found = []
    for start, stop in slices(groups):
        own = row[start:stop]
        found += [own[0] >= threshold] if len(own) == 1 else [c == own.index(max(own)) for c in range(len(own))]
    return found
