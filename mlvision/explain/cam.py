"""Class activation maps of all labels from one forward pass: Grad-CAM, HiResCAM, LayerCAM, Grad-CAM++.

The target layer's output is cut out of the graph: what comes before it runs without one, and only the rest of the network
(the tail) is differentiated, for all labels at once. Where the tail is mean pooling and a linear layer, its gradient is that
layer's weight and nothing is differentiated.

Source: Selvaraju et al., "Grad-CAM", ICCV 2017, eq. 1-2; Chattopadhay et al., "Grad-CAM++", WACV 2018, eq. 10-15 (its
exponential score: second and third derivatives are powers of the first); Jiang et al., "LayerCAM", TIP 2021, eq. 6-7;
Draelos & Carin, "Use HiResCAM instead of Grad-CAM", arXiv 2011.08891.

DEVIATION: maps keep their sign; the papers' final ReLU is left to the display, so that evidence against a label shows too.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated

import torch
from jaxtyping import Float
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mlvision.errors import InputError
from mlvision.explain.selection import Selection
from mlvision.explain.subject import Subject, gradients
from mlvision.models import Backbone, LinearHead
from mlvision.models.backbone import embed_patches, is_plain_vit

_CHUNK_BYTES = 1 << 29  # of gradients at once

# Layers of torch whose output is [B, C, h, w] by definition.
_LAYERS_OF_MAPS = (
    *(nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)

Activations = Float[Tensor, "B D h w"]
# Of each label; [B, L, D, 1, 1] where it is the same everywhere.
Gradients = Float[Tensor, "B L D gh gw"]


@dataclass(frozen=True)
class GradCam:
    """Channels weighted by their mean gradient."""

    layer: Annotated[
        str,
        "module of the timm model (or network) whose output is mapped; empty: the map that the head pools, or the last "
        "block's norm1 where the head reads a class token",
    ] = ""
    label_specific = True

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L h w"]:
        activations, gradients = differentiate(subject, pixels, selection, self.layer)
        with torch.autocast(pixels.device.type, enabled=False):
            return self._combine(activations.float(), gradients.float())

    def _combine(self, activations: Activations, gradients: Gradients) -> Float[Tensor, "B L h w"]:
        return torch.einsum("bldxy,bdhw->blhw", _mean(gradients), activations)


@dataclass(frozen=True)
class HiResCam(GradCam):
    """Each channel of each cell times its own gradient: what the cell adds to the score where the tail is linear."""

    def _combine(self, activations: Activations, gradients: Gradients) -> Float[Tensor, "B L h w"]:
        return _weighted(gradients, activations)


@dataclass(frozen=True)
class LayerCam(GradCam):
    """Each channel of each cell times the positive part of its gradient."""

    def _combine(self, activations: Activations, gradients: Gradients) -> Float[Tensor, "B L h w"]:
        return _weighted(gradients.clamp(min=0), activations)


@dataclass(frozen=True)
class GradCamPlusPlus(GradCam):
    """Channels weighted by the positive part of their gradients, in cells weighted by eq. 19 of the paper.

    DEVIATION: of a channel's activations only the positive ones count in the weights. The paper's maps come out of a ReLU
    and have no others; at a linear bottleneck or a LayerNorm the negative ones would take the denominator through 0. A
    cell's weight is between 0 and 1/2 of its gradient.
    """

    def _combine(self, activations: Activations, gradients: Gradients) -> Float[Tensor, "B L h w"]:
        total = activations.clamp(min=0).sum((2, 3))[:, None, :, None, None]
        squares = gradients.square()
        below = 2 * squares + total * squares * gradients
        weights = squares / below.where(below != 0, 1) * gradients.clamp(min=0)
        cells = activations.shape[2] * activations.shape[3]
        return torch.einsum("bldxy,bdhw->blhw", _mean(weights) * cells, activations)


def _mean(gradients: Gradients) -> Float[Tensor, "B L D 1 1"]:
    return gradients.mean((3, 4), keepdim=True)


def _weighted(gradients: Gradients, activations: Activations) -> Float[Tensor, "B L h w"]:
    if gradients.shape[-2:] == (1, 1):
        return torch.einsum("bldxy,bdhw->blhw", gradients, activations)
    return torch.einsum("bldhw,bdhw->blhw", gradients, activations)


def differentiate(
    subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection, layer: str
) -> tuple[Activations, Gradients]:
    """A layer's output, and the gradient of each selected score with respect to it.

    Raises:
        InputError: no such layer, one whose output is no map, or one on which no score depends.
    """
    if layer:
        return _at_module(subject, pixels, selection, layer)
    if subject.backbone is None:
        raise InputError(f"layer: {subject.lacks}; name the module whose output is to be mapped")
    backbone = subject.backbone
    if _reads_class_token(backbone):
        if _has_plain_last_block(backbone):
            return _at_last_block(subject, backbone, pixels, selection)
        return _at_module(subject, pixels, selection, _norm_before_last_attention(backbone))
    return _at_pooling(subject, backbone, pixels, selection)


def _at_pooling(
    subject: Subject, backbone: Backbone, pixels: Tensor, selection: Selection
) -> tuple[Activations, Gradients]:
    """At the map that the head's input is pooled from."""
    cells, prefix = subject.pooled_map(pixels), None
    if cells is None or backbone.num_prefix_tokens:
        with torch.no_grad():
            cells, prefix = backbone.to_cells(backbone.model.forward_features(subject.normalise(pixels)), _size(pixels))

    def tail(activations: Tensor, rows: slice = slice(None)) -> Tensor:
        joined = backbone.from_cells(activations, None if prefix is None else prefix[rows])
        return subject.read(joined, activations)

    closed = _closed_form(subject, cells, selection)
    if closed is not None:  # compared with autograd on one label of one image
        image, place = selection.valid.nonzero()[:1].unbind(1)
        row, one = slice(int(image), int(image) + 1), selection.each(image, place)
        with torch.autocast(pixels.device.type, enabled=False):
            exact = _gradients(lambda a: tail(a, row), cells[row].to(subject.dtype), one)
        found = closed[image, place][:, None].expand_as(exact)
        if torch.allclose(found, exact.to(found), rtol=1e-3, atol=1e-5 * float(exact.abs().max())):
            return cells, closed
    return cells, _checked(_gradients(tail, cells, selection), "the pooled map")


def _closed_form(subject: Subject, cells: Activations, selection: Selection) -> Gradients | None:
    """The gradients where pooling is a mean and the head linear; None for other heads and widths."""
    head = None if subject.classifier is None else subject.classifier.head
    if not isinstance(head, LinearHead) or head.linear.in_features != cells.shape[1]:
        return None
    weight = head.linear.weight.detach()
    mean = selection.scores(weight.T.expand(len(cells), -1, -1)).mT / (cells.shape[2] * cells.shape[3])
    return mean[..., None, None]


def _at_module(subject: Subject, pixels: Tensor, selection: Selection, layer: str) -> tuple[Activations, Gradients]:
    """At the output of any module, which a hook replaces by a leaf of the graph."""
    module = _find(subject, layer)
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise InputError(f"layer: {layer} gives a {type(output).__name__}, expected one tensor of floats")
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # a copy, for what follows may write in place

    handle = module.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits = subject.logits(pixels)
    finally:
        handle.remove()
    if len(leaves) != 1:
        raise InputError(f"layer: {layer} runs {len(leaves)} times in one pass; expected a module that is used once")
    if not logits.requires_grad:
        raise InputError(
            f"layer: no score depends on {layer}, or the model's forward pass runs under torch.no_grad, or detaches what "
            "it passes on"
        )
    to_map = _reader(subject, layer, leaves[0], pixels)
    found = _vjp(logits, leaves[0], selection)
    maps = to_map(found.flatten(0, 1)).unflatten(0, found.shape[:2])
    return to_map(leaves[0].detach()), _checked(maps, layer)


def _find(subject: Subject, layer: str) -> nn.Module:
    root = subject.backbone.model if subject.backbone else subject.module
    modules = dict(root.named_modules())
    if layer not in modules or not layer:
        near = get_close_matches(layer, list(modules), n=3, cutoff=0.3)
        raise InputError(f"layer: no module '{layer}'; nearest: {', '.join(near) or ', '.join(list(modules)[1:6])}")
    return modules[layer]


def _size(pixels: Float[Tensor, "B in_chans H W"]) -> tuple[int, int]:
    return pixels.shape[2], pixels.shape[3]


def _reader(subject: Subject, layer: str, output: Tensor, pixels: Tensor) -> Callable[[Tensor], Activations]:
    """How a layer's output is read as maps `[B, D, h, w]`.

    Raises:
        InputError: it is no map of each image, or which of its axes are rows and columns cannot be told.
    """
    shape, backbone = tuple(output.shape), subject.backbone
    if len(output) != len(pixels):
        raise InputError(
            f"layer: {layer} gives {len(output)} rows for {len(pixels)} images, {shape}; expected a map of each"
        )
    if output.ndim == 4:
        axes = _axes(subject, layer, output, pixels)
        if axes is not None:
            return lambda x: x.permute(0, *axes)
        raise InputError(
            f"layer: the output of {layer}, {shape}, is no map, or its rows and columns cannot be told: no axis grows with "
            "the image's height only and another with its width; name a layer around it, or a convolution"
        )
    if output.ndim == 3 and backbone is not None and backbone.has_tokens:
        (height, width), prefix = backbone.grid_at(_size(pixels)), backbone.num_prefix_tokens
        for before in (prefix, 0):  # the patches have no class token yet when they are embedded
            if shape[1] == height * width + before != shape[2]:
                return lambda x: x[:, before:].mT.unflatten(2, (height, width))
    raise InputError(f"layer: the output of {layer}, {shape}, is no map and no grid of the model's tokens")


class _Reached(Exception):  # noqa: N818
    """A forward pass has come to the layer whose output's shape is looked for."""


def _axes(subject: Subject, layer: str, output: Tensor, pixels: Tensor) -> tuple[int, int, int] | None:
    """Which axes of an output `[B, ., ., .]` are channels, rows and columns; None where it is no map.

    Measured on a blank image of twice the height, and on one of twice the width: no shape says by itself whether channels
    come first or last, or whether these are maps at all and not each token's attention to each.
    """
    module, (height, width) = _find(subject, layer), _size(pixels)
    shapes = [_shape_at(subject, module, pixels, size) for size in ((2 * height, width), (height, 2 * width))]
    grown = [[axis for axis in (1, 2, 3) if s[axis] != output.shape[axis]] for s in shapes if s and len(s) == 4]
    if len(grown) == 2 and len(grown[0]) == len(grown[1]) == 1 and grown[0] != grown[1]:
        (rows,), (columns,) = grown
        return 6 - rows - columns, rows, columns
    if not any(grown) and isinstance(module, _LAYERS_OF_MAPS):  # images of one size, or a grid that is always the same
        return 1, 2, 3
    return None


def _shape_at(subject: Subject, module: nn.Module, pixels: Tensor, size: tuple[int, int]) -> tuple[int, ...] | None:
    """The shape of a module's output for images of another size; None where the network takes none of that size."""
    blank, backbone = pixels.new_zeros(1, pixels.shape[1], *size), subject.backbone
    try:
        return _shape_of(module, lambda: subject.logits(blank))
    except (AssertionError, RuntimeError, ValueError, IndexError, TypeError):
        name = next((n for n, m in backbone.model.named_modules() if m is module), None) if backbone else None
        if backbone is None or name is None or not hasattr(backbone.model, "set_input_size"):
            return None
    resized = copy.deepcopy(backbone.model)  # built for one size: timm can make it one for another
    try:
        resized.set_input_size(size)
        return _shape_of(resized.get_submodule(name), lambda: resized.forward_features(subject.normalise(blank)))
    except (AssertionError, RuntimeError, ValueError, IndexError, TypeError):
        return None


def _shape_of(module: nn.Module, run: Callable[[], object]) -> tuple[int, ...] | None:
    """The shape of what a module gives when something is run, which ends there; None where it is not reached."""

    def reached(_: nn.Module, __: tuple, output: Tensor) -> None:
        raise _Reached(tuple(output.shape))

    handle = module.register_forward_hook(reached)
    try:
        with torch.no_grad():
            run()
    except _Reached as found:
        return found.args[0]
    finally:
        handle.remove()
    return None


def _reads_class_token(backbone: Backbone) -> bool:
    return backbone.has_tokens and getattr(backbone.model, "global_pool", "") in ("token", "")


def _norm_before_last_attention(backbone: Backbone) -> str:
    blocks = getattr(backbone.model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not hasattr(blocks[-1], "norm1"):
        raise InputError(
            "layer: this model reads a class token, and no blocks.<last>.norm1 was found; name a layer before it"
        )
    return f"blocks.{len(blocks) - 1}.norm1"


def _has_plain_last_block(backbone: Backbone) -> bool:
    model = backbone.model
    last = model.blocks[-1] if is_plain_vit(model) else None
    return type(last) is Block and type(last.attn) is Attention


def _at_last_block(
    subject: Subject, backbone: Backbone, pixels: Tensor, selection: Selection
) -> tuple[Activations, Gradients]:
    """At norm1 of a ViT's last block, of whose queries only the prefix tokens' are run: the head reads no other."""
    model, num_prefix = backbone.model, backbone.num_prefix_tokens
    block: Block = model.blocks[-1]
    attention: Attention = block.attn  # pyright: ignore[reportAssignmentType]
    with torch.no_grad():
        tokens = model.blocks[:-1](embed_patches(model, subject.normalise(pixels)))
        cells, prefix = backbone.to_cells(block.norm1(tokens), _size(pixels))
        before = tokens[:, :num_prefix]

    def tail(activations: Tensor) -> Tensor:
        normed = backbone.from_cells(activations, prefix)
        read = normed[:, :num_prefix]
        heads = (attention.num_heads, attention.head_dim)
        q, k, v = (
            nn.functional.linear(x, weight, bias).unflatten(2, heads).transpose(1, 2)
            for x, weight, bias in zip(
                (read, normed, normed),
                attention.qkv.weight.chunk(3),
                (None,) * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3),
                strict=True,
            )
        )
        scores = (attention.q_norm(q) * attention.scale) @ attention.k_norm(k).mT
        mixed = attention.norm((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        gate = getattr(attention, "gate", None)  # not in the oldest timm that is allowed
        if gate is not None:
            mixed = mixed * gate(read).sigmoid()
        x = before + block.ls1(attention.proj(mixed))
        x = model.norm(x + block.ls2(block.mlp(block.norm2(x))))
        return subject.read(x, activations)

    return cells, _checked(_gradients(tail, cells, selection), f"blocks.{len(model.blocks) - 1}.norm1")


def _gradients(tail: Callable[[Tensor], Tensor], activations: Activations, selection: Selection) -> Gradients:
    with torch.enable_grad():
        leaf = activations.detach().requires_grad_()
        logits = tail(leaf)
    return _vjp(logits, leaf, selection)


def _vjp(logits: Float[Tensor, "B C"], leaf: Tensor, selection: Selection) -> Float[Tensor, "B L ..."]:
    """The gradient of each selected score; images do not mix in eval mode, so one pass serves a label of each."""
    directions = selection.directions(logits.shape[1]).transpose(0, 1).to(logits)
    chunk = max(1, _CHUNK_BYTES // (leaf.numel() * 4))
    return torch.cat([gradients(logits, [leaf], part)[0] for part in directions.split(chunk)]).transpose(0, 1)


def _checked(found: Gradients, layer: str) -> Gradients:
    if not bool((found != 0).any()):
        raise InputError(
            f"layer: the gradient of every score at {layer} is zero: the head does not read its cells. Take an earlier "
            "layer, in a class-token ViT blocks.<last>.norm1"
        )
    return found
