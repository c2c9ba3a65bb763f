"""Calibration written from its definition: one case at a time, exact fractions."""

import math
from fractions import Fraction


def reliability(probabilities, targets, num_bins):
    """(confidence, frequency, count) of each bin, NaN for both where it is empty."""
    cases = [[] for _ in range(num_bins)]
    for row, labels in zip(probabilities, targets, strict=True):
        for p, y in zip(row, labels, strict=True):
            if not math.isnan(y):
                # The borders are those doubles that are nearest to b / num_bins.
                inside = [b for b in range(num_bins) if float(p) >= b / num_bins]
                cases[inside[-1]].append((Fraction(float(p)), Fraction(float(y))))
    table = []
    for found in cases:
        if found:
            table.append(
                (float(sum(p for p, _ in found) / len(found)), float(sum(y for _, y in found) / len(found)), len(found))
            )
        else:
            table.append((math.nan, math.nan, 0))
    return table


def expected_calibration_error(probabilities, targets, num_bins):
    table = [row for row in reliability(probabilities, targets, num_bins) if row[2]]
    total = sum(count for *_, count in table)
    return sum(count * abs(p - y) for p, y, count in table) / total if total else math.nan
