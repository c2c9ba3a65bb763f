import math

import numpy as np

from mlvision.study.quality_tables import area_bins, background, by_object_size, top1_hits, verdict


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


def test_labels_of_other_sizes_are_left_out():
    """One class: small objects ranked below the images without it, large ones above; one label's size is unknown."""
    size = np.array([[0.1], [0.2], [0.3], [0.4], [0.5], [0.6], [math.nan], [0], [0]])
    targets = np.array([[1], [1], [1], [1], [1], [1], [1], [0], [0]], dtype=float)
    scores = np.array([[0.1], [0.2], [0.7], [0.45], [0.8], [0.9], [1.0], [0.5], [0.4]])
    small, middle, large = by_object_size({"size": size, "targets": targets, "whole/max": scores})
    assert [part["labels"] for part in (small, middle, large)] == [2, 2, 2]
    np.testing.assert_allclose([part["share_of_area"][0] for part in (small, middle, large)], [0.1, 4 / 15, 13 / 30])
    assert small["mAP"]["max"] == (1 / 3 + 2 / 4) / 2
    assert middle["mAP"]["max"] == (1 / 1 + 2 / 3) / 2
    assert large["mAP"]["max"] == 1
    assert by_object_size({"size": np.full((9, 1), math.nan), "targets": targets, "whole/max": scores}) is None


def test_the_labels_that_empty_cells_expect():
    """Two classes: one in two of three images, the other in one of the two in which it is known."""
    targets = np.array([[1, 0], [1, math.nan], [0, 1]])
    found = background({"targets": targets, "background": np.array([0.2, 0.4, 0.9])})
    assert found == {"expected_labels": 0.5, "labels": 2 / 3 + 1 / 2}


def test_the_verdict_names_what_speaks_against_the_maps():
    quiet, loud = ({"expected_labels": expected, "labels": 2.0} for expected in (3.0, 3.01))
    good = {"lift": 1.1, "pointing_game": 0.3, "pointing_game_chance": 0.2}
    assert verdict({"background": quiet, "localisation": good}) == []
    assert verdict({"background": quiet, "localisation": None}) == []
    (fault,) = verdict({"background": loud, "localisation": good})
    assert fault.startswith("the emptiest cell of an image expects 3.01 labels, an image has 2.00")
    for worse in ({"lift": 0.99}, {"pointing_game": 0.2}):
        assert verdict({"background": quiet, "localisation": good | worse}) == [
            "maps are worse than chance at place: do not train on them"
        ]
