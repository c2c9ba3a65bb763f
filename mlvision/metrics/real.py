"""ReaL accuracy: whether the class that an image scores highest is among all the labels that fit it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mlvision.errors import InputError
from mlvision.metrics.inputs import ArrayT, check_scores, to_array


def real_accuracy(scores: Float[ArrayT, "N C"], label_lists: Sequence[Sequence[int]]) -> float:
    """Share of images whose highest class is in their list; NaN where every list is empty.

    Images with an empty list are left out, as published. With lists of one label this is the ordinary top-1 accuracy.

    DEVIATION: where several classes tie for the highest score, each is as likely to be taken (the published code takes the
    first, so that its result depends on the order of the classes).

    Args:
        scores: Any float dtype, any monotone scale.
        label_lists: The classes that fit each image, as numbers of columns.

    Raises:
        InputError: Another number of lists than of rows, a class that is no column, a score that is not finite.

    Source: Beyer et al., "Are we done with ImageNet?", 2020, and its repository's README.
    """
    s = to_array(scores)
    check_scores(s)
    if len(label_lists) != len(s):
        raise InputError(
            f"label_lists: expected one list for each of the {len(s)} rows of scores, got {len(label_lists)}"
        )
    shares = []
    for row, labels in enumerate(label_lists):
        columns = np.unique(np.asarray(labels))
        if not len(columns):
            continue
        if columns.dtype.kind not in "ui" or columns[0] < 0 or columns[-1] >= s.shape[1]:
            raise InputError(f"label_lists, row {row}: {list(labels)}, expected classes 0 to {s.shape[1] - 1}")
        highest = s[row] == s[row].max()
        shares.append(highest[columns].sum() / highest.sum())
    return float(np.mean(shares)) if shares else float("nan")
