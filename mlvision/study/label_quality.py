"""Judge a store of label maps before a student learns from it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from mlvision.data.loader import MOST_WORKERS, EpochBatches, ImageDataset, Loader, LoaderConfig
from mlvision.data.manifest import Manifest, Record
from mlvision.data.views import EvalView, TrainView, ViewConfig
from mlvision.errors import InputError, check_fields
from mlvision.label_maps import Pooling, pool_label_map, pool_probabilities
from mlvision.label_maps.annotate import verify
from mlvision.label_maps.geometry import boxes_in_grid, whole_images
from mlvision.label_maps.oracle import batch_oracle_maps, oracle_map, oracle_targets
from mlvision.label_maps.store import LabelMapStore
from mlvision.metrics import mass_in_box, pointing_game
from mlvision.models.dense import Teacher
from mlvision.progress import track
from mlvision.space import Groups, split_groups
from mlvision.study.quality_tables import (
    agreement,
    area_bins,
    background,
    by_object_size,
    calibration,
    known_mean,
    localisation,
    over_crops,
    per_class,
    unit,
    verdict,
)
from mlvision.types import Batch, CropBox, LabelMap

VISIBLE = 0.25  # a crop shows a label from this share of its area on, as `visible` of the relabel method
_ROWS = 128  # maps that are read at once
_GRID = (32, 32)  # of the annotated areas that say what a crop shows


@dataclass(frozen=True)
class LabelQualityConfig:
    """How many images and crops judge the maps, and which crops."""

    images: Annotated[int, "judge so many images, drawn at random; 0: all"] = 20_000
    crops: Annotated[int, "random crops of each image, by view.scale and view.ratio"] = 4
    seed: Annotated[int, "seed of images and crops"] = 0
    exact_images: Annotated[int, "how many images are read for the teacher's answers to real crops"] = 200
    num_workers: Annotated[int, "processes that read images; 0: the main one"] = 2
    view: ViewConfig = field(default_factory=ViewConfig)

    def __post_init__(self) -> None:
        rules = (
            ("images", self.images >= 0, "0 or more"),
            ("crops", 1 <= self.crops <= 1000, "1 to 1000"),
            ("seed", self.seed >= 0, "0 or more"),
            ("exact_images", self.exact_images >= 1, "1 or more"),
            ("num_workers", 0 <= self.num_workers <= MOST_WORKERS, f"0 to {MOST_WORKERS}"),
        )
        check_fields(self, "", rules)


def judge_label_maps(
    store: LabelMapStore,
    manifest: Manifest,
    judged_by: Manifest,
    config: LabelQualityConfig,
    teacher: Teacher | None = None,
) -> dict[str, Any]:
    """Judge label maps by the annotated labels, over random crops, as probabilities, by the objects' boxes, and by the
    teacher's own answers to crops where it is given.

    Args:
        manifest: the images that the maps were made for.
        judged_by: what is known of these images, in the same order.
        teacher: the one that made the maps, on the device where it is to run.

    Returns:
        Plain data for JSON and `study/quality_page.py`; NaN where something is undefined.

    Raises:
        InputError: maps of other images or classes, maps that are no probabilities, or a teacher that did not make them.
    """
    store.check(record_hash=manifest.hash, class_hash=manifest.class_hash, num_records=len(manifest))
    check_kind(store, len(manifest.classes))
    rows = np.arange(len(manifest))
    if config.images and config.images < len(rows):
        rows = np.sort(np.random.default_rng(config.seed).permutation(rows)[: config.images])
    answers = exact(store, manifest, rows, config, teacher) if teacher else None  # first: it refuses another teacher
    tables = collect(store, judged_by, rows, config)
    crops = {
        "per_image": config.crops,
        "scale": list(config.view.scale),
        "ratio": list(config.view.ratio),
        "shown_from_share_of_area": VISIBLE,
        **over_crops(tables, store.meta.groups, config.view.scale),
    }
    quality = {
        **describe(store, manifest, judged_by, len(rows), config),
        "agreement": agreement(tables),
        "object_sizes": by_object_size(tables),
        "crops": crops,
        "calibration": calibration(tables),
        "background": background(tables),
        "localisation": localisation(tables),
        "classes": per_class(tables, judged_by.classes),
        "exact": answers,
    }
    return {**quality, "verdict": verdict(quality)}


def check_kind(store: LabelMapStore, num_classes: int) -> None:
    """Refuse maps that cannot be read as probabilities of the classes."""
    meta = store.meta
    oracle = meta.num_classes == 2 * num_classes and meta.kind == "probability" and not meta.top_k
    if meta.kind not in ("logit", "probability"):
        raise InputError(f"{store.path}: maps of {meta.kind}, the report judges logits and probabilities")
    if meta.num_classes != num_classes and not oracle:
        raise InputError(f"{store.path}: maps of {meta.num_classes} classes, the data has {num_classes}")


def describe(
    store: LabelMapStore, manifest: Manifest, judge: Manifest, num_images: int, config: LabelQualityConfig
) -> dict[str, Any]:
    """Which maps these are, and what they are judged by."""
    meta = store.meta
    return {
        "store": str(store.path),
        "maps": {name: getattr(meta, name) for name in ("teacher", "kind", "groups", "top_k", "grid", "approximate")},
        "split": manifest.split,
        "labels_split": judge.split,
        "protocol": judge.protocol,
        "num_images": num_images,
        "num_images_of_split": len(manifest),
        "num_classes": len(judge.classes),
        "seed": config.seed,
    }


# What is computed of the maps, a part of the rows at a time


def collect(
    store: LabelMapStore, judge: Manifest, rows: Int64[np.ndarray, " N"], config: LabelQualityConfig
) -> dict[str, np.ndarray]:
    """The tables that the report is made of, as study/quality_tables.py describes them."""
    parts = []
    starts = range(0, len(rows), _ROWS)
    for start in track(starts, len(starts), "label quality", "batches", images=_ROWS):
        parts.append(_collect_rows(store, judge, rows[start : start + _ROWS], config))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _collect_rows(
    store: LabelMapStore, judge: Manifest, rows: Int64[np.ndarray, " n"], config: LabelQualityConfig
) -> dict[str, np.ndarray]:
    num_classes = len(judge.classes)
    records = [judge.records[row] for row in rows]
    targets = np.stack([judge.target(int(row)) for row in rows])
    given = read_maps(store, rows, num_classes)
    probable = given.as_kind("probability")
    stored = np.ones(targets.shape, dtype=bool)
    if given.ids is not None:
        flat = given.ids.flatten(1).long()
        stored = torch.zeros(targets.shape, dtype=torch.bool).scatter(1, flat, True).numpy()
    whole = given.extent if given.extent is not None else whole_images(probable.values)
    part = {"targets": targets, "stored": stored, "pairs": _localise(probable, records)}
    part["background"] = _emptiest(probable, num_classes).numpy()
    part |= {f"whole/{name}": values for name, values in pooled(given, probable, whole, num_classes).items()}

    shown_by, part["size"] = _shown_labels(records, targets)
    boxes = torch.from_numpy(np.stack([crop_boxes(r, int(i), config) for r, i in zip(records, rows, strict=True)]))
    crops: list[dict[str, np.ndarray]] = []
    for view in boxes.unbind(1):
        scores = pooled(given, probable, view, num_classes)
        area = ((view[:, 2] - view[:, 0]) * (view[:, 3] - view[:, 1])).numpy()
        crops.append({f"crop/{name}": s for name, s in scores.items()} | {"area": area, "shown": shown_by(view)})
    for name in crops[0]:
        part[name] = np.stack([crop[name] for crop in crops], axis=1).reshape(-1, *crops[0][name].shape[1:])
    return part


def read_maps(store: LabelMapStore, rows: Sequence[int] | np.ndarray | Tensor, num_classes: int) -> LabelMap:
    """Maps of the data's classes; of oracle maps the cover, without that of crowds."""
    maps = store.read(rows)
    return replace(maps, values=maps.values[:, :num_classes]) if maps.ids is None else maps


def _emptiest(probable: LabelMap, num_classes: int) -> Float[Tensor, " B"]:
    """The sum over the classes in the cell of each image whose most probable class is the least."""
    values, fill = probable.values.float(), probable.fills(torch.float32)
    if probable.ids is None:
        total, highest = values.sum(1), values.amax(1)
    else:
        ids = probable.ids if probable.ids.ndim == 4 else probable.ids[:, :, None, None]
        stored = (ids >= 0).expand_as(values)
        total = values.where(stored, 0).sum(1) + (num_classes - stored.sum(1)) * fill
        highest = values.where(stored, 0).amax(1).maximum(fill)
    return total.flatten(1).gather(1, highest.flatten(1).argmin(1, keepdim=True)).squeeze(1)


def pooled(
    given: LabelMap, probable: LabelMap, boxes: Float[Tensor, "B 4"], num_classes: int
) -> dict[str, Float[np.ndarray, "B C"]]:
    """Each operator's probabilities of what the boxes show; the mean logit only of maps of logits."""
    operators = ["mean_logit"] if given.kind == "logit" else []
    return {
        name: pool_probabilities(
            given if name == "mean_logit" else probable, CropBox(boxes), num_classes, Pooling(name)
        ).numpy()
        for name in (*operators, "mean_probability", "max")
    }


def crop_boxes(record: Record, row: int, config: LabelQualityConfig) -> Float32[np.ndarray, "crops 4"]:
    """Random resized crops of one image, in [0, 1] of it, by torchvision's rule: the first of ten tries that fits.

    Where none fits, it is the largest box in the centre whose ratio is allowed. An image whose size no annotation states
    counts as square.
    """
    noise = np.random.default_rng(np.random.SeedSequence([config.seed, row]))
    width, height = record.size or (1, 1)
    least, most = (ratio * height / width for ratio in config.view.ratio)  # sides in units of the image's own
    area = noise.uniform(*config.view.scale, (config.crops, 10))
    ratio = np.exp(noise.uniform(np.log(least), np.log(most), area.shape))
    sides = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=-1)
    fits = sides.max(axis=-1) <= 1
    chosen = sides[np.arange(config.crops), fits.argmax(axis=1)]
    corner = noise.uniform(size=chosen.shape) * (1 - chosen)
    nearest = np.clip(1, least, most)
    largest = np.array([min(nearest, 1), min(1 / nearest, 1)])
    none = ~np.logical_or.reduce(fits, axis=1)
    chosen[none], corner[none] = largest, (1 - largest) / 2
    return np.concatenate([corner, corner + chosen], axis=1).clip(0, 1).astype(np.float32)


def _shown_labels(
    records: Sequence[Record], targets: Float32[np.ndarray, "n C"]
) -> tuple[Callable[[Float[Tensor, "n 4"]], Float32[np.ndarray, "n C"]], Float32[np.ndarray, "n C"]]:
    """What one crop of each image shows, by the areas of its objects, and the share of the image that each label's objects
    cover; all unknown where no objects are annotated."""
    num_classes = targets.shape[1]
    known = [i for i, record in enumerate(records) if record.boxes is not None]
    drawn = []
    for i in known:
        boxes = records[i].boxes
        assert boxes is not None
        drawn.append(oracle_map(boxes.xyxy, boxes.labels, boxes.crowd, boxes.segmentation, num_classes, _GRID))
    annotated = batch_oracle_maps(drawn) if drawn else None
    size = np.full(targets.shape, np.nan, dtype=np.float32)
    size[known] = 0
    for i, one in zip(known, drawn, strict=True):
        size[i, one.ids] = one.cover.mean(axis=(1, 2))

    def shown(view: Float[Tensor, "n 4"]) -> Float32[np.ndarray, "n C"]:
        labels = np.full(targets.shape, np.nan, dtype=np.float32)
        if annotated:
            labels[known] = oracle_targets(*annotated, CropBox(view[known]), num_classes, tau=VISIBLE).numpy()
        return np.where(np.isnan(targets), np.nan, labels)

    return shown, size


def _localise(probable: LabelMap, records: Sequence[Record]) -> Float[np.ndarray, "P 5"]:
    """The pairs of `collect`. A crowd region is a box like any other: the label is there."""
    images, labels, boxes = [], [], []
    for i, record in enumerate(records):
        if record.boxes is None:
            continue
        found = torch.from_numpy(record.boxes.xyxy)
        if probable.extent is not None:
            found = boxes_in_grid(found, (1, 1), probable.extent[i].expand(len(found), 4))
        for label in np.unique(record.boxes.labels):
            images.append(i)
            labels.append(int(label))
            boxes.append(found.numpy()[record.boxes.labels == label])
    if not images:
        return np.zeros((0, 5))
    maps = maps_of(probable, torch.tensor(images), torch.tensor(labels)).numpy()
    flat = np.ones_like(maps)
    share, chance = mass_in_box(maps, boxes)
    return np.stack([labels, pointing_game(maps, boxes), pointing_game(flat, boxes), share, chance], axis=1)


def maps_of(label_map: LabelMap, images: Tensor, labels: Tensor) -> Float[Tensor, "P h w"]:
    """The whole map of one label of each of some images (which may repeat)."""
    fill = torch.as_tensor(label_map.fill)
    ids = None if label_map.ids is None else label_map.ids[images]
    part = replace(
        label_map, values=label_map.values[images], ids=ids, fill=fill[images] if fill.ndim else label_map.fill
    )
    return replace(part, extent=None).of_labels(labels[:, None])[:, 0]


# The teacher's own answers


def exact(
    store: LabelMapStore,
    manifest: Manifest,
    rows: Int64[np.ndarray, " N"],
    config: LabelQualityConfig,
    teacher: Teacher,
) -> dict[str, Any]:
    """KL(exact || pooled) by crop area: the teacher's answer to a crop's pixels against the mean logit of the crop's cells,
    and against that of the whole map, which is what a label without a place would cost.

    A crop is answered at the size that the teacher was trained at, whatever scales made the maps: enlarged twice, an object
    that already fills the crop would be twice what the teacher knows.
    """
    meta = store.meta
    if meta.kind != "logit":
        raise InputError(f"teacher: {store.path} holds {meta.kind}, expected a teacher's logits to compare with")
    chosen = np.sort(np.random.default_rng(config.seed).permutation(rows)[: config.exact_images])
    check_same_teacher(teacher, store, manifest, chosen, config)
    teacher = teacher.at_own_size()
    plain = {"flip": 0.0, "quarter_turns": False, "color_jitter": 0.0, "hue": 0.0, "randaugment_ops": 0, "cutout": 0.0}
    view = replace(config.view, **plain, interpolation=teacher.preprocessing.interpolation)
    dataset = ImageDataset(manifest, TrainView(view, teacher.image_size), config.seed, config.crops, store)
    areas, gaps = [], []
    for batch in _batches(dataset, chosen, config):
        maps, boxes = batch.label_map, batch.view.boxes
        assert maps is not None
        with torch.inference_mode():
            answer = teacher.logits(batch.images.to(_device_of(teacher))).float().cpu()
        whole = maps.extent if maps.extent is not None else whole_images(boxes)
        said = (pool_label_map(maps, CropBox(places), meta.num_classes) for places in (boxes, whole))
        gaps.append(torch.stack([divergence(answer, one, meta.groups) for one in said], dim=1).numpy())
        areas.append(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).numpy())
    area, gap = np.concatenate(areas), np.concatenate(gaps)

    def measured(which: Bool[np.ndarray, " M"]) -> dict[str, Any]:
        pooled_crop, pooled_image = (known_mean(column[which])[0] for column in gap.T)
        return {"crops": int(which.sum()), "kl_pooled": pooled_crop, "kl_whole_image": pooled_image}

    return {
        "images": len(chosen),
        "image_size": list(teacher.image_size),
        "unit": unit(meta.groups),
        "all": measured(np.ones(len(area), dtype=bool)),
        "bins": [{"area": limits, **measured(which)} for limits, which in area_bins(area, config.view.scale)],
    }


def divergence(exact: Float[Tensor, "B C"], pooled: Float[Tensor, "B C"], groups: Groups) -> Float[Tensor, " B"]:
    """KL(exact || pooled) of logits, in nats: the mean over groups of their distributions', a class for itself says yes or
    no."""

    def of_run(p: Float[Tensor, "B G n"], q: Float[Tensor, "B G n"]) -> Float[Tensor, "B G"]:
        if p.shape[2] == 1:
            p, q = torch.cat([p, -p], 2), torch.cat([q, -q], 2)
            return (p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))).sum(2)
        return F.kl_div(q.log_softmax(2), p.log_softmax(2), reduction="none", log_target=True).sum(2)

    runs = zip(*(split_groups(logits.double(), groups) for logits in (exact, pooled)), strict=True)
    return torch.cat([of_run(p, q) for p, q in runs], dim=1).mean(1)


def check_same_teacher(
    teacher: Teacher,
    store: LabelMapStore,
    manifest: Manifest,
    rows: Int64[np.ndarray, " n"],
    config: LabelQualityConfig,
) -> None:
    """Refuse a teacher that did not make these maps, by making some of them again."""
    view = EvalView(teacher.image_size, teacher.preprocessing.interpolation, "squash")
    batches = _batches(ImageDataset(manifest, view), rows[:8], config)
    some = [(batch.index.tolist(), batch.images.to(_device_of(teacher))) for batch in batches]
    try:
        verify(teacher.maps, some, store, tolerance=0.01 if store.meta.precision == "fp32" else 0.05)
    except InputError as error:
        raise InputError(f"teacher: not the one that made these maps, '{store.meta.teacher}': {error}") from error


def _device_of(teacher: Teacher) -> torch.device:
    return next(teacher.parameters()).device


def _batches(dataset: ImageDataset, rows: Int64[np.ndarray, " n"], config: LabelQualityConfig) -> Iterator[Batch]:
    order = EpochBatches(lambda _: rows, batch_size=16, drop_last=False)
    yield from Loader(dataset, order, LoaderConfig(num_workers=config.num_workers))
