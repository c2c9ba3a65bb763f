"""Pascal VOC: XML annotations and image-set lists, http://host.robots.ox.ac.uk/pascal/VOC/voc2007/htmldoc/."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated
from xml.etree import ElementTree

import numpy as np

from mlvision.data.manifest import LONGEST_SIDE, Manifest, image_key
from mlvision.data.readers.base import DataConfig, check_files, check_root
from mlvision.data.records import LabelLists, Objects, Outlines, Records
from mlvision.errors import InputError, listed, shown
from mlvision.text_files import check_distinct, find_split_file, read_names, read_text

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

    def read(self, split: str) -> Manifest:
        """Reads one split: the images of ImageSets/Main/{split}.txt.

        Published results differ in what they make of a class that an image shows by difficult objects only. The devkit's
        evaluation leaves the image out of that class (`unknown`, the default for `test`). CSRA trains on it as negative (the
        default), DualCoOp takes it as negative in training and test, SALGL trains on it as positive. Such classes stand in
        `Record.difficult` in any case. An object without a `difficult` element is not difficult. Parts of a person (head,
        hand, foot) are no objects. Boxes are clipped to the image, like COCO's.

        Raises:
            InputError: a list or annotation is missing or malformed, a class is not in the list, a box lies outside its
                image; the message names the file and the object.

        Source: Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010; development kit of 2007.
        """
        for option in ("difficult", "difficult_test"):
            if getattr(self, option) not in DIFFICULT:
                raise InputError(f"data.{option}={getattr(self, option)}: expected one of {', '.join(DIFFICULT)}")
        root = check_root(self, hint=": the folder with JPEGImages, Annotations and ImageSets")
        source = find_split_file(root, "ImageSets/Main/{split}.txt", split, "image set")
        classes = tuple(self.classes) or VOC_CLASSES
        convention = self.difficult_test if split == self.test else self.difficult
        ids = [_image_id(source, number, line) for number, line in enumerate(read_names(source, "image"), start=1)]
        check_distinct([image_key(".", image_id) for image_id in ids], source, "image", "line")
        records, num_difficult = _read_records(root, ids, classes, convention)
        check_files(self, records, source)
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


def _read_records(root: str, ids: Sequence[str], classes: tuple[str, ...], convention: str) -> tuple[Records, int]:
    """The images' records; and how many classes their images show by difficult objects only."""
    class_of = {name: c for c, name in enumerate(classes)}
    sizes, ends, corners, labels, is_difficult = [], [], [], [], []
    present, difficult = [], []
    for image_id in ids:
        size, objects = _read_annotation(os.path.join(root, "Annotations", f"{image_id}.xml"), class_of)
        sizes.append(size)
        corners += [box for box, _, _ in objects]
        labels += [label for _, label, _ in objects]
        is_difficult += [flag for _, _, flag in objects]
        ends.append(len(labels))
        easy, hard = ({label for _, label, flag in objects if flag == of_kind} for of_kind in (False, True))
        difficult.append(tuple(sorted(hard - easy)))
        present.append(tuple(sorted(easy | hard if convention == "positive" else easy)))
    objects = Objects(
        ends=np.array(ends, dtype=np.int64),
        exists=np.ones(len(ids), dtype=bool),
        xyxy=np.clip(np.array(corners, dtype=np.float64).reshape(-1, 4), 0, 1).astype(np.float32),
        labels=np.array(labels, dtype=np.int32),
        crowd=np.zeros(len(labels), dtype=bool),
        difficult=np.array(is_difficult, dtype=bool),
        outlines=Outlines.of([None] * len(labels)),
    )
    shown_hard = LabelLists(difficult)
    records = Records.under(
        root,
        [image_key("JPEGImages", f"{image_id}.jpg") for image_id in ids],
        LabelLists(present),
        unknown=shown_hard if convention == "unknown" else None,
        difficult=shown_hard,
        objects=objects,
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
    )
    return records, sum(map(len, difficult))


def _read_annotation(
    source: str, class_of: Mapping[str, int]
) -> tuple[tuple[int, int], list[tuple[list[float], int, bool]]]:
    """Of one image: width and height in pixels; and box, class and whether it is difficult of each object."""
    try:
        document = ElementTree.fromstring(read_text(source))
    except ElementTree.ParseError as error:
        line, column = error.position
        raise InputError(f"{source}, line {line}, column {column + 1}: {str(error).split(':')[0]}") from error
    size = _numbers(document, "size", ("width", "height"), source)
    width, height = size
    if not (min(size) > 0 and max(size) <= LONGEST_SIDE and width.is_integer() and height.is_integer()):
        raise InputError(f"{source}: size is {width:g} x {height:g}, expected whole numbers of pixels above 0")
    objects = []
    for number, element in enumerate(document.findall("object"), start=1):
        where = f"{source}, object {number}"
        name = (element.findtext("name") or "").strip()
        if name not in class_of:
            raise InputError(f"{where}: class {shown(name)} is not in the class list: {listed(list(class_of))}")
        flag = (element.findtext("difficult") or "0").strip()
        if flag not in ("0", "1"):
            raise InputError(f"{where}: difficult is {shown(flag)}, expected 0 or 1")
        objects.append((_read_box(element, width, height, where), class_of[name], flag == "1"))
    return (int(width), int(height)), objects


def _read_box(element: ElementTree.Element, width: float, height: float, where: str) -> list[float]:
    """x1, y1, x2, y2, not yet clipped to [0, 1]. VOC counts pixels from 1 and includes the last: 1..width is all."""
    x1, y1, x2, y2 = _numbers(element, "bndbox", ("xmin", "ymin", "xmax", "ymax"), where)
    shown = f"xmin {x1:g}, ymin {y1:g}, xmax {x2:g}, ymax {y2:g}"
    if x1 > x2 or y1 > y2:
        raise InputError(f"{where}: {shown}: expected the least corner first")
    if x1 - 1 > width or y1 - 1 > height or x2 < 0 or y2 < 0:
        raise InputError(f"{where}: {shown}, outside its image of {width:g} x {height:g} pixels")
    return [(x1 - 1) / width, (y1 - 1) / height, x2 / width, y2 / height]


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
