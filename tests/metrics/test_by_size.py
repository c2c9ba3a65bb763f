"""Average precision by the size of what is shown, by hand."""

import numpy as np
import pytest

from mlvision.data.manifest import Manifest
from mlvision.data.records import Boxes, Record
from mlvision.errors import InputError
from mlvision.metrics import average_precision_by_size

NAN = np.nan


def test_images_of_another_size_are_left_out_and_those_without_stay():
    """One class, best score first: large, absent, small, small, absent, of unknown size."""
    scores = np.array([[6.0], [5.0], [4.0], [3.0], [2.0], [1.0]], dtype=np.float32)
    targets = np.array([[1], [0], [1], [1], [0], [1]], dtype=np.float32)
    areas = np.array([[9000], [NAN], [100], [1024 - 1], [NAN], [NAN]], dtype=np.float32)
    small, medium, large = average_precision_by_size(scores, targets, areas, limits=(1024.0, 9000.0))
    assert small[0] == pytest.approx((1 / 2 + 2 / 3) / 2)  # behind one absent image
    assert np.isnan(medium[0])
    assert large[0] == 1
    with pytest.raises(InputError, match="expected ascending areas"):
        average_precision_by_size(scores, targets, areas, limits=(9000.0, 1024.0))


def test_areas_are_those_of_the_largest_box_in_pixels():
    boxes = Boxes(
        xyxy=np.array([[0, 0, 0.5, 0.25], [0.5, 0.5, 0.6, 0.6], [0, 0, 1, 1]], dtype=np.float32),
        labels=np.array([1, 1, 2]),
        crowd=np.array([False, False, True]),
        difficult=np.zeros(3, dtype=bool),
        segmentation=(None,) * 3,
    )
    records = (Record("a", "a", (1, 2), boxes=boxes, size=(200, 100)), Record("b", "b", ()))
    areas = Manifest(("x", "y", "z"), records, "test").object_areas
    np.testing.assert_allclose(areas, [[NAN, 100 * 25, NAN], [NAN, NAN, NAN]])
    assert Manifest(("x",), records[1:], "test").object_areas is None
