"""voc.py on files laid out as VOC2007's development kit documents them."""

import numpy as np
import pytest
from layouts import VocObject, write_voc

from mlvision.data import build_manifest
from mlvision.data.manifest import check_same_classes
from mlvision.data.readers.voc import VOC_CLASSES
from mlvision.errors import InputError

TRAINVAL = {
    "000012": (
        (500, 333),
        [
            VocObject("car", (156, 97, 351, 270)),
            VocObject("person", (1, 1, 500, 333), difficult=1),
            VocObject("car", (10, 20, 30, 40), difficult=1),
        ],
    ),
    "000005": ((40, 80), []),
}
TEST = {
    "000001": ((353, 500), [VocObject("dog", (48, 240, 195, 371)), VocObject("person", (8, 12, 352, 498))]),
    "000002": (
        (335, 500),
        [VocObject("train", (139, 200, 207, 301), difficult=1), VocObject("sofa", (1, 1, 9, 9), None)],
    ),
}
CAR, DOG, PERSON, SOFA, TRAIN = (VOC_CLASSES.index(name) for name in ("car", "dog", "person", "sofa", "train"))


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "VOC2007"
    write_voc(folder, {"trainval": TRAINVAL, "test": TEST})
    return folder


def read(root, split="trainval", **options):
    return build_manifest("voc", root=str(root), split=split, **options)


def test_records_by_hand(root):
    manifest = read(root)

    assert [r.key for r in manifest.records] == ["JPEGImages/000012.jpg", "JPEGImages/000005.jpg"]
    first, second = manifest.records
    assert first.path == str(root / "JPEGImages" / "000012.jpg")
    assert (first.size, second.size) == ((500, 333), (40, 80))
    # A car that is not difficult makes the class present whatever the other car is; the person is difficult alone.
    assert (first.labels, first.unknown, first.difficult) == ((CAR,), (), (PERSON,))
    assert (second.labels, second.unknown, second.difficult) == ((), (), ())
    boxes = first.boxes
    # Pixels 156..351 of 500, counted from 1: the box begins at the left edge of pixel 156. The whole image is 0..1.
    np.testing.assert_allclose(boxes.xyxy[0], [155 / 500, 96 / 333, 351 / 500, 270 / 333], rtol=1e-6)
    assert boxes.xyxy[1].tolist() == [0, 0, 1, 1]
    assert boxes.labels.tolist() == [CAR, PERSON, CAR]
    assert boxes.difficult.tolist() == [False, True, True]
    assert boxes.segmentation == (None, None, None)
    assert len(second.boxes) == 0
    assert second.boxes.xyxy.shape == (0, 4)


def test_twenty_classes_by_name(root):
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    check_same_classes(read(root), read(root, "test"))


@pytest.mark.parametrize(
    ("convention", "labels", "unknown"),
    [("negative", (CAR,), ()), ("unknown", (CAR,), (PERSON,)), ("positive", (CAR, PERSON), ())],
)
def test_three_conventions_for_difficult_objects(root, convention, labels, unknown):
    manifest = read(root, difficult=convention)

    assert (manifest.records[0].labels, manifest.records[0].unknown) == (labels, unknown)
    assert manifest.records[0].difficult == (PERSON,)
    assert f"difficult objects only are {convention}" in manifest.protocol
    expected = {"negative": 0, "unknown": np.nan, "positive": 1}[convention]
    np.testing.assert_array_equal(manifest.targets[0, [CAR, PERSON, DOG]], [1, expected, 0])


def test_the_test_split_has_its_own_convention(root):
    # The devkit's evaluation leaves them out. An object without the element is not difficult.
    assert read(root, "test").records[1].unknown == (TRAIN,)
    assert read(root, "test").records[1].labels == (SOFA,)
    assert read(root, "test", difficult_test="negative").records[1].unknown == ()
    assert read(root, "test", difficult_test="positive").records[1].labels == (SOFA, TRAIN)
    assert read(root, "test", test="trainval").records[1].unknown == ()
    for option in ("difficult", "difficult_test"):
        with pytest.raises(InputError, match=f"data.{option}=ignore: expected one of negative, unknown, positive"):
            read(root, **{option: "ignore"})


def test_boxes_are_clipped_and_refused_outside(root):
    def with_box(*box):
        write_voc(root, {"trainval": {"000012": ((100, 50), [VocObject("cat", box)])}})
        return read(root).records[0].boxes.xyxy[0]

    np.testing.assert_allclose(with_box(0, 0, 100.5, 25.5), [0, 0, 1, 0.51], rtol=1e-6)
    for box in ((102, 1, 103, 9), (1, 52, 9, 53), (-9, 1, -1, 9)):
        with pytest.raises(InputError, match="000012.xml, object 1: .*outside its image of 100 x 50"):
            with_box(*box)
    with pytest.raises(InputError, match="object 1: xmin 9, ymin 1, xmax 8, ymax 9: expected the least corner first"):
        with_box(9, 1, 8, 9)


def annotation(root):
    return root / "Annotations" / "000012.xml"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<name>car</name>", "<name>lorry</name>", "object 1: class 'lorry' is not in the class list: aeroplane,"),
        ("<name>car</name>", "", "object 1: class '' is not in the class list"),
        ("<difficult>1</difficult>", "<difficult>yes</difficult>", "object 2: difficult is 'yes', expected 0 or 1"),
        ("<xmin>156</xmin>", "<xmin>wide</xmin>", "object 1: <xmin> of <bndbox> is 'wide', expected a number"),
        ("<xmin>156</xmin>", "", "object 1: <xmin> of <bndbox> is None, expected a number"),
        ("<width>500</width>", "<width>0</width>", "size is 0 x 333, expected whole numbers of pixels above 0"),
        ("<size>", "<sizes>", "000012.xml, line 1, column .*: mismatched tag"),
    ],
)
def test_a_faulty_annotation_is_refused(root, old, new, message):
    text = annotation(root).read_text()
    assert old in text
    annotation(root).write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        read(root)
    assert str(annotation(root)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_annotation_without_size_or_box_is_refused(root):
    text = annotation(root).read_text()
    annotation(root).write_text(text.replace("size>", "extent>"))
    with pytest.raises(InputError, match="000012.xml: has no <size>"):
        read(root)
    annotation(root).write_text(text.replace("bndbox>", "box>"))
    with pytest.raises(InputError, match="000012.xml, object 1: has no <bndbox>"):
        read(root)


def test_faulty_image_sets_are_refused(root):
    with pytest.raises(InputError, match="ImageSets/Main/val.txt: no such image set; splits there: test, trainval"):
        read(root, "val")
    lists = root / "ImageSets" / "Main"
    (lists / "car_train.txt").write_text("000012  1\n000005 -1\n")
    with pytest.raises(InputError, match="car_train.txt, line 1: expected one image, such as 000005, got '000012 1'"):
        read(root, "car_train")
    (lists / "val.txt").write_text("000012\n000005\n000012\n")
    with pytest.raises(InputError, match="val.txt, line 3: repeats the image '000012' of line 1"):
        read(root, "val")
    (lists / "val.txt").write_text("000099\n")
    with pytest.raises(InputError, match="Annotations/000099.xml: cannot be read: No such file"):
        read(root, "val")


def test_missing_images_are_refused(root):
    (root / "JPEGImages" / "000005.jpg").unlink()
    with pytest.raises(InputError, match="trainval.txt: 1 of its 2 image files are missing, .*000005.jpg"):
        read(root)
    assert len(read(root, check_files=False)) == 2


def test_own_classes_replace_the_twenty(root):
    assert read(root, classes=["person", "car"]).records[0].labels == (1,)
