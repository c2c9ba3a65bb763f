"""Measures of explanations written from their definitions: one number at a time, areas and positions in exact fractions."""

import math
from fractions import Fraction
from io import BytesIO
from itertools import pairwise

import numpy as np
from PIL import Image


def trapezoid(curve):
    return math.fsum((left + right) / 2 for left, right in pairwise(curve)) / (len(curve) - 1)


def deletion(most, least, eps):
    """(morf, lerf, srg, insertion, aopc, and the first three normalised) of one row."""
    steps = len(most) - 1
    inserted = [least[steps - k] for k in range(steps + 1)]
    normalised = []
    for curve in (most, least):
        span = curve[0] - curve[-1]
        normalised.append(trapezoid([(c - curve[-1]) / span for c in curve]) if abs(span) > eps else math.nan)
    morf, lerf = trapezoid(most), trapezoid(least)
    aopc = math.fsum(most[0] - c for c in most[1:]) / steps
    return morf, lerf, lerf - morf, trapezoid(inserted), aopc, *normalised, normalised[1] - normalised[0]


def drop(before, after, labels, image, place, b):
    return before[image][b] - after[image][place][b] if labels[image][place] >= 0 else math.nan


def specificity(drops, label, present):
    """Of one place: drops of every label, the label there, and the image's targets."""
    others = [b for b, there in enumerate(present) if there == 1 and b != label]
    if label < 0 or not others:
        return math.nan
    return drops[label] - math.fsum(drops[b] for b in others) / len(others)


def cross_label_matrix(drops, labels, num_classes):
    """(mean drops, counts)."""
    mean, counts = [], []
    for a in range(num_classes):
        places = [drops[i][k] for i, row in enumerate(labels) for k, label in enumerate(row) if label == a]
        counts.append(len(places))
        mean.append([math.fsum(d[b] for d in places) / len(places) if places else math.nan for b in range(num_classes)])
    return mean, counts


def cells(plane):
    return [float(value) for row in plane for value in row]


def gini(plane):
    """Half the mean absolute difference of two cells, over the mean cell."""
    sizes = [abs(value) for value in cells(plane)]
    total = math.fsum(sizes)
    if total == 0:
        return math.nan
    return math.fsum(abs(x - y) for x in sizes for y in sizes) / (2 * len(sizes) * total)


def entropy(plane):
    sizes = [abs(value) for value in cells(plane)]
    total = math.fsum(sizes)
    if total == 0 or len(sizes) == 1:
        return math.nan
    return -math.fsum(x / total * math.log(x / total) for x in sizes if x > 0) / math.log(len(sizes))


def png_bytes(plane, side=224, level=9):
    """Of a map that is at most side x side: linear between the centres of its cells, constant beyond the outer ones."""
    height, width = len(plane), len(plane[0])
    highest = max(abs(value) for value in cells(plane))
    grey = np.zeros((side, side), dtype=np.uint8)
    for row in range(side):
        for column in range(side):
            value = 0.0
            for i, by in neighbours(row, height, side):
                for j, bx in neighbours(column, width, side):
                    value += by * bx * float(plane[i][j]) / highest
            grey[row, column] = round(128 + 127 * value)
    file = BytesIO()
    Image.fromarray(grey).save(file, format="PNG", compress_level=level)
    return len(file.getvalue())


def neighbours(pixel, num_cells, side):
    """The cells that a pixel lies between, and the weight of each."""
    place = (pixel + 0.5) * num_cells / side - 0.5
    low = math.floor(place)
    pairs = [(low, low + 1 - place), (low + 1, place - low)]
    return [(min(max(cell, 0), num_cells - 1), weight) for cell, weight in pairs]


def average_ranks(values):
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


def spearman(a, b):
    ranks = [average_ranks(cells(plane)) for plane in (a, b)]
    mean = (len(ranks[0]) + 1) / 2
    x, y = ([rank - mean for rank in row] for row in ranks)
    norm = math.sqrt(math.fsum(v * v for v in x) * math.fsum(v * v for v in y))
    return math.fsum(v * w for v, w in zip(x, y, strict=True)) / norm if norm > 0 else math.nan


def map_discrimination(planes):
    found = [spearman(planes[i], planes[j]) for i in range(len(planes)) for j in range(i)]
    found = [value for value in found if not math.isnan(value)]
    return 1 - math.fsum(found) / len(found) if found else math.nan


def max_sensitivity(plane, perturbed):
    values = cells(plane)
    norm = math.sqrt(math.fsum(v * v for v in values))
    if norm == 0:
        return math.nan
    return max(math.dist(cells(moved), values) for moved in perturbed) / norm


def shared(i, n, k, m):
    """How much of a length of 1 part i of n and part k of m have in common."""
    return max(min(Fraction(i + 1, n), Fraction(k + 1, m)) - max(Fraction(i, n), Fraction(k, m)), Fraction(0))


def resampled(cover, height, width):
    """The covered share of each cell of another grid, row by row."""
    down = [[(k, shared(i, height, k, len(cover))) for k in range(len(cover))] for i in range(height)]
    across = [[(m, shared(j, width, m, len(cover[0]))) for m in range(len(cover[0]))] for j in range(width)]
    return [
        height * width * sum(y * x * Fraction(float(cover[k][m])) for k, y in row if y for m, x in column if x)
        for row in down
        for column in across
    ]


def pointing_in_mask(plane, cover, tolerance):
    height, width, fine_height, fine_width = len(plane), len(plane[0]), len(cover), len(cover[0])
    if not any(cells(cover)):
        return math.nan
    highest = max(cells(plane))
    hits = []
    for i in range(height):
        for j in range(width):
            if plane[i][j] == highest:
                y, x = Fraction(2 * i + 1, 2 * height), Fraction(2 * j + 1, 2 * width)
                hits.append(any(
                    points_at(y, x, k, m, fine_height, fine_width, tolerance)
                    for k in range(fine_height)
                    for m in range(fine_width)
                    if cover[k][m] >= 0.5
                ))  # fmt: skip
    return sum(hits) / len(hits)


def points_at(y, x, k, m, height, width, tolerance):
    """Whether a point lies in cell (k, m), whose lower and right lines are the next cells', or near it."""
    if k <= y * height < k + 1 and m <= x * width < m + 1:
        return True
    down = max(Fraction(k, height) - y, y - Fraction(k + 1, height), Fraction(0))
    across = max(Fraction(m, width) - x, x - Fraction(m + 1, width), Fraction(0))
    return tolerance > 0 and down**2 + across**2 <= Fraction(tolerance) ** 2


def mass_in_mask(plane, cover):
    """(share, chance)."""
    inside = resampled(cover, len(plane), len(plane[0]))
    mass = [max(value, 0.0) for value in cells(plane)]
    if not any(inside) or not any(mass):
        return math.nan, math.nan
    share = sum(Fraction(m) * part for m, part in zip(mass, inside, strict=True)) / sum(Fraction(m) for m in mass)
    return float(share), float(sum(inside) / len(inside))


def rank_accuracy(plane, cover):
    """(accuracy, chance): the highest cells until their area is the mask's, equal ones each by the same part."""
    inside = resampled(cover, len(plane), len(plane[0]))
    area = sum(inside)
    if area in (0, len(inside)):
        return math.nan, math.nan
    left, hit = area, Fraction(0)
    for level in sorted(set(cells(plane)), reverse=True):
        group = [part for value, part in zip(cells(plane), inside, strict=True) if value == level]
        taken = min(left, len(group))
        hit += taken * sum(group) / len(group)
        left -= taken
    return float(hit / area), float(area / len(inside))
