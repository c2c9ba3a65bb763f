"""The records that cross rooms.

Shape letters, here and everywhere: B images, C classes, D feature width; H, W image pixels; h, w cells of a feature grid
or label map (rows first).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int64, Integer, Shaped
from torch import Tensor

from mlvision.errors import InputError
from mlvision.space import Groups, LabelSpace, has_groups, to_scores

_Record = TypeVar("_Record", bound="_Columns")


@dataclass
class _Columns:
    """A record of tensors, some of which may be missing, that change together."""

    def to(self: _Record, device: torch.device | str, non_blocking: bool = False) -> _Record:
        return self._each(lambda column: column.to(device, non_blocking=non_blocking))

    def pin_memory(self: _Record) -> _Record:
        return self._each(lambda column: column.pin_memory())

    def _each(self: _Record, change: Callable[[Tensor], Tensor]) -> _Record:
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(c) for name, c in columns.items() if isinstance(c, Tensor)})


@dataclass
class CropBox(_Columns):
    """The part of each full image that a view shows.

    Attributes:
        boxes: `[B, 4]` float, x1, y1, x2, y2 in [0, 1] of the full image, x first.
        flipped: `[B]` bool, True where the view was mirrored left to right after the crop; None where none was.
        quarter_turns: `[B]` int64, how often the view was then turned by 90 degrees counter-clockwise; None where none was.
    """

    boxes: Float[Tensor, "B 4"]
    flipped: Bool[Tensor, " B"] | None = None
    quarter_turns: Int64[Tensor, " B"] | None = None


KINDS = ("logit", "probability", "mass", "attribution")

# How attributions and transport plans become targets: by name, because neither says how probable a label is.
CALIBRATIONS = ("relative_to_peak",)


@dataclass
class LabelMap(_Columns):
    """How much each label is supported at each cell of a coarse grid over each image.

    Three layouts: the K best classes of each cell (`ids` `[B, K, h, w]`), L labels of each image (`ids` `[B, L]`), or all
    classes in their order (no ids).

    Attributes:
        values: `[B, K or L or C, h, w]` float, rows first.
        ids: class indices, in the shape of the layout; a negative one is an empty place.
        kind: logit; probability; mass (a transport plan: each label sums to 1 over space); attribution (signed).
        fill: what one class that is not stored is worth: one number, or `[B, h, w]`. At most the least stored value of its
            cell; the maps of `label_maps/annotate.py` keep the mass of what the K best leave out.
        extent: `[B, 4]` x1, y1, x2, y2 in [0, 1]: the part of the full image that the grid covers; None: all of it.
        groups: of all classes, stored or not: those that share a softmax, which makes probabilities of logits as the teacher
            was trained; see `LabelSpace.groups`. (): a sigmoid of each.
    """

    values: Float[Tensor, "B n h w"]
    ids: Integer[Tensor, "B ..."] | None = None
    kind: str = "probability"
    fill: Float[Tensor, "B h w"] | float = 0.0
    extent: Float[Tensor, "B 4"] | None = None
    groups: Groups = ()

    def __post_init__(self) -> None:
        if self.ids is None and self.groups and sum(self.groups) != self.values.shape[1]:
            raise InputError(f"label map: {self.values.shape[1]} classes in groups of {list(self.groups)}")
        if self.kind not in KINDS:
            raise InputError(f"label map: expected a kind of {', '.join(KINDS)}, got '{self.kind}'")
        if self.ids is not None and self.ids.shape not in (self.values.shape, self.values.shape[:2]):
            raise InputError(
                f"label map: ids {tuple(self.ids.shape)} fit neither each cell {tuple(self.values.shape)} nor each image "
                f"{tuple(self.values.shape[:2])}"
            )

    def as_kind(
        self,
        kind: str,
        *,
        temperature: float = 1.0,
        calibration: str = "",
    ) -> "LabelMap":
        """The same map as another kind; the only conversion between kinds.

        Logits become probabilities by each cell's softmax of each group, or by sigmoids; what is not stored takes part in
        a softmax with its fill. Mass and attribution become probabilities only by a named calibration: `relative_to_peak`
        divides the positive part of each label's map by its highest value, so that the label is present where it is
        strongest.

        >>> plan = LabelMap(torch.tensor([[[[0.1, 0.4, 0.2, 0.3]]]]), kind="mass")
        >>> plan.as_kind("probability", calibration="relative_to_peak").values
        tensor([[[[0.2500, 1.0000, 0.5000, 0.7500]]]])

        Args:
            temperature: divides the logits.
            calibration: one of CALIBRATIONS.

        Raises:
            InputError: a conversion that does not exist, one that misses its calibration, or a softmax of a map that stores
                neither all classes nor, of one group of all, the best of each cell.
        """
        if kind == self.kind:
            return self
        if self.values.dtype != torch.promote_types(self.values.dtype, torch.float32):
            return self._each(lambda c: c.float() if c.is_floating_point() else c).as_kind(
                kind, temperature=temperature, calibration=calibration
            )
        if (self.kind, kind) == ("logit", "probability"):
            if not temperature > 0:
                raise InputError(f"temperature: expected more than 0, got {temperature}")
            return self._softmax(temperature) if has_groups(self.groups) else self._sigmoid(temperature)
        if kind == "probability" and self.kind in ("mass", "attribution"):
            if calibration not in CALIBRATIONS:
                raise InputError(
                    f"label map: {self.kind} is no probability; name a calibration of {', '.join(CALIBRATIONS)}, "
                    f"got '{calibration}'"
                )
            if self.ids is not None and self.ids.ndim == 4:
                raise InputError(f"label map: {calibration} needs whole maps of each label, got the best of each cell")
            positive = self.values.clamp(min=0)
            peak = positive.amax(dim=(2, 3), keepdim=True)
            return replace(self, values=positive / peak.where(peak > 0, 1), kind=kind, fill=0.0)
        raise InputError(f"label map: {self.kind} cannot become {kind}")

    def rows(self, rows: slice) -> "LabelMap":
        """The maps of some of the images."""
        return self._each(lambda column: column[rows])

    def of_labels(self, labels: Integer[Tensor, "B L"]) -> Float[Tensor, "B L h w"]:
        """The whole map of each label, whatever the layout; the fill where a cell or an image does not store it.

        Maps of negative labels (empty places) hold anything.
        """
        labels = labels.long()
        if self.ids is None:
            index = labels.clamp(min=0)[:, :, None, None]
            return self.values.gather(1, index.expand(-1, -1, *self.values.shape[2:]))
        fill = self.fills(self.values.dtype).unsqueeze(1)
        of_each_image = self.ids.ndim == 2
        wanted = labels[:, :, None] if of_each_image else labels[:, :, None, None, None]
        found = self.ids.long().unsqueeze(1) == wanted
        found = found[..., None, None] if of_each_image else found
        stored = torch.where(found, self.values.unsqueeze(1), 0).sum(2)
        return torch.where(found.any(2), stored, fill)

    def fills(self, dtype: torch.dtype) -> Float[Tensor, "B h w"]:
        """The fill of every cell, on the device of the values; a number is written there, not copied, which would wait."""
        cells = (len(self.values), *self.values.shape[2:])
        if isinstance(self.fill, Tensor):
            return self.fill.to(dtype).expand(cells)
        return self.values.new_full((), self.fill, dtype=dtype).expand(cells)

    def _sigmoid(self, temperature: float) -> "LabelMap":
        fill = (
            torch.as_tensor(self.fill, dtype=self.values.dtype) / temperature
        ).sigmoid()  # a number stays on the host
        values = (self.values / temperature).sigmoid()
        return replace(self, values=values, kind="probability", fill=fill if fill.ndim else fill.item())

    def _softmax(self, temperature: float) -> "LabelMap":
        scaled = self.values / temperature
        if self.ids is None:
            return replace(self, values=to_scores(scaled, self.groups), kind="probability", fill=0.0)
        if len(self.groups) > 1 or self.ids.ndim != 4:
            raise InputError(
                "label map: a softmax needs all classes, or of one group of all the best classes of each cell"
            )
        empty = self.ids < 0
        rest = sum(self.groups) - (~empty).sum(dim=1, keepdim=True)
        fill = (self.fills(scaled.dtype) / temperature).unsqueeze(1)
        stored = scaled.masked_fill(empty, -torch.inf)
        total = torch.cat([stored, (fill + rest.log())], dim=1).logsumexp(dim=1, keepdim=True)
        return replace(self, values=(stored - total).exp(), kind="probability", fill=(fill - total).exp().squeeze(1))


@dataclass
class Batch:
    """One step's input.

    Attributes:
        images: `[B, in_chans, H, W]` uint8, or float32 in [0, 1]; never normalised (a Method does that itself).
        targets: `[B, C]` float32: 1 present, 0 absent, NaN unknown; `[B, 0]` where the method asks for `labels`.
        index: `[B]` int64, the row of each image in the manifest.
        view: what part of each full image `images` shows. With several views of an image, they are adjacent.
        label_map: the full images' label maps, in the order of `images`, where the method asks for them.
        labels: `[B, L]` int64, the classes that are present, ascending, then -1; in place of a table of very many classes.
        extra: what the method's plan of the epoch adds to each row, by name: `[B, ...]`.
    """

    images: Shaped[Tensor, "B in_chans H W"]
    targets: Float[Tensor, "B C"]
    index: Int64[Tensor, " B"]
    view: CropBox
    label_map: LabelMap | None = None
    labels: Int64[Tensor, "B L"] | None = None
    extra: dict[str, Shaped[Tensor, "B ..."]] = field(default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        return self._each(lambda column: column.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """What torch's DataLoader calls where a GPU is used."""
        return self._each(lambda column: column.pin_memory())

    def split(self, num_parts: int) -> list["Batch"]:
        """Equal parts, one after the other; `num_parts` divides the batch."""
        size = len(self.images) // num_parts
        return [self._rows(slice(start, start + size)) for start in range(0, len(self.images), size)]

    def _rows(self, rows: slice) -> "Batch":
        return self._each(lambda column: column[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            change(self.images),
            change(self.targets),
            change(self.index),
            self.view._each(change),
            self.label_map and self.label_map._each(change),
            None if self.labels is None else change(self.labels),
            {name: change(column) for name, column in self.extra.items()},
        )


@dataclass
class EpochPlan:
    """What a method decides about an epoch before it begins; it is part of the checkpoint.

    Attributes:
        order: `[n]` int64, the rows of the training manifest that the epoch visits, over all processes; None: the order
            of `loader.sampling`. n is the same in each epoch.
        targets: `[N, C]` float32, what the training images show in place of the manifest's targets; None: these.
        extra: `[n, ...]`, what `Batch.extra` gives with each row of `order`, by name.
    """

    order: Int64[Tensor, " n"] | None = None
    targets: Float[Tensor, "N C"] | None = None
    extra: dict[str, Shaped[Tensor, "n ..."]] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "EpochPlan":
        order, targets = (None if column is None else column.to(device) for column in (self.order, self.targets))
        return EpochPlan(order, targets, {name: column.to(device) for name, column in self.extra.items()})


@dataclass
class StepOutput:
    """What a Method's forward gives to the loop.

    Attributes:
        loss: a scalar with its graph.
        logs: detached scalars to log; a step that has nothing to log under a name leaves it out.
        rows: `[B, ...]` detached, what the method's `after_step` needs of each row of the batch, by name.
    """

    loss: Float[Tensor, ""]
    logs: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Shaped[Tensor, "B ..."]] = field(default_factory=dict)


@dataclass
class Predictions:
    """Logits and targets of a whole split, in manifest order.

    Attributes:
        logits: `[N, C]` float32: rankings are made on these, since probabilities in low precision saturate into ties.
        targets: `[N, C]` float32: 1 present, 0 absent, NaN unknown.
        index: `[N]` rows in the manifest, ascending, each once.
        space: the classes, what makes scores of the logits, and how the scores decide.
        thresholds: from which score on a class is present, of those that the space decides by one: one number, or `[C]`.
    """

    logits: Float[Tensor, "N C"]
    targets: Float[Tensor, "N C"]
    index: Int64[Tensor, " N"]
    space: LabelSpace
    thresholds: Float[Tensor, " C"] | float = 0.5


@dataclass
class Features:
    """What a backbone gives to a head: `map` `[B, D, h, w]` and its pooled form `[B, P]`.

    P is D, except in networks with further layers after the pooling (MobileNetV3, VGG, ...).
    """

    map: Float[Tensor, "B D h w"]
    pooled: Float[Tensor, "B P"]


@dataclass
class HeadOutput:
    """What a head gives: `logits` `[B, C]`, and where it has them `maps` `[B, C, h, w]` and `embedding` `[B, D]`."""

    logits: Float[Tensor, "B C"]
    maps: Float[Tensor, "B C h w"] | None = None
    embedding: Float[Tensor, "B D"] | None = None
