"""Localisation written from its definition: one cell at a time, unions of boxes by inclusion and exclusion."""

import math
from itertools import combinations


def intersection(boxes):
    """x1, y1, x2, y2 that all boxes share, or None."""
    x1, y1 = max(b[0] for b in boxes), max(b[1] for b in boxes)
    x2, y2 = min(b[2] for b in boxes), min(b[3] for b in boxes)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def area_of_union(boxes):
    total = 0.0
    for size in range(1, len(boxes) + 1):
        for chosen in combinations(boxes, size):
            shared = intersection(chosen)
            if shared:
                total += (-1) ** (size + 1) * (shared[2] - shared[0]) * (shared[3] - shared[1])
    return total


def usable(boxes):
    """The boxes cut to the map, without those that have no area there."""
    return [found for box in boxes if (found := intersection([tuple(map(float, box)), (0.0, 0.0, 1.0, 1.0)]))]


def pointing_game(plane, boxes):
    boxes = usable(boxes)
    if not boxes:
        return math.nan
    height, width = len(plane), len(plane[0])
    highest = max(max(row) for row in plane)
    hits = []
    for i in range(height):
        for j in range(width):
            if plane[i][j] == highest:
                y, x = (i + 0.5) / height, (j + 0.5) / width
                hits.append(any(b[0] <= x <= b[2] and b[1] <= y <= b[3] for b in boxes))
    return sum(hits) / len(hits)


def mass_in_box(plane, boxes):
    """(share, chance)."""
    boxes = usable(boxes)
    height, width = len(plane), len(plane[0])
    inside = total = 0.0
    for i in range(height):
        for j in range(width):
            cell = (j / width, i / height, (j + 1) / width, (i + 1) / height)
            parts = [part for box in boxes if (part := intersection([box, cell]))]
            mass = max(float(plane[i][j]), 0.0)
            inside += mass * area_of_union(parts) * height * width
            total += mass
    if not boxes or total == 0:
        return math.nan, math.nan
    return inside / total, area_of_union(boxes)
