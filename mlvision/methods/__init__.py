"""Training methods: one file a paper."""

from collections.abc import Callable

from mlvision.methods.base import Method, MethodConfig
from mlvision.methods.baseline import Baseline, BaselineConfig
from mlvision.methods.patchct import PatchCT, PatchCTConfig
from mlvision.methods.relabel import Relabel, RelabelConfig
from mlvision.methods.token_labeling import TokenLabeling, TokenLabelingConfig

METHODS: dict[str, tuple[type[MethodConfig], Callable[..., Method]]] = {
    "baseline": (BaselineConfig, Baseline),
    "patchct": (PatchCTConfig, PatchCT),
    "relabel": (RelabelConfig, Relabel),
    "token_labeling": (TokenLabelingConfig, TokenLabeling),
}
MethodConfig.choices = {name: config for name, (config, _) in METHODS.items()}

__all__ = [
    "METHODS",
    "Baseline",
    "BaselineConfig",
    "Method",
    "MethodConfig",
    "PatchCT",
    "PatchCTConfig",
    "Relabel",
    "RelabelConfig",
    "TokenLabeling",
    "TokenLabelingConfig",
]
