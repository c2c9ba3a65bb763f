"""Training methods: one file a paper."""

from collections.abc import Callable

from mlvision.methods.base import Method, MethodConfig
from mlvision.methods.baseline import Baseline, BaselineConfig

METHODS: dict[str, tuple[type[MethodConfig], Callable[..., Method]]] = {"baseline": (BaselineConfig, Baseline)}

__all__ = ["METHODS", "Baseline", "BaselineConfig", "Method", "MethodConfig"]
