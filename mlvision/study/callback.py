"""CAM grids of a few fixed images in TensorBoard while a model trains."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mlvision.errors import InputError
from mlvision.explain import Explainer, explain
from mlvision.explain.cam import GradCam
from mlvision.explain.selection import from_mask
from mlvision.explain.subject import undisturbed
from mlvision.study.render import ExplainedImage, ShownMethod, draw_grid

_log = logging.getLogger(__name__)


class CamGrids:
    """A callback for `fit`: after each validation, where the model found the labels of the same few images.

    Shown are the labels that are present or predicted, with the averaged weights where there are any. A model that has no
    maps at an epoch (all of them flat) is noted in the log. No picture ends a training: whatever else goes wrong here is
    warned of once, with its traceback, and training goes on without the page.

    Args:
        images: uint8, as the model sees them at evaluation.
        targets: 1 present, 0 absent, NaN unknown.
        keys: the images' names.
    """

    def __init__(
        self,
        images: UInt8[Tensor, "n 3 H W"],
        targets: Float[Tensor, "n C"],
        keys: Sequence[str],
        classes: Sequence[str],
        explainer: Explainer | None = None,
        threshold: float = 0.5,
    ):
        self._images, self._targets, self._keys, self._classes = images, targets, list(keys), list(classes)
        self._explainer, self._threshold = explainer or GradCam(), threshold
        self._has_failed = False

    def on_epoch_start(self, trainer: Any) -> None:
        """Nothing."""

    def on_step_end(self, trainer: Any) -> None:
        """Nothing."""

    def on_epoch_end(self, trainer: Any) -> None:
        if trainer.log.tensorboard is None:
            return
        model = trainer.method if trainer.ema is None else trainer.ema.module
        name = type(self._explainer).__name__
        try:
            trainer.log.tensorboard.add_image(
                f"explain/{name}", self.draw(model), trainer.steps_done, dataformats="HWC"
            )
        except InputError as error:
            _log.info("no CAM grid after epoch %d: %s", trainer.epoch, error)
        except (
            Exception
        ) as error:  # the weights of hours are worth more than a picture; the traceback shows a bug of ours
            if not self._has_failed:
                _log.warning(
                    "no CAM grid after epoch %d (%s: %s); training goes on, further failures are not reported",
                    trainer.epoch, type(error).__name__, error, exc_info=True,
                )  # fmt: skip
            self._has_failed = True

    def draw(self, model: Any) -> UInt8[np.ndarray, "rows columns 3"]:
        """The page of a method: a row an image.

        Raises:
            InputError: no label is present or predicted, or all maps are flat.
        """
        device = next(model.parameters()).device
        images = self._images.to(device)
        with torch.no_grad(), undisturbed(model):
            scores = model.space.scores(model.predict(images)).cpu()
        labels = from_mask((self._targets == 1) | model.space.decide(scores, self._threshold)).labels
        found = explain(model, images, self._explainer, labels)
        rows = [
            ExplainedImage(
                key,
                image.permute(1, 2, 0).numpy(),
                score.numpy(),
                target.numpy(),
                label.numpy(),
                {"": maps.cpu().numpy()},
                space=model.space,
            )
            for key, image, score, target, label, maps in zip(
                self._keys, self._images, scores, self._targets, labels, found.maps, strict=True
            )
        ]
        return draw_grid(rows, self._classes, ShownMethod(""), self._threshold)
