"""What a post-hoc step is: fitted on predictions of the validation images, it changes what predictions of others say."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from mlvision.errors import InputError, check_fields, shown
from mlvision.files import write_json
from mlvision.options import Selectable, build_options, to_plain
from mlvision.parts import Context
from mlvision.text_files import read_json
from mlvision.types import Predictions
from mlvision.versions import CONFIG_VERSION, read_version


class Step:
    """A fitted step. It changes the logits of predictions, or the thresholds of their scores."""

    @property
    def phrase(self) -> str:
        """What the protocol says of it. Runs that differ in their seed alone say the same, so nothing of the weights."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What was fitted, as JSON takes it: `PosthocConfig.load` makes the same step of it."""
        raise NotImplementedError

    def apply(self, predictions: Predictions) -> Predictions:
        """The changed predictions; `predictions` themselves stay as they are. Each image is changed by itself."""
        raise NotImplementedError


@dataclass(frozen=True)
class PosthocConfig(Selectable):
    """The options of a step, which each step's own class adds to. There is nothing to build: a step is fitted or loaded."""

    name: Annotated[str, "which step: a key of POSTHOC"]

    def __post_init__(self) -> None:
        check_fields(self, f"posthoc.{self.name}.")

    def fit(self, predictions: Predictions, context: Context) -> Step:
        """The step that suits these predictions best; unknown labels (NaN) are left out.

        Raises:
            InputError: predictions that it cannot be fitted on.
        """
        raise NotImplementedError

    def load(self, state: dict[str, Any], context: Context) -> Step:
        """The step that has this state.

        Raises:
            InputError: not a state of these classes.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FittedOn:
    """What a chain was fitted on, and so what it may be applied to.

    Attributes:
        role: of the images: val.
        protocol: of the images.
        num_images: their number.
        weights: raw or ema.
        step: of the training, at which the checkpoint was written.
    """

    role: str
    protocol: str
    num_images: int
    weights: str
    step: int


@dataclass(frozen=True)
class Chain:
    """Fitted steps, which are applied in their order.

    Attributes:
        configs: the options of each step.
        classes: names of the classes.
    """

    configs: tuple[PosthocConfig, ...]
    steps: tuple[Step, ...]
    classes: tuple[str, ...]
    fitted_on: FittedOn

    @property
    def names(self) -> str:
        """Of the steps, as an option takes them: `[thresholds]`."""
        return f"[{','.join(config.name for config in self.configs)}]"

    @property
    def phrase(self) -> str:
        """What the protocol says of it."""
        steps = ", ".join(step.phrase for step in self.steps)
        return f"{steps}, fitted on {self.fitted_on.num_images} validation images"

    def apply(self, predictions: Predictions) -> Predictions:
        """What the steps make of predictions, one after the other; `predictions` themselves stay as they are."""
        for step in self.steps:
            predictions = step.apply(predictions)
        return predictions

    def save(self, path: Path) -> None:
        """Write the chain as JSON, whole or not at all; the folder is made.

        Raises:
            InputError: as `whole_file`.
        """
        steps = zip(self.configs, self.steps, strict=True)
        values = {
            "config_version": CONFIG_VERSION,
            "fitted_on": asdict(self.fitted_on),
            "classes": list(self.classes),
            "steps": [{"options": to_plain(config), "state": step.state()} for config, step in steps],
        }
        path.parent.mkdir(exist_ok=True)
        write_json(path, values)


def fit_chain(
    configs: Sequence[PosthocConfig], predictions: Predictions, context: Context, fitted_on: FittedOn
) -> Chain:
    """Fit the steps in their order, each on what those before it make of the predictions.

    Raises:
        InputError: as `PosthocConfig.fit`, or predictions of other images than the validation ones.
    """
    if fitted_on.role != "val":
        raise InputError(
            f"posthoc: expected predictions of the validation images (role val) to fit on, got those of {fitted_on.role}"
        )
    classes, steps = predictions.space.classes, []
    for config in configs:
        steps.append(config.fit(predictions, context))
        predictions = steps[-1].apply(predictions)
    return Chain(tuple(configs), tuple(steps), classes, fitted_on)


def load_chain(path: Path, context: Context) -> Chain:
    """Read what `Chain.save` wrote.

    Raises:
        InputError: the file is missing, damaged or of a newer version, or the chain is of other classes.
    """
    values = read_json(str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected fitted post-hoc steps, got {shown(values)}")
    read_version(values, str(path))
    if values.get("classes") != list(context.space.classes):
        given = values.get("classes")
        fitted = f"{len(given)} classes" if isinstance(given, list) else shown(given)
        raise InputError(
            f"{path}: fitted for other classes ({fitted}, the model has {len(context.space.classes)}); expected the same "
            "names in the same order"
        )
    fitted_on, entries = _read_fitted_on(values.get("fitted_on"), path), values.get("steps")
    if not isinstance(entries, list) or not entries or not all(map(_is_entry, entries)):
        raise InputError(f"{path}: 'steps' is not as it was written; the file is damaged")
    configs = [
        build_options(PosthocConfig, entry["options"], key=f"steps.{number}", source=str(path))
        for number, entry in enumerate(entries)
    ]
    try:
        steps = [config.load(entry["state"], context) for config, entry in zip(configs, entries, strict=True)]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Chain(tuple(configs), tuple(steps), context.space.classes, fitted_on)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), dict) for key in ("options", "state"))


def _read_fitted_on(values: Any, path: Path) -> FittedOn:
    kinds = {"role": str, "protocol": str, "num_images": int, "weights": str, "step": int}
    if not isinstance(values, dict) or {key: type(value) for key, value in values.items()} != kinds:
        raise InputError(f"{path}: 'fitted_on' is not as it was written; the file is damaged")
    return FittedOn(**values)
