"""From the batches of a loader to explained images: which labels are asked about, and what every method says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Shaped, UInt8
from PIL import Image
from torch import Tensor

from mlvision.data.images import read_photo
from mlvision.data.manifest import Manifest
from mlvision.data.records import Record
from mlvision.errors import InputError
from mlvision.explain import EmptySelectionError, Explanation, Labels, Selection, Subject, explain, select
from mlvision.label_maps.geometry import whole_images
from mlvision.label_maps.oracle import object_outlines
from mlvision.losses import binary_cross_entropy
from mlvision.space import LabelSpace
from mlvision.study.measure import Judged, MeasureConfig, judge_on, measure
from mlvision.study.render import ExplainedImage
from mlvision.types import Batch

PHOTO = 640  # pixels of the longest side of a photo that is shown
Columns = dict[str, np.ndarray]  # of measures, a number a pair of image and label


@dataclass
class Asked:
    """The images of a batch that have a label to explain.

    Attributes:
        images: as the loader gave them; `pixels` are the same in [0, 1], on the model's device.
        targets: 1 present, 0 absent, NaN unknown.
        rows: in the manifest.
        boxes: what part of each full image they show.
        logits: on the CPU.
    """

    images: Shaped[Tensor, "n in_chans H W"]
    pixels: Float[Tensor, "n in_chans H W"]
    targets: Float[Tensor, "n C"]
    rows: Int64[Tensor, " n"]
    boxes: Float[Tensor, "n 4"]
    logits: Float[Tensor, "n C"]
    selection: Selection


@dataclass(frozen=True)
class Asker:
    """What is asked about every batch of a manifest.

    Attributes:
        subject: a method's: its `space` makes scores of the logits, which decide.
        labels: as `select` takes them.
        threshold: of the scores, one or one a class: from which a label counts as predicted.
        known: whether the manifest knows its images' labels; a folder of images does not.
    """

    subject: Subject
    manifest: Manifest
    labels: Labels
    threshold: float | Float[Tensor, " C"]
    known: bool = True

    @property
    def space(self) -> LabelSpace:
        return self.subject.space(len(self.manifest.classes))

    def ask(self, batch: Batch) -> Asked | None:
        """The images that have such a label; None where none has."""
        pixels = self.subject.pixels(batch.images)
        with torch.inference_mode():
            logits = self.subject.logits(pixels).float().cpu().clone()
        try:
            selection = select(
                self.labels,
                logits,
                targets=batch.targets if self.known else None,
                threshold=self.threshold,
                classes=self.manifest.classes,
                space=self.space,
            )
        except EmptySelectionError:
            return None
        kept = selection.valid.any(1)
        return Asked(
            batch.images[kept],
            pixels[kept.to(pixels.device)],
            batch.targets[kept],
            batch.index[kept],
            batch.view.boxes[kept],
            logits[kept],
            selection.rows(kept).to(pixels.device),
        )

    def judged(self, asked: Asked) -> Judged:
        """What the explanations of these images are measured by.

        Raises:
            InputError: views that show a part of the image.
        """
        check_whole(asked.boxes)
        return judge_on(
            self.subject,
            asked.pixels,
            asked.targets,
            asked.selection,
            asked.rows,
            [self.manifest.records[row] for row in asked.rows.tolist()],
            threshold=self.threshold,
        )

    def explain(
        self, asked: Asked, explainers: Mapping[str, Any], seed: int, measures: MeasureConfig | None = None
    ) -> tuple[list[ExplainedImage], dict[str, Columns]]:
        """Every method's maps of these images; and with `measures` how good they are, of the very maps that are shown."""
        found: dict[str, Explanation] = {}
        columns: dict[str, Columns] = {}
        judged = None if measures is None else self.judged(asked)
        for name, explainer in explainers.items():
            if judged is None or measures is None:
                found[name] = explain(
                    self.subject, asked.pixels, explainer, asked.selection, asked.rows, seed=seed, allow_flat=True
                )
            else:
                measured = measure(self.subject, judged, explainer, measures, seed)
                found[name], columns[name] = measured.explanation, measured.columns
        return self._images(asked, found, columns), columns

    def _images(self, asked: Asked, found: dict[str, Explanation], columns: dict[str, Columns]) -> list[ExplainedImage]:
        selection = asked.selection.to("cpu")
        losses = image_losses(asked.logits, asked.targets, self.space)
        scores = self.space.scores(asked.logits)
        shown = {name: _by_label(measured, selection) for name, measured in columns.items()}
        return [
            ExplainedImage(
                self.manifest.records[row].key,
                photo=shown_photo(self.manifest, row, asked.boxes[place].tolist()),
                scores=scores[place].numpy(),
                targets=asked.targets[place].numpy(),
                labels=selection.labels[place].numpy(),
                maps={name: one.maps[place].cpu().numpy() for name, one in found.items()},
                logits=asked.logits[place].numpy(),
                loss=float(losses[place]),
                against=None if selection.against is None else selection.against[place].numpy(),
                measures={name: {key: table[place] for key, table in tables.items()} for name, tables in shown.items()},
                extent=asked.boxes[place].tolist(),
                kinds={name: one.kind for name, one in found.items()},
                areas=shown_areas(self.manifest.records[row], asked.boxes[place].tolist()),
                space=self.space,
            )
            for place, row in enumerate(asked.rows.tolist())
        ]


def shown_photo(manifest: Manifest, row: int, box: Sequence[int | float]) -> UInt8[np.ndarray, "H W 3"]:
    """The part of a photo that a view shows, in its own shape: a view's pixels are squashed, and fewer.

    Args:
        box: x1, y1, x2, y2 in [0, 1] of the photo.
    """
    photo = Image.fromarray(read_photo(manifest.records[row], manifest.max_pixels))
    left, top, right, bottom = (round(end * side) for end, side in zip(box, photo.size * 2, strict=True))
    photo = photo.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    photo.thumbnail((PHOTO, PHOTO), Image.Resampling.LANCZOS)
    return np.asarray(photo)


def shown_areas(record: Record, box: Sequence[int | float]) -> dict[int, list[Float64[np.ndarray, "_ 2"]]]:
    """By class the outlines of the annotated objects, in [0, 1] of the part of the photo that a view shows."""
    areas: dict[int, list[Float64[np.ndarray, "_ 2"]]] = {}
    if record.boxes is not None:
        corner, size = np.array(box[:2]), np.array(box[2:]) - np.array(box[:2])
        for n in np.flatnonzero(~record.boxes.crowd).tolist():
            outlines = object_outlines(record.boxes.xyxy[n], record.boxes.segmentation[n])
            areas.setdefault(int(record.boxes.labels[n]), []).extend((points - corner) / size for points in outlines)
    return areas


def image_losses(logits: Float[Tensor, "B C"], targets: Float[Tensor, "B C"], space: LabelSpace) -> Float[Tensor, " B"]:
    """The sum over known labels of the binary cross-entropy; NaN where none is known."""
    losses = binary_cross_entropy(space.log_odds(logits), targets, reduction="none").sum(1)
    return losses.where(targets.isfinite().any(1), torch.nan)


def check_whole(boxes: Float[Tensor, "B 4"]) -> None:
    """Refuse views that show a part of the image, which annotated areas and stored maps do not."""
    if not torch.equal(boxes, whole_images(boxes)):
        raise InputError(
            "view.eval_resize: measures and stored maps are of whole images; this run's views are crops of them (use squash)"
        )


def _by_label(columns: Columns, selection: Selection) -> Columns:
    """The measures that the report shows as `[B, L]`, NaN in empty places."""
    where = tuple(index.numpy() for index in selection.valid.nonzero(as_tuple=True))
    tables = {}
    for key in columns:
        if key.startswith(("srg_", "specificity_")) or key in ("pointing", "mass_lift"):
            tables[key] = np.full(selection.labels.shape, np.nan)
            tables[key][where] = columns[key]
    return tables
