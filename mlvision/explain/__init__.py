"""Explainers: where in an image a model found its labels. A new one is a file and a line in EXPLAINERS."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mlvision.errors import InputError
from mlvision.explain.attention import AttentionRelevance, AttentionRollout
from mlvision.explain.cam import GradCam, GradCamPlusPlus, HiResCam, LayerCam
from mlvision.explain.controls import CentreMap, EdgeMap, RandomMap
from mlvision.explain.explanation import Explainer, Explanation, MapProducer
from mlvision.explain.gradient import (
    DeepLift,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    Saliency,
    SmoothGrad,
)
from mlvision.explain.perturb import CoarseToFine, KernelShap, Lime, Occlusion, Rise
from mlvision.explain.producers import DenseHead, OwnMaps, StoredMaps
from mlvision.explain.selection import EmptySelectionError, Labels, Selection, select
from mlvision.explain.subject import Subject, check_batch, undisturbed
from mlvision.label_maps.geometry import whole_images
from mlvision.options import build_options

EXPLAINERS: dict[str, type[Explainer] | type[MapProducer]] = {
    "grad_cam": GradCam,
    "hires_cam": HiResCam,
    "layer_cam": LayerCam,
    "grad_cam_pp": GradCamPlusPlus,
    "occlusion": Occlusion,
    "coarse_to_fine": CoarseToFine,
    "lime": Lime,
    "kernel_shap": KernelShap,
    "rise": Rise,
    "saliency": Saliency,
    "input_x_gradient": InputXGradient,
    "integrated_gradients": IntegratedGradients,
    "smooth_grad": SmoothGrad,
    "guided_backprop": GuidedBackprop,
    "guided_grad_cam": GuidedGradCam,
    "deep_lift": DeepLift,
    "attention_rollout": AttentionRollout,
    "attention_relevance": AttentionRelevance,
    "dense_head": DenseHead,
    "own_maps": OwnMaps,
}
# What every table of measures holds beside the explainers.
CONTROLS: dict[str, type[Explainer]] = {
    "random": RandomMap,
    "centre": CentreMap,
    "edges": EdgeMap,
}


def build_explainer(method: Any, /, **options: Any) -> Any:
    """An explainer by its name in EXPLAINERS and the fields of its dataclass; objects pass through.

    Raises:
        InputError: an unknown name, an option that it does not have, or one of a wrong type or out of range.
    """
    if not isinstance(method, str):
        if options:
            raise InputError(
                f"method: options go with a name; {type(method).__name__} was given, and {sorted(options)}"
            )
        return method
    table = {**EXPLAINERS, **CONTROLS}
    if method not in table:
        near = difflib.get_close_matches(method, table, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"method: expected one of {', '.join(table)}, got '{method}'{hint}")
    return build_options(table[method], options, key=method)


def build_explainers(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Explainers by name, with their options.

    Raises:
        InputError: as `build_explainer`, or options of one that is not asked for.
    """
    for name in options:
        if name not in names:
            raise InputError(f"options.{name}: not one of the methods here, {', '.join(names)}")
    return {name: build_explainer(name, **options.get(name, {})) for name in names}


def explain(
    model: nn.Module | Subject,
    images: Any,
    method: Any = "grad_cam",
    labels: Labels = "all",
    indices: Int64[Tensor, " B"] | None = None,
    *,
    targets: Float[Tensor, "B C"] | None = None,
    threshold: float | Float[Tensor, " C"] = 0.5,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    allow_flat: bool = False,
    **options: Any,
) -> Explanation:
    """Explain some labels of some images.

    The model's mode, gradients, hooks and requires_grad, and the state of the random numbers, are as before, also after an
    exception. Logits are explained, never probabilities: those hardly move where a label is certain.

    Args:
        model: a method, a timm model, or any network from images in [0, 1] to logits, also within DataParallel or compiled;
            or a Subject made of one, which saves looking a timm model over again for every batch.
        images: `[B, in_chans, H, W]` uint8, or float in [0, 1].
        method: a name in EXPLAINERS, an explainer, or any object with `maps(model, images, indices) -> LabelMap`.
        labels: which labels: see `select`. All by default.
        indices: the images' rows in their manifest, which stored maps need.
        targets: 1 present, 0 absent, NaN unknown, for `labels` of ground_truth and errors.
        threshold: of the scores in [0, 1] from which a label counts as predicted; one, or one a class. See
            `LabelSpace.decide`.
        classes: the names, where labels are given by name.
        seed: of whatever the method draws at random.
        allow_flat: also give maps that are all flat; for callers that look at `Explanation.flat` themselves.
        **options: of the named method: the fields of its dataclass.

    Raises:
        InputError: images that are no batch or not for this model; labels, layers or options that do not exist; a model that
            gives no logits; a method that the model cannot carry; maps that are flat for every label of every image.
    """
    check_batch(images)
    with torch.inference_mode(False):
        subject = model if isinstance(model, Subject) else Subject(model, tuple(images.shape[1:]))
    explainer = build_explainer(method, **options)
    name = method if isinstance(method, str) else type(method).__name__
    # Also where the caller works in inference mode, whose tensors no gradient can be taken of.
    with torch.inference_mode(False), undisturbed(subject.module, seed):
        pixels = subject.pixels(images.clone() if images.is_inference() else images)
        with torch.no_grad():
            logits = subject.answer(pixels)
        if not bool(logits.isfinite().all()):
            raise InputError("model: its logits are not finite for these images; there is nothing to explain")
        space = subject.space(logits.shape[1])
        selection = select(labels, logits, targets=targets, threshold=threshold, classes=classes, space=space)
        if isinstance(explainer, Explainer):
            maps, kind = explainer.explain(subject, pixels, selection), "attribution"
        else:
            maps, kind = _produced(explainer, subject.module, images, indices, selection)
    maps = torch.where(selection.valid[:, :, None, None], maps.detach().float(), 0)
    if not bool(maps.isfinite().all()):
        raise InputError(f"{name}: its maps are not finite")
    explanation = Explanation(
        maps,
        selection.labels,
        logits.detach(),
        name,
        against=selection.against,
        label_specific=getattr(explainer, "label_specific", True),
        kind="attribution" if selection.against is not None else kind,
        groups=space.groups,
    )
    if not allow_flat and bool((explanation.flat | ~selection.valid).all()):
        height, width = maps.shape[2:]
        raise InputError(
            f"{name}: the maps ({height}x{width}) of all labels of all {len(maps)} images are flat; they explain nothing. "
            "The images may be uniform, the grid a single cell, or the model's answer constant"
        )
    return explanation


def _produced(
    producer: Any, model: nn.Module, images: Tensor, indices: Tensor | None, selection: Selection
) -> tuple[Float[Tensor, "B L h w"], str]:
    """The maps of whatever has label maps of images."""
    if not isinstance(producer, MapProducer):
        raise InputError(
            "method: expected a name, an explainer or an object with maps(model, images, indices), got "
            f"{type(producer).__name__}"
        )
    label_map = producer.maps(model, images, indices).to(selection.labels.device)
    if len(label_map.values) != len(images):
        raise InputError(f"method: {len(label_map.values)} maps for {len(images)} images")
    if label_map.extent is not None and not torch.equal(label_map.extent, whole_images(label_map.extent)):
        raise InputError("method: these maps cover a part of each image; only maps of whole images can explain it")
    maps = label_map.of_labels(selection.labels)
    if selection.against is not None:
        against = label_map.of_labels(selection.against)
        maps = maps - against * (selection.against >= 0)[:, :, None, None]
    return maps.float(), label_map.kind


__all__ = [
    "CONTROLS",
    "EXPLAINERS",
    "EmptySelectionError",
    "Explainer",
    "Explanation",
    "Labels",
    "MapProducer",
    "Selection",
    "StoredMaps",
    "Subject",
    "build_explainer",
    "build_explainers",
    "explain",
    "select",
]
