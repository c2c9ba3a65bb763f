"""Label smoothing."""

from jaxtyping import Float
from torch import Tensor

from mlvision.errors import InputError
from mlvision.space import Groups, map_groups


def smooth_labels(targets: Float[Tensor, "B C"], share: float, groups: Groups = ()) -> Float[Tensor, "B C"]:
    """Spread `share` of each label evenly over n classes, `(1 - s) y + s / n`: over those of its group in `groups`, over all
    if it is for itself. Unknown (NaN) stays unknown.

    Raises:
        InputError: a share outside 0 to 1.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share {share}: expected 0 to 1")
    num_classes = targets.shape[1]
    return map_groups(
        lambda group, dim: (1 - share) * group + share / group.shape[dim],
        targets,
        groups,
        lambda alone: (1 - share) * alone + share / num_classes,
    )
