"""Tiny data sets written in the layouts that their publishers use; each function cites what it copies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape


class VocObject(NamedTuple):
    """One object of a VOC annotation; the box in VOC's pixels, counted from 1."""

    name: str
    box: tuple[float, float, float, float]
    difficult: int | None = 0


def voc_annotation(image_id: str, size: tuple[int, int], objects: Sequence[VocObject]) -> str:
    """The XML of one image as VOC2007's development kit has it; the person has a part, as some have in later years."""
    elements = []
    for name, box, difficult in objects:
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
        part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        elements.append(
            f"<object><name>{escape(name)}</name><pose>Unspecified</pose><truncated>0</truncated>{flag}"
            f"<bndbox>{corners}</bndbox>{part if name == 'person' else ''}</object>"
        )
    return (
        f"<annotation><folder>VOC2007</folder><filename>{image_id}.jpg</filename>"
        "<source><database>The VOC2007 Database</database></source>"
        f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
        f"<segmented>0</segmented>{''.join(elements)}</annotation>\n"
    )


def write_voc(root: Path, splits: Mapping[str, Mapping[str, tuple[tuple[int, int], Sequence[VocObject]]]]) -> None:
    """ImageSets/Main/{split}.txt and Annotations/{image}.xml, and an empty JPEGImages/{image}.jpg where there is none."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{image}\n" for image in images))
        for image, (size, objects) in images.items():
            (root / "Annotations" / f"{image}.xml").write_text(voc_annotation(image, size, objects))
            path = root / "JPEGImages" / f"{image}.jpg"
            if not path.exists():
                path.touch()


def write_nuswide(
    root: Path,
    concepts: Sequence[str],
    images: Mapping[str, tuple[str, Sequence[int]]],
    order: Mapping[str, Sequence[int]],
) -> None:
    """NUS-WIDE's archives unpacked: lists with backslashes, and a file of 0 and 1 for each concept and list.

    `images`: name to (split, a value for each concept), in the order of Imagelist.txt; `order`: the rows of each split's own
    list. Source of the layout: the names of the files in ImageList.zip, Groundtruth.zip and ConceptsList.zip.
    """
    names = list(images)
    columns = {name: values for name, (_, values) in images.items()}
    lists = {"": names, **{split: [names[row] for row in rows] for split, rows in order.items()}}
    for folder in ("ImageList", "ConceptsList", "Groundtruth/AllLabels", "Groundtruth/TrainTestLabels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ConceptsList" / "Concepts81.txt").write_text("".join(f"{concept}\n" for concept in concepts))
    for split, listed in lists.items():
        (root / "ImageList" / f"{split}Imagelist.txt").write_text("".join(f"{name}\r\n" for name in listed))
        for c, concept in enumerate(concepts):
            path = f"TrainTestLabels/Labels_{concept}_{split}.txt" if split else f"AllLabels/Labels_{concept}.txt"
            (root / "Groundtruth" / path).write_text("".join(f"{columns[name][c]}\n" for name in listed))
    for name in names:
        path = root / "Flickr" / name.replace("\\", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()
