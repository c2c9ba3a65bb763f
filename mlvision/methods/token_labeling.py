"""Token Labeling: every cell of the backbone's map learns a label of its own, beside the image's."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mlvision.errors import InputError, check_fields
from mlvision.label_maps import Pooling, pool_probabilities
from mlvision.label_maps.geometry import whole_images
from mlvision.label_maps.mix import Mix, MixConfig, draw_mix
from mlvision.losses import binary_cross_entropy, smooth_labels, softmax_cross_entropy
from mlvision.methods.base import Method, MethodConfig, starting_logits
from mlvision.models import Classifier
from mlvision.models.heads.base import set_bias
from mlvision.parts import Context, LabelStatistics
from mlvision.types import Batch, CropBox, LabelMap, StepOutput

# target: the operators of the image's label and of a cell's
TARGETS = {"softmax": ("mean_logit", "mean_logit"), "multilabel": ("max", "mean_probability")}
IMAGE_LABELS = ("map", "annotation")


@dataclass(frozen=True)
class TokenLabelingConfig(MethodConfig):
    """Token Labeling: each patch of the student learns what a teacher's label map says of its place."""

    name: Annotated[str, "which method: a key of METHODS"] = "token_labeling"
    target: Annotated[
        str,
        "softmax: a distribution over the classes, or each group of them (the paper); multilabel: one probability a class",
    ] = "softmax"
    image_label: Annotated[str, "what the image's own logits learn: map (pooled over the view) or annotation"] = "map"
    image_weight: Annotated[float, "weight of the image's loss"] = 1.0
    token_weight: Annotated[float, "weight of the cells' mean loss; 0.5 in the paper, 1 in its code's defaults"] = 0.5
    inference_weight: Annotated[
        float, "prediction: the image's logits plus this share of each class's highest cell; the paper's code: 0.5"
    ] = 0.0
    temperature: Annotated[float, "divides the teacher's logits"] = 1.0
    calibration: Annotated[
        str,
        "what makes probabilities of maps that hold mass or attributions: relative_to_peak; empty: such maps are refused",
    ] = ""
    smoothing: Annotated[
        float, "label smoothing of both losses: this share is spread evenly over all classes, or those of its group"
    ] = 0.0
    mix: Annotated[float, "alpha of MixToken's Beta distribution: pairs of images, pasted along cells; 0: none"] = 0.0

    def __post_init__(self) -> None:
        rules = (
            ("target", self.target in TARGETS, f"one of {', '.join(TARGETS)}"),
            ("image_label", self.image_label in IMAGE_LABELS, f"one of {', '.join(IMAGE_LABELS)}"),
            ("image_weight", self.image_weight >= 0, "0 or more"),
            ("token_weight", self.token_weight >= 0, "0 or more"),
            ("inference_weight", self.inference_weight >= 0, "0 or more"),
            ("smoothing", 0 <= self.smoothing < 1, "a share in [0, 1)"),
            ("mix", self.mix >= 0, "0 or more"),
        )
        check_fields(self, "method.", rules)
        try:
            self.poolings()
        except InputError as error:
            raise InputError(f"method.{error}") from None

    def poolings(self) -> tuple[Pooling, Pooling]:
        """How cells become the label of the image, and that of a cell of the backbone's map."""
        of_image, of_token = TARGETS[self.target]
        image = Pooling(of_image, temperature=self.temperature, calibration=self.calibration)
        return image, replace(image, operator=of_token)

    def build(self, context: Context, classifier: Classifier) -> "TokenLabeling":
        return TokenLabeling(self, context, classifier)


class TokenLabeling(Method):
    """A linear head on each cell of the backbone's map (patch tokens of a ViT, grid of a CNN) learns from label maps.

    Source: Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021.

    DEVIATION: MixToken pastes the images themselves, along the borders of cells, and mixes the cells' targets likewise. For
    patches that do not overlap this is the paper's exchange of embedded tokens, and pasting the outputs back is mixing the
    targets; a convolutional network or stem does mix at the seams. With target=multilabel (ours) the cells' probabilities
    are pooled and learnt by BCE.
    """

    needs_label_map = True

    def __init__(self, config: TokenLabelingConfig, context: Context, classifier: Classifier):
        softmax = config.target == "softmax"
        super().__init__(classifier, context.space.with_softmax() if softmax else context.space.with_sigmoids())
        backbone = classifier.backbone
        if backbone.grid[0] != backbone.grid[1]:
            raise InputError(f"method.name: token_labeling needs a square grid of cells, got {backbone.grid}")
        self.config = config
        self.image_pooling, self.token_pooling = config.poolings()
        self.mix = MixConfig(cutmix=config.mix)
        self.loss = partial(softmax_cross_entropy, groups=self.space.groups) if softmax else binary_cross_entropy
        self.tokens = nn.Conv2d(backbone.map_features, classifier.num_classes, 1)
        nn.init.normal_(self.tokens.weight, std=0.01)
        nn.init.zeros_(self.tokens.get_parameter("bias"))

    def prepare(self, statistics: LabelStatistics) -> None:
        super().prepare(statistics)
        set_bias(self.tokens.get_parameter("bias"), starting_logits(statistics, self.space))

    def forward(self, batch: Batch) -> StepOutput:
        config = self.config
        images, image_targets, token_targets = batch.images, *self.targets(batch)
        mix = draw_mix(self.mix, self.classifier.backbone.grid)
        if mix:
            images = self._pasted(mix, images)
            token_targets = mix.images(token_targets)
            image_targets = mix.share * image_targets + (1 - mix.share) * image_targets.flip(0)
        logits, cells = self._both(images)
        image_loss = self.loss(logits, smooth_labels(image_targets, config.smoothing, self.space.groups))
        token_loss = self.loss(_rows(cells), smooth_labels(_rows(token_targets), config.smoothing, self.space.groups))
        loss = config.image_weight * image_loss + config.token_weight * token_loss
        return StepOutput(loss, {"image_loss": image_loss.detach(), "token_loss": token_loss.detach()})

    def check_label_map(self, label_map: LabelMap) -> None:
        view = CropBox(whole_images(label_map.values.float()))
        self._of_image(label_map, view)
        self._of_tokens(label_map, view)

    @torch.no_grad()
    def targets(self, batch: Batch) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C h w"]]:
        """What the image's logits and the cells' logits are to say of each view."""
        assert batch.label_map is not None
        of_tokens = self._of_tokens(batch.label_map, batch.view)
        if self.config.image_label == "annotation":
            return batch.targets, of_tokens
        return self._of_image(batch.label_map, batch.view), of_tokens

    def predict(self, images: Shaped[Tensor, "B in_chans H W"]) -> Float[Tensor, "B C"]:
        if not self.config.inference_weight:
            return super().predict(images)
        logits, cells = self._both(images)
        return logits + self.config.inference_weight * cells.amax((2, 3))

    def label_maps(self, images: Shaped[Tensor, "B in_chans H W"]) -> LabelMap:
        """What the cells say of the views; the grid covers the view."""
        return LabelMap(self._both(images)[1], None, "logit", groups=self.space.groups)

    def _of_image(self, label_map: LabelMap, view: CropBox) -> Float[Tensor, "B C"]:
        return pool_probabilities(label_map, view, self.classifier.num_classes, self.image_pooling)

    def _of_tokens(self, label_map: LabelMap, view: CropBox) -> Float[Tensor, "B C h w"]:
        grid = self.classifier.backbone.grid
        num_classes = self.classifier.num_classes
        pooled = pool_probabilities(label_map, view, num_classes, self.token_pooling, output_size=grid[0])
        return pooled.reshape(*pooled.shape[:2], *grid)

    def _both(self, images: Shaped[Tensor, "B in_chans H W"]) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C h w"]]:
        """Logits of the image and of its cells, in at least float32 also under autocast."""
        features = self.features(images)
        logits = self.classifier.head(features).logits
        with torch.autocast(features.map.device.type, enabled=False):
            cells = self.tokens(features.map)
        return logits.to(cells.dtype), cells

    def _pasted(self, mix: Mix, images: Shaped[Tensor, "B in_chans H W"]) -> Shaped[Tensor, "B in_chans H W"]:
        """The images mixed as the grid is: a patch of cells, in pixels."""
        assert mix.patch is not None
        height, width = images.shape[2:]
        rows, columns = self.classifier.backbone.grid
        x1, y1, x2, y2 = mix.patch
        pixels = (x1 * width // columns, y1 * height // rows, x2 * width // columns, y2 * height // rows)
        return Mix(mix.config, mix.share, pixels).images(images)


def _rows(cells: Float[Tensor, "B C h w"]) -> Float[Tensor, "N C"]:
    """One row a cell."""
    return cells.permute(0, 2, 3, 1).flatten(0, 2)
