"""Explanations from the attention weights of a ViT: rollout, and the relevance of attention to each label.

Both follow one row, that of the tokens which the head reads, from the last block to the first: the product of the blocks'
matrices is never made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlvision.errors import InputError
from mlvision.explain.selection import Selection
from mlvision.explain.subject import Subject, gradients
from mlvision.models import Backbone

_CHUNK_BYTES = 1 << 29  # of attention weights, or of gradients of them, at once

Weights = Float[Tensor, "b heads N N"]  # rows: who asks; they sum to 1


@dataclass(frozen=True)
class AttentionRollout:
    """How much of each patch reaches the head, if attention and shortcuts mix tokens half and half.

    One map for all labels. The read-out row is the class token's (the mean of both in a distilled ViT), or the mean of the
    patches' where these are averaged.

    Source: Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, section 3: mean over the heads, plus
    the identity, rows that sum to 1, the product over the blocks.
    """

    label_specific = False

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L h w"]:
        vit = _Vit(subject, pixels)
        rows = []
        with torch.no_grad():
            for part in vit.parts(pixels):
                _, weights = vit.run(pixels[part])
                row = vit.read_out.expand(len(weights[0]), 1, -1)
                with torch.autocast(pixels.device.type, enabled=False):
                    for attention in reversed(weights):
                        row = (row @ attention.float().mean(1) + row) / 2  # the rows of A + I sum to 2
                rows.append(row)
        return vit.to_map(torch.cat(rows)).expand(-1, selection.labels.shape[1], -1, -1)


@dataclass(frozen=True)
class AttentionRelevance:
    """How much of each patch reaches the head by the attention that speaks for a label.

    What speaks against the label is cut off in every block, so a contrast is not the difference of two maps.

    Source: Chefer et al., "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
    Transformers", ICCV 2021, eq. 5-6, for self-attention.

    DEVIATION: the identity that the relevance starts from is taken off. It is 0 at the patches where the head reads a class
    token, and the same at all where it averages them.
    """

    label_specific = True

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L h w"]:
        vit = _Vit(subject, pixels)
        rows = []
        for part in vit.parts(pixels):
            with torch.enable_grad():
                logits, weights = vit.run(pixels[part])
            directions = selection.rows(part).directions(logits.shape[1]).transpose(0, 1).to(logits)
            size = sum(w.numel() for w in weights) * 4
            found = []
            for some in directions.split(max(1, _CHUNK_BYTES // size)):
                slopes = gradients(logits, weights, some)
                gained = torch.zeros(len(some), len(logits), 1, len(vit.read_out), device=pixels.device)
                with torch.autocast(pixels.device.type, enabled=False):
                    for attention, gradient in zip(reversed(weights), reversed(slopes), strict=True):
                        speaks = (gradient.float() * attention.detach().float()).clamp(min=0).mean(2)
                        gained = gained + (vit.read_out + gained) @ speaks
                found.append(gained.squeeze(2))
            rows.append(torch.cat(found).transpose(0, 1))
        return vit.to_map(torch.cat(rows))


class _Vit:
    """A ViT whose attention weights can be read.

    Attributes:
        read_out: `[N]`: the weight with which the head reads each token.
    """

    def __init__(self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"]):
        """Raises: InputError: the model has no attention of all tokens to all in a plain row of blocks."""
        self._subject = subject
        if subject.backbone is None:
            raise InputError(f"attention: its weights cannot be found: {subject.lacks}")
        self._backbone = subject.backbone
        self._name = self._backbone.model.pretrained_cfg["architecture"]
        self._attentions = self._find()
        self._grid = self._backbone.grid_at((pixels.shape[2], pixels.shape[3]))
        self._num_tokens = self._backbone.num_prefix_tokens + self._grid[0] * self._grid[1]
        self.read_out = _read_out(self._backbone, self._num_tokens, self._name).to(subject.device)

    def _find(self) -> list[nn.Module]:
        blocks = getattr(self._backbone.model, "blocks", None)
        if not self._backbone.has_tokens or not isinstance(blocks, nn.Sequential | nn.ModuleList):
            raise InputError(
                f"attention: {self._name} is no plain ViT: it has no blocks in which all tokens attend to all, not to a "
                "window (take grad_cam or occlusion)"
            )
        found = []
        for number, block in enumerate(blocks):
            inside = [m for m in block.modules() if hasattr(m, "fused_attn")]
            if len(inside) != 1 or not isinstance(getattr(inside[0], "attn_drop", None), nn.Module):
                raise InputError(
                    f"attention: blocks.{number} of {self._name} has {len(inside)} attention layers whose weights can be "
                    "read; expected one"
                )
            found.append(inside[0])
        return found

    def parts(self, pixels: Float[Tensor, "B in_chans H W"]) -> Iterator[slice]:
        """A few images at a time: the weights of all blocks are kept."""
        heads = sum(int(getattr(attention, "num_heads", 1)) for attention in self._attentions)
        step = max(1, _CHUNK_BYTES // (heads * self._num_tokens**2 * 4))
        return (slice(start, start + step) for start in range(0, len(pixels), step))

    def run(self, pixels: Float[Tensor, "b in_chans H W"]) -> tuple[Float[Tensor, "b C"], list[Tensor]]:
        """Logits, and each block's attention weights; the graph begins at those of the first block."""
        weights: list[Tensor] = []

        def keep(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
            if not weights and torch.is_grad_enabled():
                output = output.detach().requires_grad_()
            weights.append(output)
            return output

        with _unfused(self._attentions):
            handles = [attention.attn_drop.register_forward_hook(keep) for attention in self._attentions]  # pyright: ignore
            try:
                logits = self._subject.logits(pixels)
            finally:
                for handle in handles:
                    handle.remove()
        shapes = {tuple(w.shape) for w in weights}
        expected = {(len(pixels), int(getattr(a, "num_heads", 0)), *(self._num_tokens,) * 2) for a in self._attentions}
        if len(weights) != len(self._attentions) or shapes != expected:
            raise InputError(
                f"attention: the blocks of {self._name} gave weights of {sorted(shapes)}, expected {sorted(expected)}: "
                "images, heads, tokens, tokens"
            )
        return logits, weights

    def to_map(self, rows: Float[Tensor, "B L N"]) -> Float[Tensor, "B L h w"]:
        """What of a row belongs to the patches."""
        return rows[..., self._backbone.num_prefix_tokens :].unflatten(-1, self._grid)


def _read_out(backbone: Backbone, num_tokens: int, name: str) -> Float[Tensor, " N"]:
    model, num_prefix = backbone.model, backbone.num_prefix_tokens
    pool = getattr(model, "global_pool", "")
    row = torch.zeros(num_tokens)
    if hasattr(model, "head_dist"):
        row[:2] = 0.5  # class and distillation token
    elif pool in ("token", "") and num_prefix:
        row[0] = 1
    elif pool == "avg":
        first = 0 if getattr(model, "pool_include_prefix", False) else num_prefix
        row[first:] = 1 / (num_tokens - first)
    else:
        raise InputError(
            f"attention: {name} pools its tokens by '{pool}'; which of them the head reads is known for a class token and "
            "for 'avg' alone"
        )
    return row


@contextmanager
def _unfused(attentions: list[nn.Module]) -> Iterator[None]:
    """timm's fused attention never has its weights in memory."""
    before = [attention.fused_attn for attention in attentions]
    try:
        for attention in attentions:
            attention.fused_attn = False  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for attention, fused in zip(attentions, before, strict=True):
            attention.fused_attn = fused
