"""Heads: features in, one logit per class out. One file per head, one line per head in HEADS."""

from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mlvision.errors import InputError
from mlvision.models.heads.base import Head, HeadConfig, JointHead
from mlvision.models.heads.cosine import CosineHead, CosineHeadConfig
from mlvision.models.heads.csra import CsraHead, CsraHeadConfig
from mlvision.models.heads.linear import LinearHead, LinearHeadConfig
from mlvision.models.heads.ml_decoder import MLDecoderHead, MLDecoderHeadConfig
from mlvision.models.heads.query2label import Query2LabelHead, Query2LabelHeadConfig
from mlvision.models.heads.text import TextHead, TextHeadConfig

HEADS: dict[str, type[HeadConfig]] = {
    "linear": LinearHeadConfig,
    "cosine": CosineHeadConfig,
    "csra": CsraHeadConfig,
    "ml_decoder": MLDecoderHeadConfig,
    "query2label": Query2LabelHeadConfig,
    "text": TextHeadConfig,
}
HeadConfig.choices = HEADS


def build_head(
    config: HeadConfig | str,
    in_features: int,
    num_classes: int,
    *,
    map_features: int | None = None,
    label_embeddings: Float[Tensor, "C D"] | None = None,
    **options: Any,
) -> Head:
    """Build a head from its config, or from its name in HEADS and the fields of its config.

    >>> import torch
    >>> from mlvision.types import Features
    >>> head = build_head("csra", 512, 20, lam=0.4)
    >>> head(Features(torch.rand(2, 512, 3, 5), torch.rand(2, 512))).maps.shape
    torch.Size([2, 20, 3, 5])

    Args:
        config: a head's config, or a key of HEADS.
        in_features: width of the pooled features: a backbone's `num_features`.
        num_classes: C.
        map_features: width of the map: a backbone's `map_features`; as in_features where not given.
        label_embeddings: of the classes' names (`models/text.py`), for heads that compare with them.
        **options: fields of the config.

    Raises:
        InputError: an unknown name, an option outside its range, or no embeddings for a head that needs them.
    """
    if isinstance(config, str):
        if config not in HEADS:
            raise InputError(f"head.name: expected one of {', '.join(HEADS)}, got '{config}'")
        config = HEADS[config](**options)
    elif options:
        config = replace(config, **options)
    assets = {} if label_embeddings is None else {"label_embeddings": label_embeddings}
    return config.build(in_features, num_classes, map_features, assets)


__all__ = [
    "HEADS",
    "CosineHead",
    "CosineHeadConfig",
    "CsraHead",
    "CsraHeadConfig",
    "Head",
    "HeadConfig",
    "JointHead",
    "LinearHead",
    "LinearHeadConfig",
    "MLDecoderHead",
    "MLDecoderHeadConfig",
    "Query2LabelHead",
    "Query2LabelHeadConfig",
    "TextHead",
    "TextHeadConfig",
    "build_head",
]
