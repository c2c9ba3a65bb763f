"""Trained runs: loaded from their folders, ready to predict and to be evaluated on images that they have not seen."""

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from mlvision.config import Config, load_config
from mlvision.data.images import rgb_array
from mlvision.data.manifest import Manifest
from mlvision.data.views import EvalView
from mlvision.engine.checkpoint import check_classes, load_checkpoint
from mlvision.engine.fit import BEST, LAST
from mlvision.engine.precision import Precision, resolve_device, resolve_precision
from mlvision.errors import InputError, first_line
from mlvision.files import read_written
from mlvision.methods import Method
from mlvision.options import build_options, to_plain
from mlvision.parts import Context, LabelStatistics
from mlvision.posthoc import Chain, load_chain
from mlvision.runs.build import build_method, complete_view, eval_view, resolve
from mlvision.runs.folder import STATISTICS, read_images
from mlvision.runs.splits import check_images, check_same_data, read_role
from mlvision.space import LabelSpace
from mlvision.types import Predictions

_CHAIN = "chain"


@dataclass
class LoadedRun:
    """A trained run, ready to predict.

    Attributes:
        method: in eval mode, on its device.
        config: the options it was trained with.
        folder: the run folder.
        context: what its parts are built for.
        checkpoint: the file that the weights are from.
        weights: which weights these are: raw or ema.
        step: of the training, at which the checkpoint was written.
        posthoc_file: where eval.py keeps the post-hoc steps that it fits.
    """

    method: Method
    config: Config
    folder: Path
    context: Context
    precision: Precision
    view: EvalView
    checkpoint: Path
    weights: str
    step: int
    posthoc_file: Path

    @property
    def space(self) -> LabelSpace:
        """What makes scores of its logits, and how the scores decide."""
        return self.method.space

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; column c of every logit is `classes[c]`."""
        return self.space.classes

    @cached_property
    def posthoc(self) -> Chain | None:
        """The post-hoc steps that eval.py fitted; None: none. The file is read when they are first asked for.

        Raises:
            InputError: the file is damaged, or the steps were fitted for other classes, weights or another checkpoint.
        """
        if not self.posthoc_file.is_file():
            return None
        chain = load_chain(self.posthoc_file, dataclasses.replace(self.context, space=self.space))
        on = chain.fitted_on
        if (on.weights, on.step) != (self.weights, self.step):
            own = self.posthoc_file.name == f"{_CHAIN}.json"
            raise InputError(
                f"{self.posthoc_file}: fitted on the {on.weights} weights of step {on.step}, but these are the "
                f"{self.weights} weights of step {self.step}; fit anew with: python eval.py "
                f"{self.folder if own else self.checkpoint} split=val posthoc={chain.names}, or do without where "
                "threshold= is an option"
            )
        return chain

    @property
    def thresholds(self) -> Float[Tensor, " C"] | float:
        """From which score on a class is present: one per class where post-hoc steps give them, else 0.5.

        Raises:
            InputError: as `posthoc`.
        """
        none = torch.zeros(0, len(self.classes))
        predictions = Predictions(none, none, torch.zeros(0, dtype=torch.int64), self.space)
        return (self.posthoc.apply(predictions) if self.posthoc else predictions).thresholds

    def with_weights(self, weights: str) -> "LoadedRun":
        """The run with the raw or ema weights of its checkpoint: a copy, or the run itself if it has them.

        Raises:
            InputError: the checkpoint has no such weights, or cannot be read any more.
        """
        if weights == self.weights:
            return self
        state = _state_of(load_checkpoint(self.checkpoint), weights, self.checkpoint)
        method = copy.deepcopy(self.method)
        _load_state(method, state, self.checkpoint)
        return dataclasses.replace(self, method=method, weights=weights)

    def preprocess(self, images: Any) -> UInt8[Tensor, "B 3 H W"]:
        """PIL images, or one, as the uint8 batch that `method.predict` takes, resized as at evaluation.

        Raises:
            InputError: the run was trained on other bands than red, green and blue; no image, or something that is not a
                readable PIL image.
        """
        if self.config.model.in_chans != 3:
            raise InputError(f"{self.folder}: takes images of {self.config.model.in_chans} channels, pictures have 3")
        views = [self.view(_pixels_of(image)).image for image in _as_list(images)]
        if not views:
            raise InputError("images: expected at least one PIL image, got none")
        return torch.stack(views).to(self.precision.device)


def _as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, Iterable) and not isinstance(images, str) else [images]


def _pixels_of(image: Any) -> UInt8[np.ndarray, "H W 3"]:
    if not isinstance(image, Image.Image):
        what = f"the {type(image).__name__} {image!r}" if isinstance(image, str | Path) else type(image).__name__
        raise InputError(f"images: expected PIL images (PIL.Image.open reads a file), got {what}")
    try:
        return rgb_array(image)
    except (OSError, SyntaxError, ValueError) as error:  # PIL reads a file's pixels only now
        name = getattr(image, "filename", "") or "a PIL image"
        raise InputError(f"{name}: cannot be read: {first_line(error)}") from error


def load_run(
    path: str | Path, *, device: str = "auto", weights: str = "auto", overrides: Sequence[str] = ()
) -> LoadedRun:
    """A trained run from its folder, or from one of its checkpoints.

    Args:
        path: a run folder (its best checkpoint is taken, else its last), or a `.pt` file in `checkpoints/` of one.
        weights: raw, ema, or auto: ema where the run has them.
        overrides: `key=value` on the saved config.

    Raises:
        InputError: no run there, or one that cannot be loaded.
    """
    path = Path(path)
    folder = path.parent.parent if path.suffix == ".pt" else path
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{path}: no run there (expected a folder with config.yaml, made by train.py)")
    saved_config = load_config(folder / "config.yaml")
    config = build_options(Config, to_plain(saved_config), overrides=overrides)
    overridden = {argument.partition("=")[0] for argument in overrides}
    device_used = resolve_device(config.device if "device" in overridden else device)
    if "threads" in overridden:
        resolve(dataclasses.replace(config, device=str(device_used)))
    try:
        same_kind = device_used.type == torch.device(saved_config.device).type
        asked = config.precision if same_kind or "precision" in overridden else "auto"
        precision = resolve_precision(asked, device_used)
    except InputError:
        if "precision" in overridden:
            raise
        precision = resolve_precision("auto", device_used)  # trained in a precision that this machine does not have
    checkpoint = (
        path
        if path.suffix == ".pt"
        else next((p for p in (folder / BEST, folder / LAST) if p.is_file()), folder / BEST)
    )
    saved = load_checkpoint(checkpoint)
    if weights == "auto":
        weights = "raw" if saved["ema"] is None else "ema"
    state = _state_of(saved, weights, checkpoint)
    space = LabelSpace(tuple(saved["classes"]), exclusive=tuple(saved.get("groups", ())))
    untrained = dataclasses.replace(config.model, pretrained="none", checkpoint="")
    assets = config.head.load_assets(folder, space.classes)
    context = Context(space, _read_statistics(folder, len(space.classes)), training=False)
    method, preprocessing = build_method(dataclasses.replace(config, model=untrained), context, assets)
    _load_state(method, state, checkpoint)
    method.to(precision.device, memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]
    view = eval_view(complete_view(config.view, preprocessing))
    # As in eval.py, what is said of another checkpoint than the chosen one has its name.
    chain = f"{_CHAIN}_{path.stem}" if path.suffix == ".pt" else _CHAIN
    posthoc_file = folder / "posthoc" / f"{chain}.json"
    return LoadedRun(method, config, folder, context, precision, view, checkpoint, weights, saved["step"], posthoc_file)


def _state_of(saved: dict[str, Any], weights: str, checkpoint: Path) -> dict[str, Tensor]:
    """The raw or ema weights that a checkpoint holds."""
    if weights not in ("raw", "ema") or (weights == "ema" and saved["ema"] is None):
        raise InputError(
            f"{checkpoint}: no '{weights}' weights there; expected raw" + (" or ema" if saved["ema"] else "")
        )
    return saved["ema" if weights == "ema" else "method"]


def _load_state(method: Method, state: dict[str, Tensor], checkpoint: Path) -> None:
    """Put the weights of a run's checkpoint into its method."""
    try:
        method.load_state_dict(state)
    except RuntimeError as error:
        config = checkpoint.parent.parent / "config.yaml"
        raise InputError(f"{checkpoint}: does not fit {config} ({first_line(error)})") from error


def _read_statistics(folder: Path, num_classes: int) -> LabelStatistics | None:
    """The statistics of the split that a run was trained on; runs of older versions have none."""
    path = folder / STATISTICS
    if not path.is_file():
        return None
    values = read_written(path)
    counts = [values.get(name) for name in ("positives", "known")]
    whole = [isinstance(of, list) and len(of) == num_classes and all(type(n) is int for n in of) for of in counts]
    if not all(whole) or type(values.get("num_images")) is not int:
        raise InputError(f"{path}: expected counts of {num_classes} classes, as they were written; the file is damaged")
    return LabelStatistics(tuple(values["positives"]), tuple(values["known"]), values["num_images"])


def add_classes(run: LoadedRun, names: Sequence[str]) -> LoadedRun:
    """A copy of the run with further classes by their names, whose logits come last; only some heads can be given any.

    Raises:
        InputError: as `Head.add_classes`.
    """
    method = copy.deepcopy(run.method)
    classifier = method.classifier
    classifier.head.add_classes(run.classes, names)
    classifier.num_classes = classifier.head.num_classes
    method.space = run.space.extended(names)
    return dataclasses.replace(run, method=method)


def read_for(run: LoadedRun, role: str) -> tuple[Manifest, list[tuple[str, str, str]]]:
    """As `read_role`, of images that a trained run is judged by: of its classes, and unseen unless its own are asked for.

    Raises:
        InputError: as `read_role`, other classes, or images that the run was trained on.
    """
    manifest, bad = read_role(run.config, role)
    check_same_data(manifest)
    check_images(run.config.model.in_chans, manifest)
    check_classes(run.folder, list(run.classes), manifest.classes)
    if manifest.space.exclusive != run.space.exclusive:
        raise InputError(
            f"{run.folder}: trained on groups of classes {list(run.space.exclusive)}, but the data has "
            f"{list(manifest.space.exclusive)}"
        )
    check_never_trained_on(run, manifest, role)
    return manifest, bad


def check_never_trained_on(run: LoadedRun, manifest: Manifest, role: str) -> None:
    """Refuse to evaluate on images that the run was trained on (those of its own training split excepted).

    Raises:
        InputError: naming the images, or images.csv is not as `start_folder` wrote it.
    """
    if role == "train":
        return
    path = str(run.folder / "images.csv")
    trained = {key for split, key, _ in read_images(path) if split == "train"}
    if not trained:
        raise InputError(f"{path}: lists no image that was trained on; restore the file as the run wrote it")
    shared = [key for key in manifest.keys if key in trained]
    if shared:
        raise InputError(
            f"data.{role}: {len(shared)} images of '{manifest.split}' were in the training split of {run.folder}: "
            + ", ".join(shared[:5])
        )
