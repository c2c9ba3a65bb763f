"""Label smoothing."""

from jaxtyping import Float
from torch import Tensor

from mlvision.errors import InputError


def smooth_labels(targets: Float[Tensor, "B C"], share: float) -> Float[Tensor, "B C"]:
    """Spread `share` of each label evenly over all classes, `(1 - s) y + s / C`; unknown (NaN) stays unknown.

    Raises:
        InputError: a share outside 0 to 1.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share {share}: expected 0 to 1")
    return (1 - share) * targets + share / targets.shape[1]
