"""coco.py on a file laid out as https://cocodataset.org/#format-data and the instances of COCO 2017 have it.

From that page: `annotation{"id", "image_id", "category_id", "segmentation": RLE or [polygon], "area", "bbox":
[x,y,width,height], "iscrowd": 0 or 1}`, `categories[{"id", "name", "supercategory"}]`, image `{"id", "width", "height",
"file_name", ...}`; an RLE is `{"counts", "size"}` with size [height, width] and runs in column order.
"""

import copy
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from mlvision.data import CocoConfig, build_manifest, read_split
from mlvision.data.manifest import check_same_classes
from mlvision.data.readers.coco import _decode_runs
from mlvision.errors import InputError

# 4 x 3 pixels (width x height), columns first: the second column and the lower two pixels of the last are set.
COLUMN_RUNS = [3, 3, 4, 2]
MASK = np.array([[0, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 1]], dtype=np.uint8)

DOCUMENT = {
    "info": {"description": "made by hand", "version": "1.0", "year": 2017},
    "licenses": [{"id": 1, "name": "CC BY", "url": "http://creativecommons.org/licenses/by/2.0/"}],
    "images": [
        {"id": 139, "width": 640, "height": 426, "file_name": "000000000139.jpg", "license": 1},
        {"id": 785, "width": 100, "height": 50, "file_name": "000000000785.jpg", "license": 1},
        {"id": 42, "width": 4, "height": 3, "file_name": "000000000042.jpg", "license": 1},
        {"id": 7, "width": 30, "height": 20, "file_name": "000000000007.jpg", "license": 1},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 785,
            "category_id": 13,
            "segmentation": [[10, 5, 60, 5, 60, 30], [0, 0, 100, 0, 100, 50, 0, 50]],
            "area": 1250.0,
            "bbox": [10, 5, 50, 25],
            "iscrowd": 0,
        },
        {"id": 2, "image_id": 139, "category_id": 1, "area": 9.0, "bbox": [64.0, 42.6, 128.0, 213.0], "iscrowd": 0},
        {
            "id": 3,
            "image_id": 42,
            "category_id": 90,
            "segmentation": {"counts": COLUMN_RUNS, "size": [3, 4]},
            "area": 5,
            "bbox": [1, 0, 3, 3],
            "iscrowd": 1,
        },
        {"id": 4, "image_id": 139, "category_id": 1, "area": 9.0, "bbox": [-5, 400, 700, 40], "iscrowd": 0},
        {"id": 5, "image_id": 139, "category_id": 90, "area": 0.0, "bbox": [320, 213, 0, 0], "iscrowd": 0},
    ],
    "categories": [
        {"supercategory": "outdoor", "id": 13, "name": "stop sign"},
        {"supercategory": "person", "id": 1, "name": "person"},
        {"supercategory": "indoor", "id": 90, "name": "toothbrush"},
    ],
}


@pytest.fixture
def root(tmp_path):
    """A COCO folder with the document as split val2017 and empty image files: the reader looks only at their names."""
    write(tmp_path, DOCUMENT)
    (tmp_path / "val2017").mkdir()
    for image in DOCUMENT["images"]:
        (tmp_path / "val2017" / image["file_name"]).touch()
    return tmp_path


def write(root, document, split="val2017"):
    (root / "annotations").mkdir(exist_ok=True)
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def read(root, split="val2017", **options):
    return build_manifest("coco", root=str(root), split=split, **options)


def test_classes_labels_and_boxes_by_hand(root):
    manifest = read(root)

    assert manifest.classes == ("person", "stop sign", "toothbrush")  # ids 1, 13, 90
    assert [r.key for r in manifest.records] == [f"val2017/{n:012d}.jpg" for n in (139, 785, 42)]
    first, second, third = manifest.records
    assert first.path == str(root / "val2017" / "000000000139.jpg")
    assert (first.labels, second.labels, third.labels) == ((0, 2), (1,), (2,))
    assert (first.size, second.size, third.size) == ((640, 426), (100, 50), (4, 3))
    # 64 / 640, 42.6 / 426, ...; the second box reaches over three sides and is clipped, the third has no extent.
    np.testing.assert_allclose(
        first.boxes.xyxy, [[0.1, 0.1, 0.3, 0.6], [0, 400 / 426, 1, 1], [0.5, 0.5, 0.5, 0.5]], rtol=1e-6
    )
    assert first.boxes.labels.tolist() == [0, 0, 2]
    np.testing.assert_allclose(second.boxes.xyxy, [[0.1, 0.1, 0.6, 0.6]], rtol=1e-6)
    assert manifest.targets.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]


def test_a_crowd_region_counts_as_present_and_stays_marked(root):
    crowd = read(root).records[2]

    assert crowd.labels == (2,)
    assert crowd.boxes.crowd.tolist() == [True]
    assert read(root).records[0].boxes.crowd.tolist() == [False, False, False]


def test_polygons_are_kept_in_units_of_the_image(root):
    polygons = read(root).records[1].boxes.segmentation[0]

    np.testing.assert_allclose(polygons[0], [[0.1, 0.1], [0.6, 0.1], [0.6, 0.6]], rtol=1e-6)
    np.testing.assert_allclose(polygons[1], [[0, 0], [1, 0], [1, 1], [0, 1]])


def test_run_lengths_are_kept_so_that_pycocotools_reads_them(root):
    counts = read(root).records[2].boxes.segmentation[0]
    np.testing.assert_array_equal(coco_mask.decode(coco_mask.frPyObjects(counts, 3, 4)), MASK)

    document = copy.deepcopy(DOCUMENT)
    compressed = coco_mask.encode(np.asfortranarray(MASK))
    document["annotations"][2]["segmentation"] = {"size": [3, 4], "counts": compressed["counts"].decode()}
    write(root, document)
    np.testing.assert_array_equal(coco_mask.decode(read(root).records[2].boxes.segmentation[0]), MASK)


def test_absent_segmentation_is_none(root):
    document = copy.deepcopy(DOCUMENT)
    document["annotations"][0]["segmentation"] = [[10, 5, 60, 5]]  # a line encloses nothing
    document["annotations"][2]["segmentation"] = []
    write(root, document)

    assert [r.boxes.segmentation for r in read(root).records] == [(None, None, None), (None,), (None,)]


def test_protocol_all_keeps_images_without_annotations(root):
    annotated, everything = read(root), read(root, protocol="all")

    assert (len(annotated), len(everything)) == (3, 4)
    empty = everything.records[3]
    assert (empty.key, empty.labels, len(empty.boxes)) == ("val2017/000000000007.jpg", (), 0)
    assert empty.boxes.xyxy.shape == (0, 4)
    assert "images with an annotation (3 of 4)" in annotated.protocol
    assert "all images (4 of 4)" in everything.protocol
    assert "instances_val2017.json" in annotated.protocol
    with pytest.raises(InputError, match="data.protocol=every: expected one of annotated, all"):
        read(root, protocol="every")


def test_unknown_category_ids_become_unknown(root):
    document = copy.deepcopy(DOCUMENT)
    document["images"][1]["unknown_category_ids"] = [90, 1]
    write(root, document)

    record = read(root).records[1]

    assert (record.labels, record.unknown) == ((1,), (0, 2))


def test_folders_come_from_the_templates(root):
    (root / "labels").mkdir()
    (root / "annotations" / "instances_val2017.json").rename(root / "labels" / "val2017.json")
    (root / "val2017").rename(root / "pictures")
    (root / "pictures" / "sub").mkdir()
    (root / "pictures" / "000000000042.jpg").rename(root / "pictures" / "sub" / "42.jpg")
    document = copy.deepcopy(DOCUMENT)
    document["images"][2]["file_name"] = "sub/42.jpg"
    (root / "labels" / "val2017.json").write_text(json.dumps(document))

    manifest = read(root, annotations="labels/{split}.json", images="pictures")

    assert manifest.records[2].key == "pictures/sub/42.jpg"
    assert manifest.records[2].path == str(root / "pictures" / "sub" / "42.jpg")


def test_config_and_build_manifest_read_the_same(root):
    assert read_split(CocoConfig(root=str(root)), "val2017").hash == read(root).hash
    with pytest.raises(InputError, match="protocl: no such option of 'coco'; did you mean protocol?"):
        read(root, protocl="all")
    with pytest.raises(InputError, match="data.name=cocoa: expected one of bigearthnet, coco, csv, "):
        build_manifest("cocoa", root=str(root), split="test")


def test_class_lists_of_two_files_are_compared(root):
    document = copy.deepcopy(DOCUMENT)
    document["categories"][0]["name"] = "stop light"
    write(root, document, "train2017")
    (root / "train2017").symlink_to(root / "val2017")

    with pytest.raises(InputError, match="class 1 is 'stop light' in the first and 'stop sign' in the second"):
        check_same_classes(read(root, "train2017"), read(root))


def test_missing_root_and_annotation_file(root):
    with pytest.raises(InputError, match="the first lines of each YAML in configs.* say what must lie there"):
        build_manifest("coco", root=f"{root}/none", split="val2017")
    with pytest.raises(InputError, match="data.root is not set"):
        build_manifest("coco", split="val2017")
    with pytest.raises(InputError, match="instances_test.json: no such annotation file; splits there: val2017"):
        read(root, "test")


def test_missing_images_are_counted_before_anything_runs(root):
    for name in ("000000000785.jpg", "000000000042.jpg"):
        (root / "val2017" / name).unlink()

    with pytest.raises(
        InputError, match=f"2 of its 3 image files are missing, the first is {root}/val2017/000000000785"
    ):
        read(root)


def test_malformed_json_is_placed(root):
    path = write(root, '{"images": [],\n "annotations": [,]}')
    with pytest.raises(InputError, match=f"{path}, line 2, column 18: "):
        read(root)
    path.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(InputError, match=f"{path}, line 1: not UTF-8 text"):
        read(root)
    write(root, "[1, 2]")
    with pytest.raises(InputError, match="expected an object with images, annotations and categories"):
        read(root)


def drop(section, row, key):
    def change(document):
        del document[section][row][key]

    return change


def put(section, row, **values):
    def change(document):
        document[section][row].update(values)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), "has no list 'categories'"),
        (lambda d: d.update(categories=[]), "has no categories"),
        (lambda d: d.update(annotations=[]), "none of its 4 images has an annotation"),
        (lambda d: d["annotations"].append(17), "annotations: the entry with number 5, .* has no 'image_id'"),
        (drop("images", 1, "file_name"), "images: the entry with id 785 has no 'file_name'"),
        (drop("images", 1, "width"), "images: the entry with id 785 has width None and height 50: expected"),
        (drop("annotations", 1, "bbox"), "annotations: the entry with id 2 has no 'bbox'"),
        (drop("annotations", 1, "category_id"), "annotations: the entry with id 2 has no 'category_id'"),
        (drop("categories", 2, "name"), "categories: the entry with id 90 has no 'name'"),
        (put("images", 1, id=42), "images: the entry with id 42 repeats the id 42"),
        (put("images", 1, file_name="000000000042.jpg"), "id 42 repeats the file_name 'val2017/000000000042.jpg'"),
        (put("images", 1, height=0), "id 785 has width 100 and height 0"),
        (put("images", 1, width="100"), "id 785 has width '100' and height 50: expected whole numbers of pixels"),
        (put("categories", 1, id=13), "categories: the entry with id 13 repeats the id 13"),
        (put("categories", 1, name="stop sign"), "categories: the entry with id 1 repeats the name 'stop sign'"),
        (put("annotations", 1, image_id=140), "id 2 names the image_id 140, which is not among the images"),
        (put("annotations", 1, category_id=12), "id 2 names the category_id 12, which is not among the categories"),
        (put("annotations", 1, bbox=[1, 2, 3]), "id 2 has bbox .1, 2, 3., expected .x, y, width, height."),
        (put("annotations", 1, bbox=[1, 2, None, 4]), "id 2 has bbox .1, 2, None, 4., expected"),
        (put("annotations", 1, bbox=[1, 2, float("nan"), 4]), "id 2 has bbox .*nan.*finite"),
        (put("annotations", 1, bbox=[1, float("inf"), 3, 4]), "id 2 has bbox .*inf.*finite"),
        (put("annotations", 1, bbox=[1, 2, -3, 4]), "id 2 has bbox .*not negative"),
        (put("annotations", 1, bbox=[700, 2, 3, 4]), "id 2 has bbox .* outside its image of 640 x 426 pixels"),
        (put("annotations", 0, segmentation=[[1, 2, 3]]), "id 1 has a segmentation that is neither"),
        (
            put("annotations", 0, segmentation=[[1, 2, 3, 4, float("nan"), 6]]),
            "id 1 has a segmentation that is neither",
        ),
        (put("annotations", 2, segmentation={"size": [4, 3], "counts": COLUMN_RUNS}), "id 3 has a mask of size .4, 3."),
        (put("annotations", 2, segmentation={"size": [3, 4], "counts": [3, 3]}), "id 3 .*do not add up to 12 pixels"),
        (put("annotations", 2, segmentation={"size": [3, 4]}), "id 3 has a mask without counts"),
        (put("images", 1, unknown_category_ids=[2]), "id 785 has unknown_category_ids .2., expected"),
        (
            put("images", 1, unknown_category_ids=[[13]]),
            "id 785 has unknown_category_ids .*13.*, expected a list of ids",
        ),
        (
            put("images", 1, unknown_category_ids={"13": 1}),
            "id 785 has unknown_category_ids .*, expected a list of ids",
        ),
        (put("images", 1, file_name="./000000000042.jpg"), "id 42 repeats the file_name 'val2017/000000000042.jpg'"),
        (put("images", 1, file_name="..\\val2017\\000000000042.jpg"), "id 42 repeats the file_name"),
        (put("images", 1, file_name=7), "id 785 has 'file_name': 7, expected a text"),
        (put("images", 1, id=True), "number 1|id True has 'id': True, expected a whole number or a text"),
        (put("images", 1, id=785.5), "has 'id': 785.5, expected a whole number or a text"),
        (put("images", 1, id="42"), "repeats the id 42 of another entry"),
        (put("images", 1, id=[1] * 9999), "entry with number 1, .* has 'id': .1, 1, .*[.][.][.].*, expected"),
        (put("images", 1, width=1e30), "id 785 has width 1e.30 and height 50: expected whole numbers"),
        (put("images", 1, width=10**400), "id 785 has width 1000.*0000 and height 50: expected whole numbers"),
        (put("images", 1, width=float("nan")), "id 785 has width nan and height 50: expected whole numbers"),
        (put("images", 1, width=True), "id 785 has width True and height 50: expected whole numbers"),
        (put("images", 1, width=99.5), "id 785 has width 99.5 and height 50: expected whole numbers"),
        (put("annotations", 1, iscrowd=2), "id 2 has iscrowd 2, expected 0 or 1"),
        (put("annotations", 1, iscrowd="no"), "id 2 has iscrowd 'no', expected 0 or 1"),
        (put("annotations", 1, iscrowd=None), "id 2 has iscrowd None, expected 0 or 1"),
        (put("annotations", 1, iscrowd=[0]), "id 2 has iscrowd .0., expected 0 or 1"),
        (put("annotations", 1, image_id=[139]), "id 2 has 'image_id': .139., expected a whole number or a text"),
        (put("annotations", 1, category_id=float("nan")), "id 2 has 'category_id': nan, expected a whole number"),
        (put("annotations", 1, bbox=[1, 2, True, 4]), "id 2 has bbox .1, 2, True, 4., expected"),
        (put("annotations", 1, bbox=[1, 2, 10**400, 4]), "id 2 has bbox .1, 2, 1000.*0000, 4.: expected finite"),
        (put("annotations", 1, bbox=[1, 2, 1e308, 1e308]), "id 2 has bbox .*: expected finite"),
        (put("annotations", 1, bbox="1,2,3,4"), "id 2 has 'bbox': '1,2,3,4', expected .x, y, width, height."),
        (put("annotations", 0, segmentation="10 5 60 5 60 30"), "id 1 has a segmentation that is neither"),
        (put("annotations", 0, segmentation=[["10", "5", "60", "5", "60", "30"]]), "id 1 has a segmentation that is"),
        (put("annotations", 0, segmentation=[[10, 5, 60, 5, 60, 10**400]]), "id 1 has a segmentation that is neither"),
        (put("annotations", 0, segmentation=[10, 5, 60, 5, 60, 30]), "id 1 has a segmentation that is neither"),
        (put("annotations", 0, segmentation=[{"x": 1, "y": 2}]), "id 1 has a segmentation that is neither"),
        (put("annotations", 2, segmentation={"size": [3, 4], "counts": "33"}), "id 3 .*do not add up to 12 pixels"),
        (put("annotations", 2, segmentation={"size": [3, 4], "counts": "~~"}), "id 3 .*do not add up to 12 pixels"),
        (put("annotations", 2, segmentation={"size": [3, 4], "counts": [True] * 12}), "id 3 .*do not add up"),
        (put("categories", 1, name=["person"]), "the entry with id 1 has 'name': .'person'., expected a text"),
        (put("images", 1, unknown_category_ids=[13]), "id 785 has annotations of class 'stop sign' and lists it"),
    ],
)
def test_an_entry_that_cannot_be_is_named(root, change, message):
    document = copy.deepcopy(DOCUMENT)
    change(document)
    path = write(root, document)

    with pytest.raises(InputError, match=message) as caught:
        read(root)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\u2028", "\ud800", " ", "x" * 501])
def test_a_class_name_that_no_table_holds_is_refused(root, name):
    document = copy.deepcopy(DOCUMENT)
    document["categories"][1]["name"] = name
    write(root, document)

    with pytest.raises(InputError, match="split 'val2017': class 0 ") as caught:
        read(root)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_unwritable_file_name_is_escaped_in_the_key_alone(root):
    document = copy.deepcopy(DOCUMENT)
    document["images"][1]["file_name"] = "two\nlines.jpg"
    (root / "val2017" / "000000000785.jpg").rename(root / "val2017" / "two\nlines.jpg")
    write(root, document)

    record = read(root).records[1]

    assert record.key == "val2017/two\\nlines.jpg"
    assert record.path == str(root / "val2017" / "two\nlines.jpg")


def test_an_id_is_one_id_however_it_is_written(root):
    document = copy.deepcopy(DOCUMENT)
    document["images"][1].update(id="785", unknown_category_ids=["90", 1.0])
    document["images"][2].update(id="rome_7")
    document["categories"][1]["id"] = "1"
    document["annotations"][0].update(image_id=785.0, category_id="13", iscrowd="0")
    document["annotations"][2].update(image_id="rome_7", iscrowd="1")
    document["annotations"][1]["iscrowd"] = False
    write(root, document)

    manifest = read(root)

    assert [(r.labels, r.unknown) for r in manifest.records] == [((0, 2), ()), ((1,), (0, 2)), ((2,), ())]
    assert [r.boxes.crowd.tolist() for r in manifest.records] == [[False, False, False], [False], [True]]


def test_leading_zeros_make_another_id(root):
    document = copy.deepcopy(DOCUMENT)
    document["annotations"][0]["image_id"] = "0785"
    write(root, document)

    with pytest.raises(InputError, match="id 1 names the image_id '0785', which is not among the images"):
        read(root)


def test_a_size_that_is_not_stated_is_read_from_the_file(root):
    document = copy.deepcopy(DOCUMENT)
    for key in ("width", "height"):
        del document["images"][1][key]
        document["images"][0][key] = None
    write(root, document)
    with pytest.raises(
        InputError, match="the entry with id 139 has no width and height, .*000139.jpg: cannot be decoded: not an"
    ):
        read(root)

    Image.new("RGB", (640, 426)).save(root / "val2017" / "000000000139.jpg")
    with pytest.raises(InputError, match="id 139 has no .*: 640 x 426 pixels are more than max_pixels allows"):
        read(root, max_pixels=1000)

    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: the upright picture is 640 wide
    Image.new("RGB", (426, 640)).save(root / "val2017" / "000000000139.jpg", exif=exif)
    Image.new("RGB", (100, 50)).save(root / "val2017" / "000000000785.jpg")
    manifest = read(root)

    stated = copy.deepcopy(DOCUMENT)
    write(root, stated)
    for ours, expected in zip(manifest.records, read(root).records, strict=True):
        assert ours.size == expected.size
        np.testing.assert_array_equal(ours.boxes.xyxy, expected.boxes.xyxy)

    write(root, document)
    unread = read(root, check_files=False)  # labels do not need the size
    assert [r.labels for r in unread.records] == [(0, 2), (1,), (2,)]
    assert [r.boxes is None for r in unread.records] == [True, True, False]


def test_classes_are_chosen_dropped_and_merged(root):
    # person 1, stop sign 13, toothbrush 90; images: person and toothbrush, stop sign, toothbrush.
    merged = read(root, merge_classes={"stop sign": "thing", "toothbrush": "thing"})
    assert merged.classes == ("person", "thing")
    assert [r.labels for r in merged.records] == [(0, 1), (1,), (1,)]
    assert "merged: stop sign -> thing, toothbrush -> thing" in merged.protocol

    dropped = read(root, drop_classes=["toothbrush"])
    assert dropped.classes == ("person", "stop sign")
    assert [(r.key[-7:], r.labels, len(r.boxes)) for r in dropped.records] == [
        ("139.jpg", (0,), 2),
        ("785.jpg", (1,), 1),
    ]
    assert "images with an annotation (2 of 4)" in dropped.protocol
    assert "2 annotations of other classes left out" in dropped.protocol
    assert [len(r.labels) for r in read(root, drop_classes=["toothbrush"], protocol="all").records] == [1, 1, 0, 0]

    chosen = read(root, classes=["toothbrush", "person"])
    assert chosen.classes == ("toothbrush", "person")
    assert [r.labels for r in chosen.records] == [(0, 1), (0,)]
    assert chosen.records[0].boxes.labels.tolist() == [1, 1, 0]

    for options, message in (
        ({"classes": ["persn"]}, "data.classes: .* has no class 'persn'; did you mean 'person'?"),
        ({"drop_classes": ["zebra"]}, "data.drop_classes: .* has no class 'zebra'; there are person, stop sign, "),
        ({"merge_classes": {"zebra": "x"}}, "data.merge_classes: .* has no category 'zebra'"),
        ({"drop_classes": ["person"], "classes": ["person"]}, "data.classes and data.drop_classes both name 'person'"),
        ({"drop_classes": ["person", "stop sign", "toothbrush"]}, "data.drop_classes: no class is left"),
        ({"classes": ["person", "person"]}, "class names must differ from each other; these occur twice: person"),
    ):
        with pytest.raises(InputError, match=message):
            read(root, **options)


def test_a_merged_class_is_unknown_unless_one_of_its_categories_is_there(root):
    document = copy.deepcopy(DOCUMENT)
    document["images"][1]["unknown_category_ids"] = [90, 1]  # its stop sign is there
    document["images"][2]["unknown_category_ids"] = [13, 1]  # its toothbrush is there
    write(root, document)

    records = read(root, merge_classes={"stop sign": "sign", "person": "sign"}).records

    assert [(r.labels, r.unknown) for r in records[1:]] == [((0,), (1,)), ((1,), (0,))]


def test_polygons_that_enclose_nothing_are_counted(root):
    document = copy.deepcopy(DOCUMENT)
    document["annotations"][0]["segmentation"] = [[10, 5, 60, 5], [10, 5, 60, 5, 60, 30]]
    document["annotations"][1]["segmentation"] = [[[64, 43], [192, 43], [192, 255]]]  # pairs, as some exports have them
    write(root, document)

    manifest = read(root)

    assert "1 polygons of fewer than 3 points left out" in manifest.protocol
    np.testing.assert_allclose(
        manifest.records[1].boxes.segmentation[0], [[[0.1, 0.1], [0.6, 0.1], [0.6, 0.6]]], rtol=1e-6
    )
    np.testing.assert_allclose(
        manifest.records[0].boxes.segmentation[0], [[[0.1, 43 / 426], [0.3, 43 / 426], [0.3, 255 / 426]]], rtol=1e-6
    )


def test_runs_of_a_string_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for shape in ((3, 4), (50, 70), (400, 300)):
        mask = (rng.random(shape) < rng.random()).astype(np.uint8)
        coded = coco_mask.encode(np.asfortranarray(mask))
        flat = mask.ravel(order="F")
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *edges, flat.size]).tolist()
        assert _decode_runs(coded["counts"].decode()) == ([0, *runs] if flat[0] else runs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [], "images": [], "annotations": [], "categories": []}', "an object has the key 'images' twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"images": ' + "9" * 5000 + "}", "a number is too long"),
        ("", "line 1, column 1"),
        ("NaN", "expected an object with images"),
    ],
)
def test_json_that_no_reader_takes(root, text, message):
    path = write(root, text)
    with pytest.raises(InputError, match=message) as caught:
        read(root)
    assert str(caught.value).startswith(str(path))
