"""Average precision of small, medium and large objects, where the data set says how large they are."""

import numpy as np
from jaxtyping import Float, Shaped

from mlvision.errors import InputError
from mlvision.metrics.average_precision import average_precision
from mlvision.metrics.inputs import ArrayT, check_targets, to_array

# Areas in pixels that part small, medium and large objects in COCO's own evaluation.
COCO_AREAS = (32.0**2, 96.0**2)


def average_precision_by_size(
    scores: Float[ArrayT, "N C"],
    targets: Shaped[ArrayT, "N C"],
    areas: Float[np.ndarray, "N C"],
    limits: tuple[float, ...] = COCO_AREAS,
) -> list[np.ndarray]:
    """Average precision of each class among the images whose largest object of the class has a certain size.

    Images that show the class in another size are left out of it, as unknown ones are; images without it stay.

    Args:
        areas: of the largest object of each class in each image; NaN where there is none, or it is not known.
        limits: ascending; one list more than there are limits comes back, from the smallest sizes to the largest.

    Returns:
        for each size `[C]`, NaN for a class without a positive of it.

    Raises:
        InputError: limits that do not ascend, areas of another shape, or as `average_precision`.
    """
    if list(limits) != sorted(set(limits)):
        raise InputError(f"limits {limits}: expected ascending areas")
    s, t = to_array(scores), to_array(targets)
    check_targets(t, s.shape)
    if areas.shape != s.shape:
        raise InputError(f"areas {areas.shape}: expected the shape of the scores, {s.shape}")
    size = np.where(np.isnan(areas), -1, np.digitize(np.nan_to_num(areas), limits))
    chosen = (np.where((t == 1) & (size != which), np.nan, t) for which in range(len(limits) + 1))
    return [to_array(average_precision(s, targets_of_size)) for targets_of_size in chosen]
