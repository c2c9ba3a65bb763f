"""Training methods: one file a paper."""

from mlvision.methods.base import Method, MethodConfig
from mlvision.methods.baseline import Baseline, BaselineConfig
from mlvision.methods.patchct import PatchCT, PatchCTConfig
from mlvision.methods.relabel import Relabel, RelabelConfig
from mlvision.methods.token_labeling import TokenLabeling, TokenLabelingConfig

METHODS: dict[str, type[MethodConfig]] = {
    "baseline": BaselineConfig,
    "patchct": PatchCTConfig,
    "relabel": RelabelConfig,
    "token_labeling": TokenLabelingConfig,
}
MethodConfig.choices = METHODS

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
