"""What is explained, and how it is left as it was found."""

import copy
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from mlvision.errors import InputError, first_line
from mlvision.models import Backbone, Classifier, Preprocessing
from mlvision.models.backbone import built_size
from mlvision.models.dense import with_linear_head
from mlvision.models.weights import TimmModel
from mlvision.space import LabelSpace
from mlvision.types import Features

# They answer as the module that they hold.
_SHELLS = (nn.DataParallel, DistributedDataParallel, AveragedModel, ModelEmaV2, ModelEmaV3)

_log = logging.getLogger(__name__)


class Subject:
    """A model as the explainers see it: images in [0, 1] to logits, and where there is one its backbone and head.

    Attributes:
        module: all that the answer depends on; `explain` leaves its mode, gradients, hooks and requires_grad as they are.
        backbone: a method's, or a timm model; None for other networks, and for a timm model without a spatial map.
        classifier: backbone and one head; None also for a timm model whose own head is not one linear layer.
        lacks: why one of the two is None.
        mean: `[1, in_chans, 1, 1]`, what the model's images are normalised by, as `std`; None for a network that does that
            itself.
    """

    def __init__(self, model: Any, image_shape: tuple[int, int, int] | None = None):
        """Take a method (anything with `classifier`, `mean`, `std` and `predict`), a timm classifier, or any network that
        gives logits `[B, C]` for images in [0, 1].

        What runs a model on several devices, compiles it or averages its weights is taken off. A network that hands its
        images to a timm model as they are is given normalised ones.

        Args:
            image_shape: (in_chans, H, W) of the images; as a timm model was built for where not given.

        Raises:
            InputError: no nn.Module.
        """
        if not isinstance(model, nn.Module):
            raise InputError(f"model: expected an nn.Module, got {type(model).__name__}")
        model = _bare(model)
        self.module: Any = model
        self.backbone: Backbone | None = None
        self.classifier: Classifier | None = None
        self.lacks = f"{type(model).__name__} is neither a method nor a timm model"
        self.mean: Tensor | None = None
        self.std: Tensor | None = None
        self._shape = image_shape
        self._kept: tuple[Tensor, Tensor] | None = None
        if isinstance(getattr(model, "classifier", None), Classifier) and hasattr(model, "predict"):
            self.classifier, self.backbone = model.classifier, model.classifier.backbone
            self.mean, self.std = model.mean, model.std
        elif _is_timm(model):
            self._take(model)
        else:
            self._look_into(model)

    def _take(self, model: TimmModel) -> None:
        """A timm model's normalisation, and as far as it has them backbone and linear head."""
        in_chans, *size = self._shape or (3, *built_size(model))
        self._normalise_for(model, in_chans)
        try:
            self.backbone = Backbone(model, (size[0], size[1]), in_chans)
            with torch.random.fork_rng([]):  # a new head is drawn before it takes over the model's own weights
                self.classifier = with_linear_head(self.backbone)
        except InputError as error:  # methods that need neither will do
            self.lacks = str(error)

    def _look_into(self, model: nn.Module) -> None:
        """Find out whether a network leaves the normalisation to whom it is given by."""
        inside: list[TimmModel] = [part for part in model.modules() if _is_timm(part)]
        first = _first_layer(inside[0]) if len(inside) == 1 else None
        if first is None:
            return
        shape = self._shape or (3, *built_size(inside[0]))
        like = next(model.parameters())
        image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)).to(like)
        seen: list[Tensor] = []
        handle = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
        try:
            with torch.no_grad(), undisturbed(model):
                model(image)
        finally:
            handle.remove()
        if seen and seen[0].shape == image.shape and torch.equal(seen[0], image):
            self._normalise_for(inside[0], shape[0])
            name = inside[0].pretrained_cfg["architecture"]
            mean, std = ([round(float(x), 4) for x in values.flatten()] for values in (self.mean, self.std))  # pyright: ignore
            _log.warning(
                "model: %s hands its images to timm's %s as they are, so they are normalised first, as its metadata says "
                "(mean %s, std %s)", type(model).__name__, name, mean, std,
            )  # fmt: skip

    def _normalise_for(self, model: TimmModel, in_chans: int) -> None:
        preprocessing = Preprocessing.of(model, in_chans)
        dtype = torch.promote_types(self.dtype, torch.float32)
        self.mean, self.std = (
            torch.tensor(values, dtype=dtype, device=self.device).view(1, -1, 1, 1)
            for values in (preprocessing.mean, preprocessing.std)
        )

    @property
    def device(self) -> torch.device:
        parameter = next(self.module.parameters(), None)
        return parameter.device if parameter is not None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def space(self, num_classes: int) -> LabelSpace:
        """What makes scores of its logits, of so many classes: a method's space; a sigmoid of each class of other networks.

        Raises:
            InputError: as `LabelSpace.of`.
        """
        space = getattr(self.module, "space", None)
        return LabelSpace.of(space if isinstance(space, LabelSpace) else None, num_classes)

    def pixels(self, images: Any) -> Float[Tensor, "B in_chans H W"]:
        """uint8, or float in [0, 1], as float in [0, 1] on the model's device; channels last, faster for most convolutions.

        Raises:
            InputError: no batch of images, other channels than the model's, or floats beyond [0, 1].
        """
        check_batch(images)
        if self.mean is not None and images.shape[1] != self.mean.shape[1]:
            raise InputError(f"images: the model takes {self.mean.shape[1]} channels, got {list(images.shape)}")
        images = images.to(self.device)
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not (float(images.min()) >= 0 and float(images.max()) <= 1):
            raise InputError(
                f"images: expected uint8, or float in [0, 1], got {images.dtype} from {float(images.min()):.3g} to "
                f"{float(images.max()):.3g}; the model normalises them itself"
            )
        return images.float().contiguous(memory_format=torch.channels_last)

    def logits(self, pixels: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B C"]:
        """The model's answer, in at least float32; differentiable.

        Raises:
            InputError: images that a timm model does not take, no logits, or logits without a gradient where one is needed.
        """
        logits = self._ask(pixels)
        if not isinstance(logits, Tensor):
            kind = type(logits).__name__
            parts = f" of {', '.join(map(str, logits))}" if isinstance(logits, Mapping) else ""
            raise InputError(
                f"model: gives a {kind}{parts}, expected one tensor of logits [B, C]; wrap it in a module that returns them"
            )
        if logits.ndim != 2 or len(logits) != len(pixels):
            raise InputError(f"model: expected logits [{len(pixels)}, C], got {list(logits.shape)}")
        if pixels.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            raise InputError(_NO_GRADIENT)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _ask(self, pixels: Float[Tensor, "B in_chans H W"]) -> Any:
        if self.classifier is not None and self.classifier is getattr(self.module, "classifier", None):
            return self.module.predict(pixels.to(self.dtype))
        normalised = self.normalise(pixels)
        if self.classifier is not None:
            return self.classifier(normalised).logits
        if not _is_timm(self.module):
            return getattr(self.module, "predict", self.module)(normalised)
        try:
            return self.module(normalised)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:  # timm's models check their images so
            name, shape = self.module.pretrained_cfg["architecture"], list(pixels.shape[1:])
            raise InputError(f"images: {name} takes none of {shape} ({first_line(error)})") from error

    def answer(self, pixels: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B C"]:
        """The logits without a graph; the map that the head pooled on the way is kept for `pooled_map`."""
        kept: list[Tensor] = []
        self._kept = None
        if self.classifier is None:
            return self.logits(pixels)
        handle = self.classifier.backbone.register_forward_hook(lambda _, __, features: kept.append(features.map))
        try:
            with torch.no_grad():
                logits = self.logits(pixels)
        finally:
            handle.remove()
        if len(kept) == 1:
            self._kept = pixels, kept[0]
        return logits

    def pooled_map(self, pixels: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B D h w"] | None:
        """The map of the last `answer`, if it was to these very pixels."""
        return self._kept[1] if self._kept is not None and self._kept[0] is pixels else None

    def normalise(self, pixels: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B in_chans H W"]:
        """As the backbone expects its images."""
        if self.mean is None or self.std is None:
            return pixels.to(self.dtype)
        return ((pixels - self.mean) / self.std).to(self.dtype)

    def read(self, features: Tensor, cells: Float[Tensor, "B D h w"]) -> Float[Tensor, "B C"]:
        """What the head says of a timm model's features, whose map is `cells`; in at least float32."""
        assert self.backbone is not None
        model = self.backbone.model
        if self.classifier is None:
            logits = model.forward_head(features)
        else:
            pooled = model.forward_head(features, pre_logits=True).flatten(1)
            logits = self.classifier.head(Features(cells, pooled)).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def copy(self) -> "Subject":
        """The same model, of which nothing is shared: for methods that change modules."""
        return Subject(copy.deepcopy(self.module), self._shape)


_NO_GRADIENT = (
    "model: its logits have no gradient: its forward pass runs under torch.no_grad, or detaches what it passes on (take "
    "occlusion or another method that needs none)"
)


def check_batch(images: Any) -> None:
    """Refuse what is no batch of images.

    Raises:
        InputError: says what was expected.
    """
    if not isinstance(images, Tensor):
        raise InputError(
            f"images: expected a tensor [B, channels, H, W], got {type(images).__name__} (run.preprocess makes one of PIL "
            "images)"
        )
    if images.ndim != 4 or not images.numel():
        hint = "; images[None] is a batch of one" if images.ndim == 3 else ""
        raise InputError(f"images: expected [B, channels, H, W], got {list(images.shape)}{hint}")


def _bare(model: nn.Module) -> Any:
    """The module itself, without what compiles it, spreads it over devices or averages its weights."""
    while True:
        held = model.module if isinstance(model, _SHELLS) else getattr(model, "_orig_mod", None)
        if not isinstance(held, nn.Module):
            return model
        model = held


def _is_timm(model: nn.Module) -> bool:
    return hasattr(model, "pretrained_cfg") and hasattr(model, "forward_head")


def _first_layer(model: TimmModel) -> nn.Module | None:
    """The layer that reads the images, by timm's metadata."""
    names = model.pretrained_cfg.get("first_conv") or ()
    names = (names,) if isinstance(names, str) else names
    return dict(model.named_modules()).get(names[0]) if names else None


@contextmanager
def undisturbed(module: nn.Module, seed: int = 0) -> Iterator[None]:
    """Eval mode, no parameter that requires gradients, and random numbers from `seed`; all as before afterwards.

    Only gradients with respect to inputs and activations may be asked for inside, so no `.grad` is touched. What was
    compiled is run as it was written: compiled code passes hooks by.
    """
    modes = [(part, part.training) for part in module.modules()]
    wanted = [(p, p.requires_grad) for p in module.parameters()]
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    compiled = "torch._dynamo" in sys.modules  # without it nothing can be, and importing it takes seconds
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
    ):
        torch.manual_seed(seed)
        try:
            for part, _ in modes:
                part.training = False
            for parameter, _ in wanted:
                parameter.requires_grad_(False)
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)


def gradients(
    logits: Float[Tensor, "B C"], leaves: Sequence[Tensor], directions: Float[Tensor, "l B C"]
) -> list[Tensor]:
    """The gradients of some scores with respect to each leaf, `[l, ...]`: at once, where every operation can be batched.

    Raises:
        InputError: logits without a gradient.
    """
    if not logits.requires_grad:
        raise InputError(_NO_GRADIENT)
    try:
        return list(torch.autograd.grad(logits, leaves, directions, retain_graph=True, is_grads_batched=True))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # An operation without a batching rule.
        each = [torch.autograd.grad(logits, leaves, one, retain_graph=True) for one in directions]
        return [torch.stack(leaf) for leaf in zip(*each, strict=True)]
