"""Parts: what a YAML can choose by name. The options of each stand in its own file, with what they build."""

from dataclasses import dataclass
from typing import Any

from mlvision.options import Selectable
from mlvision.space import LabelSpace


@dataclass(frozen=True)
class LabelStatistics:
    """What the training split says of each class, for what depends on how rare it is.

    Attributes:
        positives: in how many images each class is present, `[C]`.
        known: in how many it is known whether it is present, `[C]`.
        num_images: of the split.
    """

    positives: tuple[int, ...]
    known: tuple[int, ...]
    num_images: int


@dataclass(frozen=True)
class Context:
    """What a part can know of the run that it is built for. What only one part needs, it computes of these.

    Attributes:
        space: the classes, and which of them exclude each other by the data; what makes scores of logits is up to a loss.
        statistics: of the training split; None in a run that an older version trained, which did not keep them.
        training: whether what is built is to be trained; False: it only predicts, and needs no files of a teacher.
    """

    space: LabelSpace
    statistics: LabelStatistics | None = None
    training: bool = True


@dataclass(frozen=True)
class PartConfig(Selectable):
    """The options of one part; its ranges are checked when they are made."""

    def build(self, context: Context) -> Any:
        """The part itself.

        Raises:
            InputError: options that do not fit the classes.
        """
        raise NotImplementedError
