import math

import numpy as np

from mlvision.metrics.quality_tables import area_bins, top1_hits


def test_top1_by_hand():
    scores = np.array([[0.1, 0.9], [0.9, 0.1], [0.9, 0.1], [0.5, 0.5], [0.2, 0.3]])
    targets = np.array([[0, 1], [0, 1], [math.nan, 1], [1, 0], [0, 0]])
    np.testing.assert_array_equal(top1_hits(scores, targets), [1, 0, math.nan, 1, math.nan])


def test_every_crop_lies_in_one_bin_of_areas():
    areas = np.array([0.499, 0.5, 0.6, 0.75, 1.0, 1.001])
    limits, chosen = zip(*area_bins(areas, (0.5, 1.0)), strict=True)
    np.testing.assert_allclose(limits, [(0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1)])
    np.testing.assert_array_equal(np.argmax(chosen, axis=0), [0, 0, 1, 2, 4, 4])
    assert (np.sum(chosen, axis=0) == 1).all()
    assert [(limits, which.all()) for limits, which in area_bins(areas, (1.0, 1.0))] == [([1.0, 1.0], True)]
