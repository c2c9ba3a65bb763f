"""mlvision: multi-label image classification with labels that live in space."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlvision.run import LoadedRun, load_run

__all__ = ["LoadedRun", "load_run"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import mlvision.types` does not import every room.
    if name in __all__:
        from mlvision import run

        return getattr(run, name)
    raise AttributeError(f"module 'mlvision' has no attribute '{name}'")
