"""A head that compares the image with the names of its labels, in the space of a text encoder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mlvision.errors import InputError, check_fields
from mlvision.models.heads.base import NO_ASSETS, TAU_RANGE, Assets, HeadConfig, Joint, JointHead, set_bias
from mlvision.models.text import (
    FILE_NAME,
    TextConfig,
    embed_labels,
    extend_label_embeddings,
    load_label_embeddings,
    save_label_embeddings,
)
from mlvision.types import Features, HeadOutput


@dataclass(frozen=True)
class TextHeadConfig(HeadConfig):
    """Compares the image with the names of its labels, in the space of a text encoder."""

    asset_files = (FILE_NAME,)

    name: Annotated[str, "which head: a key of HEADS"] = "text"
    text: TextConfig = field(default_factory=TextConfig)
    adapter_ratio: Annotated[float, "share of the residual adapter that is added to the image's embedding; 0: none"] = (
        1.0
    )
    region_share: Annotated[
        float, "share of the logit that compares a label with the patches that its navigator points at; 0 to 1"
    ] = 0.0
    scale: Annotated[float, "what a cosine is multiplied by to be a logit, at the start; learnt"] = 10.0
    tau: Annotated[float, "temperature of the navigators at the start; learnt where anything trains them"] = 0.07

    def __post_init__(self) -> None:
        rules = (
            ("adapter_ratio", self.adapter_ratio >= 0, "0 or more"),
            ("region_share", 0 <= self.region_share <= 1, "0 to 1"),
            ("scale", self.scale > 0, "more than 0"),
            ("tau", TAU_RANGE[0] <= self.tau <= TAU_RANGE[1], f"{TAU_RANGE[0]} to {TAU_RANGE[1]}"),
        )
        check_fields(self, "head.", rules)

    def build(
        self, in_features: int, num_classes: int, map_features: int | None = None, assets: Assets = NO_ASSETS
    ) -> "TextHead":
        if "label_embeddings" not in assets:
            raise InputError(
                "label_embeddings: a text head compares with them; make them with mlvision.models.text.embed_labels"
            )
        return TextHead(in_features, num_classes, self, map_features, label_embeddings=assets["label_embeddings"])

    def make_assets(self, classes: Sequence[str]) -> Assets:
        return {"label_embeddings": embed_labels(classes, self.text)}

    def load_assets(self, folder: Path, classes: Sequence[str]) -> Assets:
        return {"label_embeddings": load_label_embeddings(folder, classes, self.text)}


class TextHead(JointHead):
    """Logits by how near the image's embedding is to that of each label's name: scale * cos + bias.

    One linear layer takes the pooled features, and each cell of the map, to the space of the text. The image's embedding is
    passed through a residual adapter of two layers, whose last starts at zero. The maps are the backward plan of conditional
    transport, for every label: softmax over the cells of cos(patch, label) / tau, which needs no ground truth and sums to 1
    over space (kind mass). With `region_share` a label is also compared with the mean of the patches under its map.

    Args:
        in_features: width of the pooled features.
        label_embeddings: `[C, D]`, from the labels' names; kept as a buffer, or trained where the encoder is `learned`.
        map_features: width of the map; as in_features where not given.

    Source: for the residual adapter and the CLIP-like read-out Li et al., "PatchCT", ICCV 2023, figure 2.

    DEVIATION: one projection serves pooled features and cells where their widths are the same, so that what trains the
    image's embedding also places the patches. There is a bias per class, which a sigmoid of cosines needs; a class that is
    added by its name gets the mean of the others (`add_labels`).
    """

    map_kind = "mass"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        config: TextHeadConfig,
        map_features: int | None = None,
        *,
        label_embeddings: Float[Tensor, "C D"],
    ):
        super().__init__()
        if len(label_embeddings) != num_classes:
            raise InputError(f"label embeddings of {len(label_embeddings)} labels: expected {num_classes}")
        self.num_classes, self.config = num_classes, config
        width, map_features = label_embeddings.shape[1], map_features or in_features
        if config.text.encoder == "learned":
            self.label_embeddings = nn.Parameter(label_embeddings.clone())
        else:
            self.register_buffer("label_embeddings", label_embeddings.clone())
        self.project = nn.Linear(in_features, width, bias=False)
        self.project_cells = None if map_features == in_features else nn.Linear(map_features, width, bias=False)
        self.adapter = None
        if config.adapter_ratio:
            last = nn.Linear(max(1, width // 4), width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.adapter = nn.Sequential(nn.Linear(width, max(1, width // 4)), nn.GELU(), last)
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.log_tau = nn.Parameter(torch.tensor(math.log(config.tau)), requires_grad=config.region_share > 0)

    @property
    def classifier_layer(self) -> nn.Linear | None:
        """The projection, which CLIP's own fits: with open_clip's text it is zero-shot CLIP before training."""
        return self.project if self.config.text.encoder == "open_clip" else None

    def start_at(self, logits: Float[Tensor, " C"]) -> None:
        set_bias(self.bias, logits)

    def add_labels(self, label_embeddings: Float[Tensor, "M D"]) -> None:
        """Take these embeddings in place of the head's own C, which are the first of them."""
        further = len(label_embeddings) - self.num_classes
        self.bias = nn.Parameter(torch.cat([self.bias, self.bias.mean().expand(further)]).detach())
        self.label_embeddings = label_embeddings
        self.num_classes = len(label_embeddings)

    def add_classes(self, classes: Sequence[str], names: Sequence[str]) -> None:
        """Give the trained head further classes by their names, whose logits come last.

        Raises:
            InputError: no text encoder to embed the names, or as `extend_label_embeddings`.
        """
        self.add_labels(extend_label_embeddings(self.label_embeddings, classes, names, self.config.text))

    def save_assets(self, folder: Path, classes: Sequence[str]) -> None:
        save_label_embeddings(folder, self.label_embeddings, classes, self.config.text)

    def forward(self, features: Features) -> HeadOutput:
        """Logits `[B, C]`, maps `[B, C, h, w]` and the image's embedding `[B, D]`, in float32 also under autocast."""
        with torch.autocast(features.pooled.device.type, enabled=False):
            return self.read(self.join(features))

    def join(self, features: Features) -> Joint:
        """What the head compares, in the weights' own precision."""
        dtype = self.project.weight.dtype
        image = self.project(features.pooled.to(dtype))
        if self.adapter is not None:
            image = image + self.config.adapter_ratio * self.adapter(image)
        cells = (self.project_cells or self.project)(features.map.flatten(2).mT.to(dtype))
        labels = F.normalize(self.label_embeddings, dim=-1)
        return Joint(F.normalize(image, dim=-1), cells, labels, (features.map.shape[2], features.map.shape[3]))

    def read(self, joint: Joint) -> HeadOutput:
        """Logits and maps of what is joined."""
        plan = self.plan(joint)
        return HeadOutput(self.logits(joint, plan), plan.mT.unflatten(2, joint.grid), joint.image)

    def logits(self, joint: Joint, plan: Float[Tensor, "B N C"] | None = None) -> Float[Tensor, "B C"]:
        """Logits of what is joined; the plan, where it is not given, is made only if they depend on it."""
        near, share = joint.image @ joint.labels.T, self.config.region_share
        if share:
            plan = self.plan(joint) if plan is None else plan
            regions = F.normalize(plan.mT @ joint.patches, dim=-1)
            near = (1 - share) * near + share * (regions * joint.labels).sum(2)
        return self.log_scale.exp() * near + self.bias
