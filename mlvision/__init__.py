"""mlvision: multi-label image classification with labels that live in space."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlvision.runs import LoadedRun, load_run

__all__ = ["LoadedRun", "load_run"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import mlvision.types` does not import every room.
    if name in __all__:
        from mlvision import runs

        return getattr(runs, name)
    raise AttributeError(f"module 'mlvision' has no attribute '{name}'")
