"""Wires the rooms into a run: what train.py, eval.py, the tools and notebooks stand on."""

import contextlib
import copy
import csv
import dataclasses
import glob
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from mlvision.config import Config, load_config
from mlvision.data import read_split
from mlvision.data.edits import apply_edits
from mlvision.data.images import drop_unreadable, file_sizes, rgb_array
from mlvision.data.loader import Loader, eval_loader, evenly, train_loader
from mlvision.data.manifest import Manifest, carve_validation, check_disjoint, check_same_classes
from mlvision.data.transforms import EvalView, TrainView, ViewConfig, check_channels
from mlvision.engine import distributed
from mlvision.engine.callbacks import Callback
from mlvision.engine.checkpoint import check_classes, load_checkpoint
from mlvision.engine.fit import BEST, LAST, check_options
from mlvision.engine.lock import LOCK, locked
from mlvision.engine.precision import Precision, resolve_device, resolve_precision
from mlvision.engine.seed import seed_everything, set_deterministic
from mlvision.errors import InputError, first_line, shown
from mlvision.evaluators import Evaluator, measure
from mlvision.files import whole_file
from mlvision.labels.store import LabelMapStore
from mlvision.methods import Method
from mlvision.models import HEADS, Preprocessing, build_classifier
from mlvision.models.heads.base import Assets
from mlvision.options import INERT, build_options, flatten, save_options, to_plain
from mlvision.parts import Context, LabelStatistics
from mlvision.posthoc import Chain, load_chain
from mlvision.space import LabelSpace
from mlvision.text_files import read_json, read_text
from mlvision.types import Predictions
from mlvision.versions import upgrade

ROLES = ("train", "val", "test")
_PACKAGES = ("torch", "torchvision", "timm", "albumentations", "numpy", "pillow", "opencv-python-headless")
_IMAGE_COLUMNS = ("split", "key", "bytes")  # of images.csv
_STATISTICS = "statistics.json"
_CHAIN = "chain"
_ASSET_FILES = {file for config in HEADS.values() for file in config.asset_files}
_WRITTEN_FIRST = {LOCK, "images.csv", "bad_images.csv", _STATISTICS, "environment.json", *_ASSET_FILES, "config.yaml"}


@dataclass
class Run:
    """A training run, built and checked, before anything is written.

    Attributes:
        eval_loaders: of the roles train and val: their images as at evaluation.
    """

    config: Config
    method: Method
    train: Manifest
    val: Manifest
    train_loader: Loader
    eval_loaders: dict[str, Loader]
    evaluators: list[Evaluator]
    statistics: LabelStatistics
    precision: Precision
    bad_images: list[tuple[str, str, str]]
    label_maps: LabelMapStore | None

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must find unchanged when it goes on: its classes and, by name, hashes of its data."""
        hashes = {"training records": self.train.hash, "validation records": self.val.hash}
        hashes |= {"label maps": self.label_maps.meta.hash} if self.label_maps else {}
        hashes |= {"groups of classes": self.train.class_hash} if self.train.groups else {}
        space = self.train.space
        return {"classes": list(space.classes), "groups": list(space.exclusive), "data_hashes": hashes}

    def measure(self, predictions: Predictions) -> dict[str, float]:
        """What the evaluators give of predictions of the validation images."""
        return measure(self.evaluators, predictions, self.val)


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


def build_run(config: Config) -> Run:
    """Read the data, build the model, and check that they fit together; writes nothing.

    Raises:
        InputError: whatever of the config or the data cannot be used.
    """
    config = resolve(config)
    distributed.check_same(_shared_options(config))
    precision = resolve_precision(config.precision, resolve_device(config.device))
    train, val, bad = read_training_manifests(config)
    _check_same_data(train, val)
    check_images(config.model.in_chans, train)
    check_channels(config.view, train.num_channels)
    seed_everything(config.seed)
    set_deterministic(config.deterministic)
    statistics = train.statistics()
    context = Context(train.space, statistics)
    method, preprocessing = build_method(config, context)
    method.prepare(statistics)
    method.to(precision.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.ddp.sync_bn:
        distributed.sync_batch_norm(method, precision.device)
    evaluators = [options.build(context) for options in config.evaluators]
    metrics = [name for evaluator in evaluators for name in evaluator.metrics(val)]
    images_per_rank = config.loader.batch_size // distributed.world_size()
    check_options(method, config.optim, config.checkpoint, images_per_rank, metrics)
    check_batch_statistics(method, config)
    if config.compile:
        compile_backbone(method, config.compile)
    sampling = config.loader.sampling
    if sampling != "shuffled" and method.has_order:
        raise InputError(
            f"loader.sampling: method {config.method.name} has an order of its own, expected shuffled, got {sampling}"
        )
    view = complete_view(config.view, preprocessing)
    label_maps = _open_label_maps(config, method, train)
    distributed.check_same({"label maps": label_maps.meta.hash if label_maps else "none"})
    rank, world_size = distributed.rank(), distributed.world_size()
    if rank:
        seed_everything(config.seed, rank)  # the weights are the same everywhere; dropout and mixing are not to be
    return Run(
        config=config,
        method=method,
        train=train,
        val=val,
        train_loader=train_loader(
            train,
            TrainView(view),
            config.loader,
            config.seed,
            num_views=method.num_views,
            label_maps=label_maps,
            sparse_targets=method.sparse_targets,
            rank=rank,
            world_size=world_size,
        ),
        eval_loaders={
            role: eval_loader(manifest, _eval_view(view), config.loader, rank=rank, world_size=world_size)
            for role, manifest in (("train", train), ("val", val))
        },
        evaluators=evaluators,
        statistics=statistics,
        precision=precision,
        bad_images=bad,
        label_maps=label_maps,
    )


def _shared_options(config: Config) -> dict[str, str]:
    """The options that have to be the same for every process: all but where each finds its files and its device."""
    own = ("device", "threads", "data.root", "loader.num_workers")
    return {key: str(value) for key, value in flatten(config).items() if key not in own}


def _check_same_data(*manifests: Manifest) -> None:
    """Refuse processes that read other images, labels or classes."""
    hashes = {f"records of split {manifest.split}": manifest.hash for manifest in manifests}
    distributed.check_same({"classes": manifests[0].class_hash} | hashes)


def check_batch_statistics(method: Method, config: Config) -> None:
    """Refuse one image a step where a batch norm sees one cell of it: there is nothing to take statistics of.

    Raises:
        InputError: names the layer.
    """
    rows = config.loader.batch_size // distributed.world_size() // config.optim.accumulate * method.num_views
    if rows > 1:
        return
    lonely = []

    def look(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            lonely.append(name)

    norms = [
        module.register_forward_pre_hook(partial(look, name))
        for name, module in method.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    ]
    was_training = method.training
    try:
        with torch.no_grad():
            side = config.view.size
            image = torch.zeros(1, config.model.in_chans, side, side, dtype=torch.uint8, device=method.mean.device)
            method.eval().predict(image)
    finally:
        method.train(was_training)
        for norm in norms:
            norm.remove()
    if lonely:
        raise InputError(
            f"loader.batch_size: expected 2 images or more in each step, process and part: batch norm {lonely[0]} has one "
            f"cell at view.size={config.view.size}, and no statistics of a single value"
        )


def compile_backbone(method: Method, backend: str) -> None:
    """Compile what `forward` of the backbone does; parameters and state keep their names, and copies are not compiled.

    Raises:
        InputError: no such backend.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise InputError(f"compile: torch has no backend '{backend}'; expected one of {', '.join(known)}")
    method.classifier.backbone.compile(backend=backend)


def build_callbacks(run: Run) -> list[Callback]:
    """What watches a run beside its progress bar: CAM grids of validation images spread over the split, where asked for."""
    if not run.config.log.cam_images or not run.config.log.tensorboard:
        return []
    if run.config.model.in_chans != 3:
        raise InputError(
            f"log.cam_images: expected 0 for images of {run.config.model.in_chans} channels: none is a picture"
        )
    from mlvision.explain.callback import CamGrids  # brings captum, skimage and pyplot: seconds to import

    rows = evenly(run.config.log.cam_images, len(run.val)).tolist()
    samples = [run.eval_loaders["val"].dataset[0, row] for row in rows]
    images = torch.stack([sample.views[0].image for sample in samples])
    targets = torch.stack([torch.as_tensor(sample.target) for sample in samples])
    return [CamGrids(images, targets, [run.val.records[row].key for row in rows], run.val.classes)]


def check_images(in_chans: int, manifest: Manifest) -> None:
    """Refuse a model for images of other channels than a data set gives.

    Raises:
        InputError: naming both numbers.
    """
    if in_chans != manifest.num_channels:
        raise InputError(
            f"model.in_chans: images of split {manifest.split} have {manifest.num_channels} channels, got {in_chans}"
        )


def _open_label_maps(config: Config, method: Method, train: Manifest) -> LabelMapStore | None:
    """The store of a method that needs one, checked against the training images and classes."""
    if not method.needs_label_map:
        if config.label_maps:
            raise InputError(f"label_maps: method {config.method.name} uses none, got {config.label_maps}")
        return None
    if not config.label_maps:
        raise InputError(
            f"label_maps: method {config.method.name} needs the folder of a store; make one with tools/make_label_maps.py"
        )
    try:
        store = LabelMapStore.open(config.label_maps)
    except InputError as error:
        raise InputError(f"label_maps: {error}; tools/make_label_maps.py makes one") from None
    try:
        store.check_belongs(record_hash=train.hash, class_hash=train.class_hash, num_records=len(train))
    except InputError as error:
        raise InputError(
            f"label_maps: {error}. Maps belong to the training records as data.* gives them (root, train, val_fraction, "
            "val_seed, edits, ...): give those that the maps were made with, or make others with tools/make_label_maps.py"
        ) from None
    try:
        store.check_rows()
    except InputError as error:
        raise InputError(f"label_maps: {error}") from None
    try:
        method.check_label_map(store.read([0]))
    except InputError as error:
        raise InputError(f"label_maps: {store.path}: {error}") from None
    return store


def resolve(config: Config) -> Config:
    """The config with `auto` replaced by what this machine really does; sets torch's thread count.

    Raises:
        InputError: a device or precision that is not there.
    """
    device = resolve_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    return dataclasses.replace(
        config,
        device=str(device),
        precision=resolve_precision(config.precision, device).name,
        threads=torch.get_num_threads(),
    )


def build_method(config: Config, context: Context, assets: Assets | None = None) -> tuple[Method, Preprocessing]:
    """The method of a config with a fresh classifier, and the preprocessing that its weights expect.

    Args:
        assets: what the head needs besides its options; made of the names of the classes if not given.

    Raises:
        InputError: an option of model, head or method that cannot be used.
    """
    assets = config.head.make_assets(context.space.classes) if assets is None else assets
    num_classes = len(context.space.classes)
    classifier = build_classifier(config.model, config.head, num_classes, image_size=config.view.size, assets=assets)
    if config.view.eval_side != config.view.size and classifier.backbone.fixed_size:
        raise InputError(
            f"view.eval_size: {config.model.name} takes images of the size it was built for, view.size={config.view.size}"
        )
    return config.method.build(context, classifier), classifier.backbone.preprocessing


def read_training_manifests(config: Config) -> tuple[Manifest, Manifest, list[tuple[str, str, str]]]:
    """The training and validation manifests, edited, and (split, key, reason) of each image that was skipped.

    The test split is read as well, to refuse data in which it shares images with the others; nothing else is done with it,
    and no edit ever changes it.
    """
    data = config.data
    if not data.train:
        raise InputError("data.train: expected the name of a split, got nothing")
    train = read_split(data, data.train)
    if data.val:
        if data.val == data.test:
            raise InputError(
                f"data.val: '{data.val}' is the test split; checkpoints are chosen on other images "
                "(leave data.val empty to carve them from the training split)"
            )
        val = read_split(data, data.val)
        check_same_classes(train, val)
        check_disjoint(train, val)
    else:
        train, val = carve_validation(train, data.val_fraction, data.val_seed)
    if data.test:
        test = read_split(data, data.test)
        check_same_classes(train, test)
        check_disjoint(train, test)
        check_disjoint(val, test)
    if data.edits:
        train = apply_edits(data.edits, train)
        if data.val_labels == "as_train":
            val = apply_edits(data.edits, val).noted("edited like the training images")
        else:
            val = val.noted("without the edits of the training images")
    (train, bad_train), (val, bad_val) = (_readable(config, m) for m in (train, val))
    return train, val, bad_train + bad_val


def read_role(config: Config, role: str) -> tuple[Manifest, list[tuple[str, str, str]]]:
    """The manifest of the split that plays `role`: train, val or test.

    Raises:
        InputError: no such role, or none was named in the config.
    """
    if role not in ROLES:
        raise InputError(f"split: expected one of {', '.join(ROLES)}, got '{role}'")
    if role != "test":
        train, val, bad = read_training_manifests(config)
        chosen = train if role == "train" else val
        return chosen, [image for image in bad if image[0] == chosen.split]
    if not config.data.test:
        raise InputError("data.test: this run names no test split; give data.test=<split> or split=val")
    return _readable(config, read_split(config.data, config.data.test))


def _readable(config: Config, manifest: Manifest) -> tuple[Manifest, list[tuple[str, str, str]]]:
    if config.data.on_bad_image == "error":
        return manifest, []
    kept, bad = distributed.on_main(lambda: drop_unreadable(manifest, config.loader.num_workers))
    return kept, [(manifest.split, key, reason) for key, reason in bad]


def complete_view(view: ViewConfig, preprocessing: Preprocessing) -> ViewConfig:
    """The view options; what they leave open is as the weights expect."""
    return dataclasses.replace(
        view,
        interpolation=view.interpolation or preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct if view.crop_pct is None else view.crop_pct,
    )


def _eval_view(view: ViewConfig) -> EvalView:
    assert view.crop_pct is not None, "complete_view first"
    return EvalView((view.eval_side, view.eval_side), view.interpolation, view.eval_resize, view.crop_pct)


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
    view = _eval_view(complete_view(config.view, preprocessing))
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
    path = folder / _STATISTICS
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


@contextlib.contextmanager
def claim_folder(config: Config) -> Iterator[tuple[Path, bool]]:
    """As `choose_folder`, and no other process gets that folder while the context lasts.

    Raises:
        InputError: as `choose_folder`; or another process trains there.
    """
    folder, _ = choose_folder(config)
    with locked(folder):
        # Again, now that nobody else changes what is there.
        yield choose_folder(dataclasses.replace(config, out=str(folder)))


def choose_folder(config: Config) -> tuple[Path, bool]:
    """The run folder of a resolved config, and whether a run in it is to be continued; writes nothing.

    Raises:
        InputError: the folder holds a run and `resume` is not auto, or it holds a run of another config.
    """
    if config.out:
        folder = Path(config.out)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"out: {folder} is a file, expected a folder")
        if not (folder / "config.yaml").is_file():
            files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
            foreign = [name for name in files if name.removesuffix(".partial") not in _WRITTEN_FIRST]
            if foreign:
                raise InputError(
                    f"out: {folder} holds no run but other files ({sorted(foreign)[0]}); give a new folder"
                )
            return folder, False
        if not config.resume:
            raise InputError(f"out: {folder} already holds a run; resume=auto continues it, another out= starts anew")
        difference = config_difference(load_config(folder / "config.yaml"), config)
        if difference:
            raise InputError(f"out: {folder} holds a run of another config: {difference}")
        return folder, (folder / LAST).is_file()
    name = config.name or "run"
    if config.resume:
        for path in sorted(Path("runs").glob(f"{glob.escape(name)}-*/config.yaml"), key=os.path.getmtime, reverse=True):
            if (path.parent / LAST).is_file() and _is_same(path, config):
                return path.parent, True
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, number = Path("runs") / f"{name}-{stamp}", 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{stamp}-{number}", number + 1
    return folder, False


def _is_same(path: Path, config: Config) -> bool:
    """Whether the run with the config at `path` computes the same; one that cannot be read any more does not."""
    try:
        saved = load_config(path)
        if config_difference(saved, config):
            return False
        if saved.label_maps == config.label_maps:
            return True
        maps = read_written(path.with_name("environment.json")).get("label_maps")
        return LabelMapStore.open(config.label_maps).meta.to_json() == maps
    except InputError:
        return False


def config_difference(saved: Config, asked: Config) -> str:
    """The first option in which two configs compute something else, or nothing."""
    before, now = (flatten(config, without=INERT) for config in (saved, asked))
    for values in (before, now):
        values["device"] = values["device"].partition(":")[0]
    for key in before | now:
        if before.get(key) != now.get(key):
            return f"{key} is {before.get(key)!r} there, {now.get(key)!r} was asked for"
    return ""


def start_folder(run: Run, folder: Path) -> None:
    """Make a new run's folder: config.yaml, environment.json, images.csv (which image trained and which validated, and the
    bytes of its file), statistics.json (of the training labels), bad_images.csv where images were skipped, and the files
    that the head was built from."""
    folder.mkdir(parents=True, exist_ok=True)
    if run.bad_images:
        with whole_file(folder / "bad_images.csv", newline="") as file:
            csv.writer(file).writerows([("split", "key", "reason"), *run.bad_images])
    with whole_file(folder / "images.csv", newline="") as file:
        csv.writer(file).writerows([_IMAGE_COLUMNS, *_image_rows(run)])
    write_json(folder / _STATISTICS, dataclasses.asdict(run.statistics))
    environment = describe_environment(run.precision.device)
    if run.label_maps:
        environment["label_maps"] = run.label_maps.meta.to_json()
    write_json(folder / "environment.json", environment)
    run.method.classifier.head.save_assets(folder, run.train.classes)
    save_options(run.config, folder / "config.yaml")  # last: its presence says that a run is here


def note_resumption(run: Run, folder: Path) -> None:
    """Add this machine and code to environment.json: a run may go on with others than it began with, not on other images.

    Raises:
        InputError: files of images have other sizes than when the run began, or the run's own files are damaged.
    """
    sizes = {(split, key): size for split, key, size in _read_images(str(folder / "images.csv"))}
    changed = [key for split, key, size in _image_rows(run) if sizes.get((split, key), size) not in (size, None)]
    if changed:
        raise InputError(
            f"{folder}: {len(changed):,} image files have other sizes than when the run began, the first is {changed[0]}; "
            "restore them, or start a new run"
        )
    environment = read_written(folder / "environment.json")
    resumed = environment.get("resumed", [])
    if not isinstance(resumed, list):
        raise InputError(f"{folder / 'environment.json'}: 'resumed' is no list, as it was written; the file is damaged")
    write_json(
        folder / "environment.json", environment | {"resumed": [*resumed, describe_environment(run.precision.device)]}
    )


def _image_rows(run: Run) -> Iterator[tuple[str, str, int | None]]:
    """The rows of images.csv."""
    for role, manifest in (("train", run.train), ("val", run.val)):
        for key, size in zip(manifest.keys, file_sizes(manifest), strict=True):
            yield role, key, size


def _script() -> str:
    """The running script as one names it from the repository's root; as it was called where it lies elsewhere."""
    root, script = Path(__file__).resolve().parents[1], Path(sys.argv[0]).resolve()
    return script.relative_to(root).as_posix() if script.is_relative_to(root) else sys.argv[0]


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on beside its config: command, code, packages and machine."""
    ranks = distributed.world_size()
    launcher = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', ranks)}" if ranks > 1 else "python"
    return {
        "command": f"{launcher} {shlex.join([_script(), *sys.argv[1:]])}",
        "commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": _cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        "started": datetime.now().isoformat(timespec="seconds"),
    }


def _git_commit() -> str:
    """The checkout's commit, with `-dirty` where files differ from it; `unknown` outside a checkout."""
    root = Path(__file__).parents[1]
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, encoding="utf-8", check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return f"{', '.join(sorted(names)) or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def read_for(run: LoadedRun, role: str) -> tuple[Manifest, list[tuple[str, str, str]]]:
    """As `read_role`, of images that a trained run is judged by: of its classes, and unseen unless its own are asked for.

    Raises:
        InputError: as `read_role`, other classes, or images that the run was trained on.
    """
    manifest, bad = read_role(run.config, role)
    _check_same_data(manifest)
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
    trained = {key for split, key, _ in _read_images(path) if split == "train"}
    if not trained:
        raise InputError(f"{path}: lists no image that was trained on; restore the file as the run wrote it")
    shared = [key for key in manifest.keys if key in trained]
    if shared:
        raise InputError(
            f"data.{role}: {len(shared)} images of '{manifest.split}' were in the training split of {run.folder}: "
            + ", ".join(shared[:5])
        )


def _read_images(path: str) -> list[tuple[str, str, int | None]]:
    """The rows of a run's images.csv; there is no run without one. Runs of earlier versions have no column of bytes."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        header, *rows = list(reader) or [[]]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from error
    if tuple(header) not in (_IMAGE_COLUMNS, _IMAGE_COLUMNS[:2]):
        raise InputError(f"{path}: expected the columns split and key, got {shown(header)}")
    images = []
    for number, row in enumerate(rows, start=2):
        split, key, size = (*row, "", "", "")[:3]
        is_size = not size or (size.isascii() and size.isdigit() and len(size) < 20)
        if len(row) != len(header) or split not in ("train", "val") or not is_size:
            raise InputError(f"{path}, row {number}: expected train or val and a key, got {shown(row)}")
        images.append((split, key, int(size) if size else None))
    return images


def write_metrics(run: LoadedRun, role: str, metrics: dict[str, Any]) -> None:
    """Put one split's metrics into the run's metrics.json, beside those of other splits."""
    path = run.folder / "metrics.json"
    known = read_written(path) if path.is_file() else {}
    write_json(path, known | {role: metrics})


def is_trained(folder: Path, config: Config) -> bool:
    """Whether the run in `folder` has come to its end; false where its last checkpoint is not there to say so."""
    if not (folder / LAST).is_file():
        return False
    saved = load_checkpoint(folder / LAST)
    return config.checkpoint.ends(saved["epoch"], config.optim.epochs, saved.get("best_epoch", 0))


def write_record(run: LoadedRun, metrics: dict[str, Any]) -> None:
    """Write record.json: the small file that stands for a finished run in docs/results/ and makes its tables."""
    environment = read_written(run.folder / "environment.json")
    record = {
        "name": run.config.name,
        "config": to_plain(run.config),
        "metrics": metrics,
        "classes": len(run.classes),
        "parameters": sum(p.numel() for p in run.method.parameters()),
        "environment": environment,
    }
    write_json(run.folder / "record.json", record)


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote, here or in an older version: its options have the names of this one.

    Raises:
        InputError: the file is missing, damaged, no record, of a newer version, or cannot be upgraded.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such record; eval.py writes it")
    record = read_written(path)
    if not isinstance(record.get("config"), dict):
        raise InputError(f"{path}: not a record of eval.py (it has no config)")
    return record | {"config": upgrade(record["config"], str(path))}


def read_written(path: Path) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    values = read_json(str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected names and values, as it was written")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write strict JSON, NaN as null, whole or not at all; infinity would be a fault and is refused."""
    text = json.dumps(_without_nan(values), indent=2, allow_nan=False)
    with whole_file(path) as file:
        file.write(text + "\n")


def _without_nan(value: Any) -> Any:
    """NaN as None: strict JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
