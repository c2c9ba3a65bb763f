"""What the options of every loss have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from mlvision.errors import check_fields
from mlvision.parts import Context, PartConfig
from mlvision.space import LabelSpace

# Of logits and targets, [B, C] each, with the keyword arguments class_weights and reduction.
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class LossConfig(PartConfig):
    """The options of a loss, which each loss's own class adds to."""

    name: Annotated[str, "which loss: a key of LOSSES"]

    def __post_init__(self) -> None:
        check_fields(self, "method.loss.")

    def space(self, space: LabelSpace) -> LabelSpace:
        """What makes scores of logits that it trained on data of a space: a sigmoid of each class by default.

        What the data say of classes that exclude each other stays: decisions go by it, whatever the loss.
        """
        return space.with_sigmoids()

    def build(self, context: Context) -> Loss:
        raise NotImplementedError
