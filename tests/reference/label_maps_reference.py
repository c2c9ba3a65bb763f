"""Label maps written from their definitions: float64, dense, one image, class and sample point at a time."""

import math

import numpy as np


def dense_map(values, ids, fill, num_classes):
    """`[K or L, h, w]` stored values of one image to `[C, h, w]`; every other class is worth the fill."""
    height, width = values.shape[1:]
    dense = np.empty((num_classes, height, width))
    dense[:] = fill
    for place, row, column in np.ndindex(*values.shape):
        index = ids[place, row, column] if ids.ndim == 3 else ids[place]
        if index >= 0:
            dense[index, row, column] = values[place, row, column]
    return dense


def bilinear(plane, y, x):
    """RoIAlign's reading of one point; cell centres are at whole numbers."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return None
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = min(int(y), max(height - 2, 0)), min(int(x), max(width - 2, 0))
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    return [
        (top, left, (1 - dy) * (1 - dx)),
        (top, right, (1 - dy) * dx),
        (bottom, left, dy * (1 - dx)),
        (bottom, right, dy * dx),
    ]


def bin_weights(grid, box, output_size):
    """`[S, S, h, w]`: how much each cell counts in each bin of a box x1, y1, x2, y2 in [0, 1]."""
    height, width = grid
    x1, y1, x2, y2 = box
    sides = (y2 - y1) * height / output_size, (x2 - x1) * width / output_size
    points = [max(math.ceil(side), 1) for side in sides]
    weights = np.zeros((output_size, output_size, height, width))
    for p, q, i, j in np.ndindex(output_size, output_size, *points):
        y = y1 * height - 0.5 + sides[0] * (p + (i + 0.5) / points[0])
        x = x1 * width - 0.5 + sides[1] * (q + (j + 0.5) / points[1])
        for row, column, weight in bilinear(np.zeros(grid), y, x) or []:
            weights[p, q, row, column] += weight / (points[0] * points[1])
    return weights


def bin_areas(grid, box, output_size):
    """`[S, S, h, w]`: each cell's share of the area of each bin of a box x1, y1, x2, y2 in [0, 1]."""
    height, width = grid
    x1, y1, x2, y2 = box
    tall, wide = (y2 - y1) / output_size, (x2 - x1) / output_size
    areas = np.zeros((output_size, output_size, height, width))
    for p, q, row, column in np.ndindex(*areas.shape):
        top, left = y1 + p * tall, x1 + q * wide
        down = min((row + 1) / height, top + tall) - max(row / height, top)
        across = min((column + 1) / width, left + wide) - max(column / width, left)
        areas[p, q, row, column] = max(down, 0) * max(across, 0) / (tall * wide)
    return areas


def pool(dense, box, operator, output_size=1, sharpness=10.0, top_share=0.25):
    """`[C, S, S]` of one dense map `[C, h, w]`."""
    weigh = bin_weights if operator.startswith("mean_") else bin_areas
    weights = weigh(dense.shape[1:], box, output_size)
    pooled = np.zeros((len(dense), output_size, output_size))
    for c, p, q in np.ndindex(*pooled.shape):
        w, v = weights[p, q].ravel(), dense[c].ravel()
        inside = v[w > 0]
        if operator.startswith("mean_"):
            pooled[c, p, q] = (w * v).sum()
        elif operator == "max":
            pooled[c, p, q] = inside.max()
        elif operator == "log_sum_exp":
            top = inside.max()
            pooled[c, p, q] = top + math.log((w[w > 0] * np.exp(sharpness * (inside - top))).sum()) / sharpness
        elif operator == "top_q":
            pooled[c, p, q] = np.sort(inside)[::-1][: math.ceil(len(inside) * top_share)].mean()
    return pooled
