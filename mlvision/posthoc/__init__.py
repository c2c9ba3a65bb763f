"""Post-hoc steps: what is fitted on predictions of the validation images and applied to those of others, and its options.

A new one is a file and a line here.
"""

from mlvision.posthoc.base import Chain, FittedOn, PosthocConfig, Step, fit_chain, load_chain
from mlvision.posthoc.thresholds import ThresholdsConfig

POSTHOC: dict[str, type[PosthocConfig]] = {
    "thresholds": ThresholdsConfig,
}
PosthocConfig.choices = POSTHOC

__all__ = [
    "POSTHOC",
    "Chain",
    "FittedOn",
    "PosthocConfig",
    "Step",
    "ThresholdsConfig",
    "fit_chain",
    "load_chain",
]
