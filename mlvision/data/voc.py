"""Pascal VOC: XML annotations and image-set lists, http://host.robots.ox.ac.uk/pascal/VOC/voc2007/htmldoc/."""

import os
from dataclasses import dataclass, field
from typing import Annotated
from xml.etree import ElementTree

import numpy as np

from mlvision.data.manifest import LONGEST_SIDE, DataConfig, Manifest, check_files, check_root, image_key
from mlvision.data.records import Boxes, Record, Records
from mlvision.data.text_files import check_distinct, find_split_file, read_names, read_text
from mlvision.errors import InputError, listed, shown

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# What a class is in an image that shows it by difficult objects only.
DIFFICULT = ("negative", "unknown", "positive")


@dataclass(frozen=True)
class VocConfig(DataConfig):
    """One year's folder of the devkit, such as VOCdevkit/VOC2007."""

    name: Annotated[str, "which reader: a key of DATASETS"] = "voc"
    train: Annotated[str, "name of the split to train on"] = "trainval"
    difficult: Annotated[str, "a class shown by difficult objects only is negative, unknown or positive"] = "negative"
    difficult_test: Annotated[str, "the same in the split that `test` names"] = "unknown"
    classes: Annotated[list[str], "class list in order; empty: VOC's twenty"] = field(default_factory=list)


def read_voc(config: VocConfig, split: str) -> Manifest:
    """Reads one split: the images of ImageSets/Main/{split}.txt.

    Published results differ in what they make of a class that an image shows by difficult objects only. The devkit's
    evaluation leaves the image out of that class (`unknown`, the default for `test`). CSRA trains on it as negative (the
    default), DualCoOp takes it as negative in training and test, SALGL trains on it as positive. Such classes stand in
    `Record.difficult` in any case. An object without a `difficult` element is not difficult. Parts of a person (head,
    hand, foot) are no objects. Boxes are clipped to the image, like COCO's.

    Raises:
        InputError: a list or annotation is missing or malformed, a class is not in the list, a box lies outside its image;
            the message names the file and the object.

    Source: Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010; development kit of 2007.
    """
    for option in ("difficult", "difficult_test"):
        if getattr(config, option) not in DIFFICULT:
            raise InputError(f"data.{option}={getattr(config, option)}: expected one of {', '.join(DIFFICULT)}")
    root = check_root(config, hint=": the folder with JPEGImages, Annotations and ImageSets")
    source = find_split_file(root, "ImageSets/Main/{split}.txt", split, "image set")
    classes = tuple(config.classes) or VOC_CLASSES
    convention = config.difficult_test if split == config.test else config.difficult
    ids = [_image_id(source, number, line) for number, line in enumerate(read_names(source, "image"), start=1)]
    check_distinct([image_key(".", image_id) for image_id in ids], source, "image", "line")
    records = Records(_read_record(root, image_id, classes, convention) for image_id in ids)
    check_files(config, records, source)
    num_difficult = sum(len(record.difficult) for record in records)
    protocol = (
        f"{os.path.basename(os.path.normpath(root))}, ImageSets/Main/{split}.txt, {len(records):,} images, "
        f"classes shown by difficult objects only are {convention} ({num_difficult:,} labels)"
    )
    return Manifest(classes, records, split, protocol)


def _image_id(source: str, number: int, line: str) -> str:
    if len(line.split()) != 1:
        raise InputError(
            f"{source}, line {number}: expected one image, such as 000005, got {shown(line)} (the lists of one class, such "
            "as car_train.txt, are not read: classes come from the annotations)"
        )
    return line


def _read_record(root: str, image_id: str, classes: tuple[str, ...], convention: str) -> Record:
    source = os.path.join(root, "Annotations", f"{image_id}.xml")
    size, boxes = _read_annotation(source, classes)
    easy, hard = (set(boxes.labels[boxes.difficult == flag].tolist()) for flag in (False, True))
    difficult = tuple(sorted(hard - easy))
    labels = easy | hard if convention == "positive" else easy
    key = image_key("JPEGImages", f"{image_id}.jpg")
    return Record(
        key=key,
        path=os.path.join(root, key),
        labels=tuple(sorted(labels)),
        unknown=difficult if convention == "unknown" else (),
        difficult=difficult,
        boxes=boxes,
        size=size,
    )


def _read_annotation(source: str, classes: tuple[str, ...]) -> tuple[tuple[int, int], Boxes]:
    """Width and height in pixels, and the objects, of one image."""
    try:
        document = ElementTree.fromstring(read_text(source))
    except ElementTree.ParseError as error:
        line, column = error.position
        raise InputError(f"{source}, line {line}, column {column + 1}: {str(error).split(':')[0]}") from error
    size = _numbers(document, "size", ("width", "height"), source)
    width, height = size
    if not (min(size) > 0 and max(size) <= LONGEST_SIDE and width.is_integer() and height.is_integer()):
        raise InputError(f"{source}: size is {width:g} x {height:g}, expected whole numbers of pixels above 0")
    labels, difficult, corners = [], [], []
    for number, element in enumerate(document.findall("object"), start=1):
        where = f"{source}, object {number}"
        name = (element.findtext("name") or "").strip()
        if name not in classes:
            raise InputError(f"{where}: class {shown(name)} is not in the class list: {listed(classes)}")
        flag = (element.findtext("difficult") or "0").strip()
        if flag not in ("0", "1"):
            raise InputError(f"{where}: difficult is {shown(flag)}, expected 0 or 1")
        labels.append(classes.index(name))
        difficult.append(flag == "1")
        corners.append(_read_box(element, width, height, where))
    boxes = Boxes(
        xyxy=np.array(corners, dtype=np.float32).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        crowd=np.zeros(len(labels), dtype=bool),
        difficult=np.array(difficult, dtype=bool),
        segmentation=(None,) * len(labels),
    )
    return (int(width), int(height)), boxes


def _read_box(element: ElementTree.Element, width: float, height: float, where: str) -> list[float]:
    """x1, y1, x2, y2 in [0, 1]. VOC counts pixels from 1 and includes the last: 1..width is the whole image."""
    x1, y1, x2, y2 = _numbers(element, "bndbox", ("xmin", "ymin", "xmax", "ymax"), where)
    shown = f"xmin {x1:g}, ymin {y1:g}, xmax {x2:g}, ymax {y2:g}"
    if x1 > x2 or y1 > y2:
        raise InputError(f"{where}: {shown}: expected the least corner first")
    if x1 - 1 > width or y1 - 1 > height or x2 < 0 or y2 < 0:
        raise InputError(f"{where}: {shown}, outside its image of {width:g} x {height:g} pixels")
    return np.clip([(x1 - 1) / width, (y1 - 1) / height, x2 / width, y2 / height], 0, 1).tolist()


def _numbers(parent: ElementTree.Element, name: str, keys: tuple[str, ...], where: str) -> list[float]:
    """The numbers that the child `name` holds under `keys`."""
    child = parent.find(name)
    if child is None:
        raise InputError(f"{where}: has no <{name}>")
    values = []
    for key in keys:
        text = child.findtext(key)
        try:
            value = float(text) if text is not None else np.nan
        except ValueError:
            value = np.nan
        if not np.isfinite(value):
            raise InputError(f"{where}: <{key}> of <{name}> is {shown(text)}, expected a number")
        values.append(value)
    return values
