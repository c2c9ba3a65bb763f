"""What is explained, and how it is left as it was found."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mlvision.errors import InputError
from mlvision.models import Classifier, Preprocessing
from mlvision.models.dense import take_apart
from mlvision.types import Features


class Subject:
    """A model as the explainers see it: images in [0, 1] to logits, and where there is one its backbone and head.

    Attributes:
        module: all that the answer depends on; `explain` leaves its mode, gradients, hooks and requires_grad as they are.
        classifier: backbone and head; None for a network that is neither a method nor a timm model.
    """

    def __init__(self, model: nn.Module):
        """Take a method (anything with `classifier`, `mean`, `std` and `predict`), a timm classifier, or any network that
        gives logits `[B, C]` for images in [0, 1].
        """
        self.classifier: Classifier | None = None
        self._predict: Any = getattr(model, "predict", model)
        self.module = model
        self._kept: tuple[Tensor, Tensor] | None = None
        if isinstance(getattr(model, "classifier", None), Classifier) and hasattr(model, "predict"):
            self.classifier = model.classifier  # pyright: ignore[reportAttributeAccessIssue]
            self._normalise: Any = model.normalise
        elif hasattr(model, "pretrained_cfg") and hasattr(model, "forward_head"):
            try:
                with torch.random.fork_rng([]):  # a new head is drawn before it takes over the model's own weights
                    self.classifier = take_apart(model, getattr(getattr(model, "patch_embed", None), "img_size", None))
            except InputError:  # no spatial map, or no linear head: methods that need neither will do
                self.classifier = None
            preprocessing = Preprocessing.of(model)
            like = next(model.parameters())
            mean, std = (like.new_tensor(v).view(1, -1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
            self._normalise = lambda pixels: (pixels - mean) / std
            classifier = self.classifier
            self._predict = lambda pixels: (
                model(self._normalise(pixels)) if classifier is None else classifier(self._normalise(pixels)).logits
            )

    @property
    def device(self) -> torch.device:
        parameter = next(self.module.parameters(), None)
        return parameter.device if parameter is not None else torch.device("cpu")

    def pixels(self, images: Shaped[Tensor, "B in_chans H W"]) -> Float[Tensor, "B in_chans H W"]:
        """uint8, or float in [0, 1], as float in [0, 1] on the model's device; channels last, faster for most convolutions.

        Raises:
            InputError: floats beyond [0, 1].
        """
        images = images.to(self.device)
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif images.numel() and not (float(images.min()) >= 0 and float(images.max()) <= 1):
            raise InputError(
                f"images: expected uint8, or float in [0, 1], got {images.dtype} from {float(images.min()):.3g} to "
                f"{float(images.max()):.3g}; the model normalises them itself"
            )
        return images.float().contiguous(memory_format=torch.channels_last)

    def logits(self, pixels: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B C"]:
        """The model's answer, in at least float32; differentiable."""
        logits = self._predict(pixels)
        if logits.ndim != 2:
            raise InputError(f"model: expected logits [B, C], got {tuple(logits.shape)}")
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

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
        return self._normalise(pixels)

    def logits_of(self, features: Features) -> Float[Tensor, "B C"]:
        """What the head says of a backbone's features, in at least float32."""
        assert self.classifier is not None
        logits = self.classifier.head(features).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def copy(self) -> "Subject":
        """The same model, of which nothing is shared: for methods that change modules."""
        return Subject(copy.deepcopy(self.module))


@contextmanager
def undisturbed(module: nn.Module, seed: int = 0) -> Iterator[None]:
    """Eval mode, no parameter that requires gradients, and random numbers from `seed`; all as before afterwards.

    Only gradients with respect to inputs and activations may be asked for inside, so no `.grad` is touched.
    """
    modes = [(part, part.training) for part in module.modules()]
    wanted = [(p, p.requires_grad) for p in module.parameters()]
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
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
    """The gradients of some scores with respect to each leaf, `[l, ...]`: at once, where every operation can be batched."""
    try:
        return list(torch.autograd.grad(logits, leaves, directions, retain_graph=True, is_grads_batched=True))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # An operation without a batching rule.
        each = [torch.autograd.grad(logits, leaves, one, retain_graph=True) for one in directions]
        return [torch.stack(leaf) for leaf in zip(*each, strict=True)]
