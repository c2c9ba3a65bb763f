"""Classifiers as dense teachers: what their head says of each cell of the map, beside what it says of the whole image.

A network that averages its map and then classifies linearly gives the same logits if it classifies each cell first, by a
1x1 convolution, and averages then: `mean(dense map) == logits`, and no training is needed. Other heads are read cell by
cell as well, but there the mean differs from the logits; `check_identity` measures by how much.

Source: Yun et al., "Re-labeling ImageNet: from Single to Multi-Labels, from Global to Localized Labels", CVPR 2021.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from mlvision.errors import InputError, first_line
from mlvision.label_maps.geometry import resample
from mlvision.models.backbone import (
    Backbone,
    BackboneConfig,
    Preprocessing,
    built_size,
    create_backbone,
    load_weights,
)
from mlvision.models.classifier import Classifier
from mlvision.models.heads.linear import LinearHead, LinearHeadConfig
from mlvision.models.weights import TimmModel, read_checkpoint
from mlvision.space import Groups, join_groups, split_groups, to_scores
from mlvision.types import HeadOutput

COMBINATIONS = ("mean_logit", "mean_probability")
_CELLS = 1024  # how many cells pass a head with further layers at once: VGG's makes 7 x 7 maps of each


class Teacher(nn.Module):
    """Raw images (uint8, or float in [0, 1]) to a dense map of logits and to logits.

    Always in eval mode, for its answer to an image must not depend on the images beside it.

    Attributes:
        num_classes: C.
        image_size: (H, W) of the images to give it: whole ones, squashed to it.
        grid: (h, w) of the map for images of that size.
        preprocessing: what its weights expect of the images; the interpolation to resize them with.
    """

    num_classes: int
    image_size: tuple[int, int]
    grid: tuple[int, int]
    preprocessing: Preprocessing

    def forward(self, images: Shaped[Tensor, "B in_chans H W"]) -> HeadOutput:
        """Maps and logits from one pass of the backbone; in the weights' own precision also under autocast."""
        raise NotImplementedError

    def at_own_size(self) -> "Teacher":
        """The same teacher without scales: it answers images at the size that it was trained at."""
        return self

    def maps(self, images: Shaped[Tensor, "B in_chans H W"]) -> Float[Tensor, "B C h w"]:
        """The logits of each cell."""
        maps = self(images).maps
        assert maps is not None
        return maps

    def logits(self, images: Shaped[Tensor, "B in_chans H W"]) -> Float[Tensor, "B C"]:
        """The teacher's own answer for each whole image."""
        return self(images).logits

    @torch.no_grad()
    def identity_gap(self, images: Shaped[Tensor, "B in_chans H W"]) -> float:
        """The greatest absolute difference between the maps' mean and the logits over these images, in float32."""
        with torch.autocast(images.device.type, enabled=False):
            output = self(images)
        assert output.maps is not None
        return float((output.maps.mean((2, 3)) - output.logits).abs().max())

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode, whatever is asked for."""
        return super().train(False)


class DenseTeacher(Teacher):
    """A backbone with a linear head, read at each cell of the backbone's map.

    Where the head of the timm model has layers between pooling and classifier (ConvNeXt, MobileNet, VGG, attention
    pooling), each cell takes the pooled feature's place and passes them. The patch tokens of a model that classifies a
    class token (or the mean of that and a distillation token) take that token's place, though nothing trained them for it.

    The classifier is shared, not copied, and put into eval mode.

    Args:
        mean: one value a channel, in any shape, for images in [0, 1]; the backbone's own preprocessing where not given.
        std: as `mean`.

    Raises:
        InputError: the head is not linear, or cannot take a single cell.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classifier: Classifier,
        mean: Tensor | Sequence[float] | None = None,
        std: Tensor | Sequence[float] | None = None,
    ):
        super().__init__()
        self.name: str = classifier.backbone.model.pretrained_cfg["architecture"]
        if not isinstance(classifier.head, LinearHead):
            raise InputError(
                f"teacher: expected a linear head on {self.name}, got {type(classifier.head).__name__}; only a linear"
                " layer can move before the pooling"
            )
        self.classifier = classifier
        self.num_classes = classifier.num_classes
        self.image_size, self.grid = classifier.backbone.image_size, classifier.backbone.grid
        self.preprocessing = classifier.backbone.preprocessing
        weight = classifier.head.linear.weight
        for key, given in (("mean", mean), ("std", std)):
            values = torch.as_tensor(getattr(self.preprocessing, key) if given is None else given)
            self.register_buffer(key, values.detach().to(weight, copy=True).view(1, -1, 1, 1))
        self.eval()
        self._head_is_linear = self._probe()

    def forward(self, images: Shaped[Tensor, "B in_chans H W"]) -> HeadOutput:
        features = self.classifier.backbone(self._normalise(images))
        logits = self.classifier.head(features).logits
        cells = features.map.permute(0, 2, 3, 1)
        if not self._head_is_linear:
            flat = [self._pooled_of_cells(part) for part in cells.flatten(0, 2).split(_CELLS)]
            cells = torch.cat(flat).unflatten(0, cells.shape[:3])
        linear = self.classifier.head.get_submodule("linear")
        with torch.autocast(cells.device.type, enabled=False):  # as in LinearHead
            # A view with the classes last in memory, along which the best of each cell are looked for.
            maps = linear(cells.to(self.mean.dtype)).permute(0, 3, 1, 2)
        return HeadOutput(logits, maps)

    def logits(self, images: Shaped[Tensor, "B in_chans H W"]) -> Float[Tensor, "B C"]:
        """The classifier's own answer, without the work for the maps."""
        return self.classifier(self._normalise(images)).logits

    def _normalise(self, images: Shaped[Tensor, "B in_chans H W"]) -> Float[Tensor, "B in_chans H W"]:
        return (_as_float(images).to(self.mean.dtype) - self.mean) / self.std

    def _pooled_of_cells(self, cells: Float[Tensor, "n D"]) -> Float[Tensor, "n P"]:
        """What timm would give to its classifier for maps of this one cell, whose prefix tokens equal it too."""
        backbone = self.classifier.backbone
        prefix = cells[:, None].expand(-1, backbone.num_prefix_tokens, -1)
        tokens = backbone.from_cells(cells[:, :, None, None], prefix)
        return backbone.model.forward_head(tokens, pre_logits=True).flatten(1)

    @torch.no_grad()
    def _probe(self) -> bool:
        """Whether cells reach the classifier unchanged, so that no layer between need be run for each of them."""
        backbone = self.classifier.backbone
        generator = torch.Generator().manual_seed(0)
        cells = torch.randn(2, backbone.map_features, generator=generator).to(self.mean)
        try:
            pooled = self._pooled_of_cells(cells)
            if pooled.shape[1] != backbone.num_features:
                raise ValueError(f"{pooled.shape[1]} features of one, {backbone.num_features} of a whole map")
        except (RuntimeError, ValueError, AssertionError, AttributeError, TypeError, IndexError) as error:
            raise InputError(
                f"teacher: {self.name} has no dense reading: its head cannot take a single cell ({first_line(error)})"
            ) from error
        return pooled.shape == cells.shape and torch.allclose(pooled, cells, rtol=1e-6, atol=1e-6)


class AveragedTeacher(Teacher):
    """The average of several teachers, each at several scales and mirrored; all views of all teachers weigh the same.

    Each teacher sees the images resized (antialiased) to its own image size times the scale, rounded to whole cells: a cell
    beyond the rim would not lie where the map says. Maps of mirrored images are mirrored back. Maps of another grid than the
    first's (the first teacher at the first scale) are resampled to it by the exact overlap of the cells. That keeps their
    mean, so the average of logits has the identity where every teacher has it, whatever the grids.

    Attributes:
        image_size: the largest that any view needs, so that none is enlarged.

    Args:
        teachers: of the same classes in the same order.
        flip: also the mirrored images.
        combination: mean_logit; mean_probability gives logits too, those of the mean probability: less spread where the
            teachers' scales differ, but the maps' mean is then no longer the logits.
        groups: of mean_probability: the classes that share a softmax, as the teachers were trained; (): a sigmoid of each.

    Raises:
        InputError: teachers of different class or channel counts, one that does not take a scale, or an option out of range.
    """

    def __init__(
        self,
        teachers: Sequence[DenseTeacher],
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        combination: str = "mean_logit",
        groups: Groups = (),
    ):
        super().__init__()
        if not teachers or not scales or not all(scale > 0 for scale in scales):
            raise InputError(f"teacher: expected teachers, and scales above 0, got {len(teachers)} and {list(scales)}")
        if combination not in COMBINATIONS:
            raise InputError(f"teacher: expected a combination of {', '.join(COMBINATIONS)}, got '{combination}'")
        first = teachers[0]
        for other in teachers[1:]:
            here, there = ((t.num_classes, t.mean.shape[1]) for t in (first, other))
            if here != there:
                raise InputError(
                    f"teacher: {first.name} has {here[0]} classes and takes {here[1]} channels, {other.name} has {there[0]}"
                    f" and takes {there[1]}"
                )
        self.teachers = nn.ModuleList(teachers)
        self.flip, self.combination, self.groups = flip, combination, groups
        self.num_classes, self.preprocessing = first.num_classes, first.preprocessing
        self._views = [(teacher, _scaled_size(teacher, scale)) for teacher in teachers for scale in scales]
        self.grid, *_ = [_grid_at(*view) for view in self._views]  # of all: each must take its size
        heights, widths = zip(*(size for _, size in self._views), strict=True)
        self.image_size = (max(heights), max(widths))
        self.eval()

    def forward(self, images: Shaped[Tensor, "B in_chans H W"]) -> HeadOutput:
        maps = logits = images.new_zeros(())
        for teacher, size in self._views:
            view = _resized(images, size, teacher.preprocessing.interpolation)
            for mirrored in (False, True)[: 1 + self.flip]:
                output = teacher(view.flip(-1) if mirrored else view)
                seen = output.maps.flip(-1) if mirrored else output.maps
                maps = maps + resample(self._summands(seen), self.grid)
                logits = logits + self._summands(output.logits)
        count = len(self._views) * (1 + self.flip)
        return HeadOutput(self._to_logits(logits / count), self._to_logits(maps / count))

    def at_own_size(self) -> "AveragedTeacher":
        teachers = [teacher for teacher in self.teachers if isinstance(teacher, DenseTeacher)]
        return AveragedTeacher(teachers, flip=self.flip, combination=self.combination, groups=self.groups)

    def _summands(self, logits: Float[Tensor, "B C ..."]) -> Float[Tensor, "terms B C ..."]:
        """What is averaged: logits, or probabilities of presence, and of absence by a sigmoid."""
        if self.combination == "mean_logit":
            return logits[None]
        # 1 - p would be 0 long before absence is impossible.
        return torch.stack([to_scores(logits, self.groups), (-logits).sigmoid()])

    def _to_logits(self, mean: Float[Tensor, "terms B C ..."]) -> Float[Tensor, "B C ..."]:
        if self.combination == "mean_logit":
            return mean[0]
        logs = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
        runs = zip(*(split_groups(log, self.groups) for log in logs), strict=True)
        return join_groups([present - absent if present.shape[2] == 1 else present for present, absent in runs])


def check_identity(
    teacher: Teacher, images: Shaped[Tensor, "B in_chans H W"], strict: bool = False, tolerance: float = 1e-4
) -> float | None:
    """None where the mean of the teacher's maps is its logits, else the greatest difference on these images.

    The tolerance is absolute: rounding alone comes to about 1e-6 of the largest logit.

    Raises:
        InputError: they differ and `strict` is asked for, or they are not finite.
    """
    gap = teacher.identity_gap(images)
    if gap <= tolerance:
        return None
    if not math.isfinite(gap):
        raise InputError("teacher: its maps or logits are not finite; its weights are broken, or not for such images")
    if strict:
        raise InputError(
            f"teacher: the mean of its maps differs from its logits by {gap:.3g}, strict allows {tolerance:g}; its head"
            " is not mean pooling and a linear layer, or its averaging is not of logits"
        )
    return gap


def build_teacher(
    source: Any,
    *,
    image_size: tuple[int, int] | int | None = None,
    num_classes: int | None = None,
    allow_random: bool = False,
) -> DenseTeacher:
    """A dense teacher from whatever classifies.

    Args:
        source: a trained Method (anything with `classifier`, `mean` and `std`); a timm classifier; or a BackboneConfig or
            timm name, whose weights must hold a classifier.
        image_size: (H, W), or one number for square images; the weights' own where not given. A Method keeps its own.
        num_classes: of the classifier of a BackboneConfig's weights, where it cannot be told from the file.
        allow_random: also without trained weights, or with some missing; for tests and timing.

    Raises:
        InputError: no weights, weights without a classifier or incomplete; a head without dense reading; see also
            `build_backbone`.
    """
    if isinstance(source, str | BackboneConfig):
        config = BackboneConfig(source) if isinstance(source, str) else source
        return DenseTeacher(_load_classifier(config, image_size, num_classes, allow_random))
    if isinstance(getattr(source, "classifier", None), Classifier):
        return DenseTeacher(source.classifier, source.mean, source.std)
    if hasattr(source, "pretrained_cfg") and hasattr(source, "forward_head"):
        return DenseTeacher(take_apart(source, image_size))
    raise InputError(
        f"teacher: expected a trained method, a timm classifier, a BackboneConfig or a name, got {type(source).__name__}"
    )


def _load_classifier(
    config: BackboneConfig, image_size: tuple[int, int] | int | None, num_classes: int | None, allow_random: bool
) -> Classifier:
    """Backbone and linear head, both from the weights that `config` names; refused where a part would stay random."""
    backbone = create_backbone(config, image_size)
    head = LinearHead(backbone.num_features, num_classes or _count_classes(backbone, config), LinearHeadConfig())
    random_weight = head.linear.weight.detach().clone()
    report = load_weights(backbone, config, head.linear)
    if not allow_random:
        if report is None:
            cfg = backbone.model.pretrained_cfg
            place = f"the hub repository {cfg['hf_hub_id']}" if cfg.get("hf_hub_id") else "trained weights"
            raise InputError(
                f"teacher: {config.name} has random weights; set its checkpoint to the path of"
                f" {cfg.get('hf_hub_filename') or 'model.safetensors'} of {place}, or its pretrained to hub or package"
            )
        if report.missing or torch.equal(random_weight, head.linear.weight):
            what = "weights" if report.missing else "a classifier"
            raise InputError(f"teacher: {config.name} lacks {what} and would answer at random ({report})")
    return Classifier(backbone, head)


def _count_classes(backbone: Backbone, config: BackboneConfig) -> int:
    """How many classes the weights have, as far as the file's names tell; else how many timm's own have."""
    cfg = backbone.model.pretrained_cfg
    state: dict[str, Tensor] = {}
    if config.checkpoint:
        _, state = read_checkpoint(config.checkpoint, backbone.model.state_dict().keys())
    names = [cfg["classifier"]] if isinstance(cfg["classifier"], str) else cfg["classifier"] or []
    weights = (state.get(f"{name}.weight") for name in ("classifier.head.linear", *names))  # first: a run of ours
    return next((len(weight) for weight in weights if weight is not None), cfg["num_classes"])


def take_apart(model: TimmModel, image_size: tuple[int, int] | int | None) -> Classifier:
    """A timm classifier as backbone and linear head, which share its weights."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size or built_size(model)
    return with_linear_head(Backbone(model, size))


def with_linear_head(backbone: Backbone) -> Classifier:
    """A timm classifier's backbone with its own linear head; the weights are shared, those of a 1x1 convolution copied.

    Raises:
        InputError: its classifier is not one linear layer.
    """
    linear = backbone.model.get_classifier()
    if not isinstance(linear, nn.Linear | nn.Conv2d):  # some timm classifiers are 1x1 convolutions
        name = backbone.model.pretrained_cfg["architecture"]
        raise InputError(
            f"teacher: {name} has no dense reading: its classifier is of type {type(linear).__name__}, not one linear layer"
        )
    head = LinearHead(backbone.num_features, len(linear.weight), LinearHeadConfig()).to(linear.weight)
    if isinstance(linear, nn.Linear):
        head.linear.weight = linear.weight
        head.linear.bias = linear.bias if linear.bias is not None else nn.Parameter(torch.zeros_like(head.linear.bias))
    else:
        with torch.no_grad():
            head.linear.weight.copy_(linear.weight.flatten(1))
            head.linear.bias.copy_(torch.zeros_like(head.linear.bias) if linear.bias is None else linear.bias)
    return Classifier(backbone, head)


def _as_float(images: Shaped[Tensor, "B in_chans H W"]) -> Float[Tensor, "B in_chans H W"]:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _resized(
    images: Shaped[Tensor, "B in_chans H W"], size: tuple[int, int], interpolation: str
) -> Shaped[Tensor, "B in_chans H2 W2"]:
    """Images of another size, by the filter that the weights' own preprocessing names; bicubic overshoots are cut."""
    if tuple(images.shape[2:]) == size:
        return images
    mode = "bicubic" if interpolation == "bicubic" else "bilinear"
    return F.interpolate(_as_float(images), size, mode=mode, antialias=True).clamp(0, 1)


def _scaled_size(teacher: DenseTeacher, scale: float) -> tuple[int, int]:
    """The teacher's image size times the scale, in whole cells."""
    height, width = (
        round(max(1, round(cells * scale)) * side / cells)
        for side, cells in zip(teacher.image_size, teacher.grid, strict=True)
    )
    return height, width


@torch.no_grad()
def _grid_at(teacher: DenseTeacher, size: tuple[int, int]) -> tuple[int, int]:
    """The grid of the maps of images of this size, which the teacher may not take."""
    if size == teacher.image_size:
        return teacher.grid
    try:
        maps = teacher.maps(teacher.mean.expand(1, -1, *size))
    except (RuntimeError, ValueError, AssertionError) as error:
        height, width = teacher.image_size
        raise InputError(
            f"teacher: {teacher.name} was built for images of {height}x{width} and takes none of {size[0]}x{size[1]}, the"
            f" nearest to a scale asked for ({first_line(error)})"
        ) from error
    return maps.shape[2], maps.shape[3]
