"""What the options of every loss have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from mlvision.errors import check_fields
from mlvision.parts import Context, PartConfig

# Of logits and targets, [B, C] each, with the keyword arguments class_weights and reduction.
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class LossConfig(PartConfig):
    """The options of a loss, which each loss's own class adds to.

    Attributes:
        activation: what makes scores of logits that were trained by it: sigmoid or softmax.
    """

    name: Annotated[str, "which loss: a key of LOSSES"]

    activation: ClassVar[str] = "sigmoid"

    def __post_init__(self) -> None:
        check_fields(self, "method.loss.")

    def build(self, context: Context) -> Loss:
        raise NotImplementedError
