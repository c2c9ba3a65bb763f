"""Make label maps with a teacher, import published ones, or judge them.

CONFIG names the images and classes: that of the student, which must find its maps made for its own records.

python tools/make_label_maps.py CONFIG teacher=[runs/teacher] out=maps/teacher
python tools/make_label_maps.py CONFIG teacher=[oracle] oracle_split=train out=maps/oracle
python tools/make_label_maps.py import published/label_top5_train CONFIG axes=hw out=maps/published
python tools/make_label_maps.py report maps/teacher CONFIG
"""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mlvision.config import Config, parse_run_options
from mlvision.data import CocoConfig, DataConfig, read_split
from mlvision.data.loader import MOST_WORKERS, ImageDataset, LoaderConfig, eval_loader, evenly
from mlvision.data.manifest import Manifest, check_same_classes
from mlvision.data.records import Boxes
from mlvision.data.views import EvalView
from mlvision.engine.checkpoint import check_classes
from mlvision.engine.distributed import is_main, on_every_rank
from mlvision.engine.precision import MOST_THREADS, resolve_device, resolve_precision
from mlvision.errors import InputError, check_fields
from mlvision.files import whole_file, write_json
from mlvision.label_maps.annotate import annotate, verify
from mlvision.label_maps.importers import PublishedMap, detect_axes, fingerprint, import_published
from mlvision.label_maps.oracle import oracle_map
from mlvision.label_maps.store import DTYPES, LabelMapStore, LabelMapWriter, StoreMeta
from mlvision.models import BackboneConfig
from mlvision.models.dense import COMBINATIONS, AveragedTeacher, Teacher, build_teacher, check_identity
from mlvision.models.weights import state_hash
from mlvision.options import describe_options, print_help, take_path
from mlvision.progress import Progress
from mlvision.runs.load import load_run
from mlvision.runs.splits import check_images, read_role
from mlvision.space import Groups, has_groups
from mlvision.study.label_quality import LabelQualityConfig, judge_label_maps
from mlvision.types import LabelMap

ORACLE, TIMM = "oracle", "timm"
ACTIVATIONS = ("softmax", "sigmoid")
JSON, PNG = "quality.json", "quality.png"


@dataclass(frozen=True)
class LabelMapOptions:
    """Which images, which teacher, which maps."""

    teacher: Annotated[
        list[str],
        "run folders or checkpoints, one or an ensemble; timm: the model of model.*; oracle: annotated objects",
    ] = field(default_factory=list)
    out: Annotated[str, "folder of the store; one with the same options is continued"] = ""
    split: Annotated[str, "whose images: train, val or test"] = "train"
    scales: Annotated[list[float], "averaged input sizes, as factors on the teacher's own; 2 gives a finer map"] = (
        field(default_factory=lambda: [1.0])
    )
    flip: Annotated[bool, "average with the mirrored image"] = False
    combination: Annotated[str, "of several teachers or views: mean_logit or mean_probability"] = "mean_logit"
    activation: Annotated[
        str,
        "softmax (of all classes, or each group of the data) or sigmoid; empty: as the teacher was trained (timm: softmax)",
    ] = ""
    top_k: Annotated[int, "classes that each cell stores; 0: all"] = 5
    dtype: Annotated[str, "of the stored values: float16 or uint8"] = "float16"
    grid: Annotated[list[int], "oracle: rows and columns of its maps"] = field(default_factory=lambda: [14, 14])
    oracle_split: Annotated[str, "oracle: split whose objects are drawn, by image key; empty: the images' own"] = ""
    strict: Annotated[bool, "refuse a teacher whose mean map is not its logits"] = False
    verify: Annotated[
        int, "rows of each rank, drawn at random, that are made again and compared at the end; 0: none"
    ] = 0
    batch_size: Annotated[int, "images a step; a part of what decides the last bits of a map"] = 32
    device: Annotated[str, "auto (GPU where there is one), cpu, cuda or cuda:<number>"] = "auto"
    precision: Annotated[str, "auto (fp32 on a CPU, bf16 or fp16 on a GPU), fp32, bf16 or fp16"] = "fp32"
    threads: Annotated[int, "CPU threads of torch; 0: torch's own choice"] = 0
    num_workers: Annotated[int, "processes that read images; 0: the main one"] = 2
    model: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=CocoConfig)

    def __post_init__(self) -> None:
        rules = (
            (
                "scales",
                1 <= len(self.scales) <= 32 and 0 < min(self.scales) <= max(self.scales) <= 16,
                "numbers above 0, up to 16",
            ),
            ("combination", self.combination in COMBINATIONS, f"one of {', '.join(COMBINATIONS)}"),
            ("top_k", self.top_k >= 0, "0 (all classes) or more"),
            ("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            ("activation", self.activation in ("", *ACTIVATIONS), f"one of {', '.join(ACTIVATIONS)}, or nothing"),
            ("grid", len(self.grid) == 2 and 1 <= min(self.grid) <= max(self.grid) <= 1024, "[rows, columns]"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("verify", self.verify >= 0, "0 or more"),
            ("threads", 0 <= self.threads <= MOST_THREADS, f"0 to {MOST_THREADS}"),
            ("num_workers", 0 <= self.num_workers <= MOST_WORKERS, f"0 to {MOST_WORKERS}"),
        )
        check_fields(self, "", rules)


@dataclass(frozen=True)
class ImportOptions:
    """Which published maps, and how they are read (`mlvision.label_maps.importers`)."""

    out: Annotated[str, "folder of the store; one with the same options is continued"] = ""
    split: Annotated[str, "whose images: train, val or test"] = "train"
    axes: Annotated[str, "order of the files' map axes: hw (rows first) or wh; empty: found with reference="] = ""
    reference: Annotated[str, "store of another teacher's maps of the same images, which tells the axes"] = ""
    fill: Annotated[
        str, "of classes that are not stored. zero: a logit of 0, as published; floor: the cell's least"
    ] = "zero"
    num_workers: Annotated[int, "processes that look for unreadable images; 0: the main one"] = 2
    data: DataConfig = field(default_factory=CocoConfig)

    def __post_init__(self) -> None:
        check_fields(self, "", [("num_workers", 0 <= self.num_workers <= MOST_WORKERS, f"0 to {MOST_WORKERS}")])


@dataclass(frozen=True)
class ReportOptions(LabelQualityConfig):
    """Which maps are judged, and by what."""

    split: Annotated[str, "whose images the maps are of: train, val or test"] = "train"
    labels_split: Annotated[
        str, "split whose labels and objects judge the maps, matched by image key; empty: the images' own"
    ] = ""
    out: Annotated[str, f"folder for {JSON} and {PNG}; empty: the store's own"] = ""
    teacher: Annotated[
        list[str], "run folders of the teacher: compare pooled labels with its answers to real crops"
    ] = field(default_factory=list)
    device: Annotated[str, "of the teacher: auto (GPU where there is one), cpu, cuda or cuda:<number>"] = "auto"
    threads: Annotated[int, "CPU threads of torch; 0: torch's own choice"] = 0
    data: DataConfig = field(default_factory=CocoConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "", [("threads", 0 <= self.threads <= MOST_THREADS, f"0 to {MOST_THREADS}")])


MODES = {
    "": ("", LabelMapOptions),
    "import": ("import ROOT ", ImportOptions),
    "report": ("report STORE ", ReportOptions),
}


@dataclass(frozen=True)
class Source:
    """What makes the maps of a list of images: `maps_of` takes what `batches` gives beside the rows.

    Attributes:
        batches: the images of some rows, in their order.
        meta: what these maps are; but for the list of images.
    """

    maps_of: Callable[[Any], Float[Tensor, "B C h w"]]
    batches: Callable[[Sequence[int]], Iterator[tuple[Sequence[int], Any]]]
    meta: dict[str, Any]


def usage(mode: str) -> str:
    first, options = MODES[mode]
    title = f"Options of {mode}:" if mode else "Options (import --help and report --help list theirs):"
    return (
        f"usage: python tools/make_label_maps.py {first}[config.yaml ...] [key=value ...]\n\n{__doc__}\n{title}\n"
        f"{describe_options(options)}"
    )


def main(argv: list[str]) -> None:
    print_help(argv, lambda: usage(next((word for word in argv if word in MODES), "")), needed=True)
    parse = partial(parse_run_options, prog="python tools/make_label_maps.py", description=__doc__)
    if argv[0] == "report":
        path, rest = take_path(argv[1:], "the folder of a store")
        print(report(path, parse(ReportOptions, rest)))
        return
    if argv[0] == "import":
        path, rest = take_path(argv[1:], "the folder of published maps")
        options = parse(ImportOptions, rest)
        store = import_tree(path, options)
    else:
        options = parse(LabelMapOptions, argv)
        store = make(options)
    print(f"{len(store)} maps of {store.meta.grid[0]}x{store.meta.grid[1]} cells: {options.out}")


def make(options: LabelMapOptions) -> LabelMapStore:
    """The finished store.

    Raises:
        InputError: a teacher, images or a store that do not fit together.
    """
    source, writer = on_every_rank(lambda: prepare(options))
    rows = [row for block in writer.outstanding() for row in block]
    if rows:
        annotate(source.maps_of, source.batches(rows), writer)
    store = LabelMapStore.open(options.out)
    if options.verify:
        # Whole blocks, of this rank: a batch of another size may differ in its last bits.
        own = range(writer.rank * options.batch_size, len(store), writer.world_size * options.batch_size)
        blocks = np.random.default_rng(0).permutation(own)
        chosen = sorted(blocks[: -(-options.verify // options.batch_size)])
        rows = [row for start in chosen for row in range(start, min(start + options.batch_size, len(store)))]
        worst = verify(
            source.maps_of, source.batches(rows), store, tolerance=8e-3 if options.dtype == "uint8" else 1e-3
        )
        print(f"verified {len(rows)} maps: largest difference {worst:.2g} of their size")
    return store


def prepare(options: LabelMapOptions) -> tuple[Source, LabelMapWriter]:
    """What makes the maps, and where this rank writes them."""
    if not options.out or not options.teacher:
        raise InputError(f"expected teacher= and out=, got {options.teacher} and '{options.out}'")
    if options.threads:
        torch.set_num_threads(options.threads)
    manifest, bad = read_images(options)
    for _, key, reason in bad if is_main() else ():
        print(f"left out: {key} ({reason})", file=sys.stderr)
    source = oracle_source(options, manifest) if options.teacher == [ORACLE] else teacher_source(options, manifest)
    meta = StoreMeta(
        record_hash=manifest.hash,
        num_records=len(manifest),
        class_hash=manifest.class_hash,
        block_size=options.batch_size,
        dtype=options.dtype,
        **source.meta,
    )
    # From the environment: processes that were started apart, and know nothing of each other, can share the work too.
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    writer = LabelMapWriter.create_or_resume(options.out, meta, rank=rank, world_size=world_size)
    return source, writer


def import_tree(root: str, options: ImportOptions) -> LabelMapStore:
    """The finished store of published maps.

    Raises:
        InputError: files that are missing or not in the layout, axes that nothing tells, or another store in its place.
    """
    if not options.out or bool(options.axes) == bool(options.reference):
        given = ", ".join(f"{name}={getattr(options, name)}" for name in ("out", "axes", "reference"))
        raise InputError(f"expected out= and one of axes= and reference=, got {given}")
    manifest, _ = read_images(options)
    keys, num_classes = manifest.keys, len(manifest.classes)
    axes = options.axes or axes_by(options.reference, root, manifest, options.fill)
    first = next(import_published(root, keys, num_classes, axes=axes, fill=options.fill)).values  # all files are there
    meta = StoreMeta(
        record_hash=manifest.hash,
        num_records=len(manifest),
        class_hash=manifest.class_hash,
        num_classes=num_classes,
        teacher=f"published maps in {Path(root).name}",
        teacher_hash=fingerprint(root, keys),
        grid=(first.shape[1], first.shape[2]),
        kind="logit",
        groups=(num_classes,),
        top_k=len(first),
        block_size=LabelMapOptions.batch_size,
        precision="as published",
        preprocessing={"axes": axes, "fill": options.fill},
    )
    writer = LabelMapWriter.create_or_resume(options.out, meta)
    blocks = writer.outstanding()
    wanted = [keys[row] for block in blocks for row in block]
    published = import_published(root, wanted, num_classes, axes=axes, fill=options.fill)  # looks for the files once
    with Progress(len(wanted), "published maps") as progress:
        for block in blocks:
            maps = stacked(itertools.islice(published, len(block)))
            writer.write(block, maps.values, maps.ids, torch.as_tensor(maps.fill))
            progress.update(len(block))
    return LabelMapStore.open(options.out)


def axes_by(reference: str, root: str, manifest: Manifest, fill: str, images: int = 64) -> str:
    """The axes of the published maps, by another teacher's maps of some of the images."""
    store = LabelMapStore.open(reference)
    store.check(record_hash=manifest.hash, class_hash=manifest.class_hash, num_records=len(manifest))
    rows = evenly(images, len(manifest)).tolist()
    keys = [manifest.records[row].key for row in rows]
    as_stored = stacked(import_published(root, keys, len(manifest.classes), axes="hw", fill=fill))
    return detect_axes(as_stored, store.read(rows), len(manifest.classes))


def stacked(published: Iterable[PublishedMap]) -> LabelMap:
    maps = list(published)
    values, ids, fills = (torch.stack([getattr(one, name) for one in maps]) for name in ("values", "ids", "fill"))
    return LabelMap(values=values, ids=ids.int(), kind="logit", fill=fills)


def read_images(
    options: LabelMapOptions | ImportOptions | ReportOptions,
) -> tuple[Manifest, list[tuple[str, str, str]]]:
    """The images as a student's run reads them, and (split, key, reason) of each that was left out."""
    # Reading the records needs of a run's options no more than these.
    config = Config(data=options.data, loader=LoaderConfig(num_workers=options.num_workers))
    return read_role(config, options.split)


def teacher_source(options: LabelMapOptions, manifest: Manifest) -> Source:
    """Maps by networks. The whole image is squashed to the teacher's size, so that map and image share coordinates."""
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    space = manifest.space
    groups = {"": None, "softmax": space.with_softmax().groups, "sigmoid": space.groups}[options.activation]
    teacher, groups, weights_hash = build_teachers(options, manifest, device, groups)
    teacher.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    view = EvalView(teacher.image_size, teacher.preprocessing.interpolation, "squash")
    dataset = ImageDataset(manifest, view)
    loading = LoaderConfig(eval_batch_size=options.batch_size, num_workers=options.num_workers)

    def batches(rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        for batch in eval_loader(manifest, view, loading, rows=np.asarray(rows)):
            yield batch.index.tolist(), batch.images.to(device).contiguous(memory_format=torch.channels_last)

    def maps_of(images: Tensor) -> Tensor:
        with precision.autocast():
            return teacher.maps(images)

    # Read here: loader processes for so few images would be waited for at the end.
    some = torch.stack([dataset[0, row].views[0].image for row in range(min(8, len(manifest)))]).to(device)
    gap = check_identity(teacher, some, options.strict)
    if gap is not None and is_main():
        print(
            f"approximate: the mean of the maps differs from the teacher's logits by up to {gap:.3g}", file=sys.stderr
        )
    return Source(
        maps_of,
        batches,
        {
            "num_classes": teacher.num_classes,
            "teacher": ", ".join(options.teacher),
            "teacher_hash": weights_hash,
            "grid": teacher.grid,
            "kind": "logit",
            "groups": groups,
            "top_k": min(options.top_k, teacher.num_classes),
            "precision": precision.name,
            "approximate": gap,
            "preprocessing": {
                **asdict(teacher.preprocessing),
                "size": list(teacher.image_size),
                **{name: getattr(options, name) for name in ("scales", "flip", "combination")},
            },
        },
    )


def build_teachers(
    options: LabelMapOptions, manifest: Manifest, device: torch.device, groups: Groups | None = None
) -> tuple[Teacher, Groups, str]:
    """The teacher, averaged where that is asked for, the groups that share a softmax, and the hash of all weights.

    Args:
        groups: None: as the teachers were trained.

    Raises:
        InputError: a teacher of other classes than the data's, or teachers trained with different losses.
    """
    teachers, trained = [], set[Groups]()
    for name in options.teacher:
        if name == TIMM:
            check_images(options.model.in_chans, manifest)
            teachers.append(build_teacher(options.model))
            trained.add(manifest.space.with_softmax().groups)
        else:
            run = load_run(name, device=str(device))
            check_images(run.config.model.in_chans, manifest)
            check_classes(Path(name), list(run.classes), manifest.classes)
            teachers.append(build_teacher(run.method))
            trained.add(run.space.groups)
        if teachers[-1].num_classes != len(manifest.classes):
            raise InputError(
                f"teacher: {name} has {teachers[-1].num_classes} classes, the data has {len(manifest.classes)}"
            )
    if groups is None and len(trained) > 1:
        words = sorted("softmax" if has_groups(of_teacher) else "sigmoid" for of_teacher in trained)
        raise InputError(f"teacher: trained as {' and '.join(words)}; say which to use with activation=")
    groups = trained.pop() if groups is None else groups
    if len(teachers) == 1 and options.scales == [1.0] and not options.flip:
        return teachers[0], groups, state_hash(teachers)
    averaged = AveragedTeacher(
        teachers, scales=options.scales, flip=options.flip, combination=options.combination, groups=groups
    )
    return averaged, groups, state_hash(teachers)


def oracle_source(options: LabelMapOptions, manifest: Manifest) -> Source:
    """Maps of the annotated objects' areas: C maps of what objects cover, then C of what crowd regions cover."""
    drawn = read_split(options.data, options.oracle_split) if options.oracle_split else manifest
    check_classes(Path(drawn.split), list(drawn.classes), manifest.classes)
    objects = {record.key: record.boxes for record in drawn.records}
    missing = [record.key for record in manifest.records if objects.get(record.key) is None]
    if missing:
        raise InputError(f"oracle: {len(missing)} images have no objects in '{drawn.split}', the first is {missing[0]}")
    rows_columns, num_classes = (options.grid[0], options.grid[1]), len(manifest.classes)

    def cover(row: int) -> Tensor:
        boxes = objects[manifest.records[row].key]
        assert boxes is not None
        one = oracle_map(boxes.xyxy, boxes.labels, boxes.crowd, boxes.segmentation, num_classes, rows_columns)
        maps = torch.zeros(2, num_classes, *rows_columns)
        maps[0, one.ids], maps[1, one.ids] = torch.from_numpy(one.cover), torch.from_numpy(one.unknown)
        return maps.flatten(0, 1)

    def batches(rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        for start in range(0, len(rows), options.batch_size):
            part = rows[start : start + options.batch_size]
            yield part, part

    return Source(
        lambda rows: torch.stack([cover(row) for row in rows]),
        batches,
        {
            "num_classes": 2 * num_classes,
            "teacher": f"{ORACLE} of {drawn.split}",
            "teacher_hash": objects_hash([objects[record.key] for record in manifest.records]),
            "grid": rows_columns,
            "kind": "probability",
            "groups": (),
            "top_k": 0,
        },
    )


def objects_hash(objects: Iterable[Boxes | None]) -> str:
    """sha256 of all annotated objects: other boxes or outlines give other maps."""
    digest = hashlib.sha256()
    for boxes in objects:
        assert boxes is not None
        for column in (boxes.xyxy, boxes.labels, boxes.crowd):
            digest.update(np.ascontiguousarray(column).tobytes())
        outlines = json.dumps(boxes.segmentation, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
        digest.update(outlines.encode())
    return digest.hexdigest()


def report(path: str, options: ReportOptions) -> str:
    """Judge the label maps of a store, write quality.json and quality.png, and sum up.

    Raises:
        InputError: a store, images, labels or a teacher that do not fit together.
    """
    from mlvision.study.quality_page import draw_quality, summarise  # matplotlib: a second to import

    if options.threads:
        torch.set_num_threads(options.threads)
    store = LabelMapStore.open(path)
    folder = Path(options.out or path)
    if not folder.is_dir():
        raise InputError(f"out: the folder {folder} does not exist")
    manifest, _ = read_images(options)
    teacher = made_by(store, manifest, options) if options.teacher else None
    quality = judge_label_maps(store, manifest, judging_manifest(manifest, options), options, teacher)
    write_json(folder / JSON, quality)
    with whole_file(folder / PNG, "wb") as file:
        draw_quality(file, quality)
    return f"{summarise(quality)}\nwritten: {folder / JSON}, {folder / PNG}"


def judging_manifest(manifest: Manifest, options: ReportOptions) -> Manifest:
    """What is known of each image of `manifest`, in its order.

    Raises:
        InputError: the other split lacks an image, or has other classes.
    """
    if not options.labels_split:
        return manifest
    other = read_split(options.data, options.labels_split)
    check_same_classes(manifest, other)
    place = {key: row for row, key in enumerate(other.keys)}
    missing = [key for key in manifest.keys if key not in place]
    if missing:
        raise InputError(
            f"labels_split: '{other.split}' lacks {len(missing):,} of the {len(manifest):,} images of '{manifest.split}', "
            f"the first is {missing[0]}"
        )
    return other.select(place[key] for key in manifest.keys)


def made_by(store: LabelMapStore, manifest: Manifest, options: ReportOptions) -> Teacher:
    """The runs as the store averaged them."""
    if TIMM in options.teacher:
        raise InputError(f"teacher: the report compares with run folders, got {TIMM}")
    made = store.meta.preprocessing
    asked = LabelMapOptions(
        teacher=options.teacher,
        **{name: made[name] for name in ("scales", "flip", "combination") if name in made},
    )
    device = resolve_device(options.device)
    return build_teachers(asked, manifest, device, store.meta.groups)[0].to(device)
