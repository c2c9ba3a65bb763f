"""Versions of saved options: one function a step turns the options of an older version into those of the next.

Every saved config.yaml and record holds its `config_version`; those of version 1 do not say so. A change that renames, moves
or drops an option of a run adds a step here.
"""

import copy
from typing import Any

from mlvision.errors import InputError, shown


def _drop_evaluation(config: dict[str, Any]) -> None:
    """`bootstrap` and `data.split` became options of eval.py, which a run does not have."""
    config.pop("bootstrap", None)
    config.get("data", {}).pop("split", None)


def _nest_losses(config: dict[str, Any]) -> None:
    """`method.loss` became a group that holds the options of the chosen loss; those of all losses stood in the methods."""
    method = config.get("method", {})
    losses = {"asl": ("gamma_neg", "gamma_pos", "clip"), "focal": ("gamma",), "soft_top_k": ("k", "alpha")}
    name = method.get("name", "baseline")
    if name == "token_labeling":
        return
    if name != "baseline":  # the alpha of patchct is no option of its loss
        losses = {"asl": losses["asl"]}
    stood = {key: method.pop(key) for keys in losses.values() for key in keys if key in method}
    loss = method.get("loss", "asl" if name == "patchct" else "bce")
    method["loss"] = {"name": loss, **{key: stood[key] for key in losses.get(loss, ()) if key in stood}}


def _list_edits(config: dict[str, Any]) -> None:
    """`data.known_labels` and `data.known_seed` became an edit of `data.edits`, which changed the training images only."""
    data = config.get("data", {})
    share, seed = data.pop("known_labels", 1.0), data.pop("known_seed", 0)
    data["edits"] = []
    if float(share) != 1:
        data |= {"edits": [{"name": "known_labels", "share": share, "seed": seed}], "val_labels": "full"}


STEPS = (_drop_evaluation, _nest_losses, _list_edits)  # step i makes version i + 2 of version i + 1
CONFIG_VERSION = len(STEPS) + 1


def upgrade(config: Any, source: str) -> dict[str, Any]:
    """Saved options of a run as this version names them; those of this version as they are.

    Args:
        config: nested plain data, as read from YAML or JSON; it is not changed.
        source: the file that holds them, for messages.

    Raises:
        InputError: a newer version, or options that cannot be upgraded.
    """
    if not isinstance(config, dict):
        raise InputError(f"{source}: expected the options of a run, got {shown(config)}")
    version, config = read_version(config, source), copy.deepcopy(config)
    for step in STEPS[version - 1 :]:
        try:
            step(config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source}: cannot be upgraded from config_version {version} ({error!r})") from error
    config.pop("config_version", None)
    return {"config_version": CONFIG_VERSION, **config}


def read_version(values: dict[str, Any], source: str) -> int:
    """The `config_version` of what was saved, from 1 to that of today.

    Raises:
        InputError: no number, or that of a newer version.
    """
    written = values.get("config_version", 1)
    digits = str(written) if isinstance(written, str | int) else ""
    if not (digits.isascii() and digits.isdigit() and 1 <= len(digits) < 10 and int(digits)):
        raise InputError(
            f"{source}: config_version: expected a number from 1 to {CONFIG_VERSION}, got {shown(written)}"
        )
    version = int(digits)
    if version > CONFIG_VERSION:
        raise InputError(
            f"{source}: its config_version {version} is of a newer mlvision; this one reads versions up to {CONFIG_VERSION}"
        )
    return version
