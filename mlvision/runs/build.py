"""A training run from its options: data, model, method and loaders, checked together before anything is written."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mlvision.config import Config
from mlvision.data.loader import Loader, eval_loader, evenly, train_loader
from mlvision.data.manifest import Manifest
from mlvision.data.views import EvalView, TrainView, ViewConfig, check_channels
from mlvision.engine import distributed
from mlvision.engine.callbacks import Callback
from mlvision.engine.fit import check_options
from mlvision.engine.precision import Precision, resolve_device, resolve_precision
from mlvision.engine.seed import seed_everything, set_deterministic
from mlvision.errors import InputError
from mlvision.evaluators import Evaluator, measure
from mlvision.label_maps.store import LabelMapStore
from mlvision.methods import Method
from mlvision.models import Preprocessing, build_classifier
from mlvision.models.heads.base import Assets
from mlvision.options import flatten
from mlvision.parts import Context, LabelStatistics
from mlvision.runs.splits import check_images, check_same_data, read_training_manifests
from mlvision.types import Predictions


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


def build_run(config: Config) -> Run:
    """Read the data, build the model, and check that they fit together; writes nothing.

    Raises:
        InputError: whatever of the config or the data cannot be used.
    """
    config = resolve(config)
    distributed.check_same(_shared_options(config))
    precision = resolve_precision(config.precision, resolve_device(config.device))
    train, val, bad = read_training_manifests(config)
    check_same_data(train, val)
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
            role: eval_loader(manifest, eval_view(view), config.loader, rank=rank, world_size=world_size)
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
    from mlvision.study.callback import CamGrids  # brings captum, skimage and pyplot: seconds to import

    rows = evenly(run.config.log.cam_images, len(run.val)).tolist()
    samples = [run.eval_loaders["val"].dataset[0, row] for row in rows]
    images = torch.stack([sample.views[0].image for sample in samples])
    targets = torch.stack([torch.as_tensor(sample.target) for sample in samples])
    return [CamGrids(images, targets, [run.val.records[row].key for row in rows], run.val.classes)]


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


def complete_view(view: ViewConfig, preprocessing: Preprocessing) -> ViewConfig:
    """The view options; what they leave open is as the weights expect."""
    return dataclasses.replace(
        view,
        interpolation=view.interpolation or preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct if view.crop_pct is None else view.crop_pct,
    )


def eval_view(view: ViewConfig) -> EvalView:
    assert view.crop_pct is not None, "complete_view first"
    return EvalView((view.eval_side, view.eval_side), view.interpolation, view.eval_resize, view.crop_pct)
