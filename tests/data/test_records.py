"""records.py: what goes into the columns comes out as it was, at each place and after each change."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlvision.data.bands import Band, BandStack
from mlvision.data.manifest import Manifest
from mlvision.data.records import Boxes, LabelLists, Record, Records

LABELS = st.lists(st.integers(0, 300), unique=True, max_size=4).map(lambda labels: tuple(sorted(labels)))
STACKS = [
    None,
    BandStack((Band("B1", "{path}"),), "reflectance_3000"),
    BandStack((Band("B2", "{path}"),), "reflectance_3000"),
]
POLYGON = st.integers(3, 6).map(lambda n: np.random.default_rng(n).random((n, 2)).astype(np.float32))
SEGMENTATION = st.one_of(
    st.none(), st.lists(POLYGON, min_size=1, max_size=3), st.just({"size": [2, 2], "counts": [1, 3]})
)


@st.composite
def boxes(draw):
    shapes = tuple(draw(st.lists(SEGMENTATION, max_size=3)))
    n = len(shapes)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return Boxes(
        rng.random((n, 4)).astype(np.float32), rng.integers(0, 9, n), rng.random(n) < 0.5, rng.random(n) < 0.5, shapes
    )


@st.composite
def record(draw):
    key = draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8))
    joined = f"{draw(st.sampled_from(['', '/root/', '/elsewhere/']))}{key}"
    return Record(
        key,
        draw(st.sampled_from([joined, "/an/other/\udcff.jpg"])),
        draw(LABELS),
        draw(LABELS),
        draw(LABELS),
        draw(st.none() | boxes()),
        draw(st.none() | st.tuples(st.integers(1, 9999), st.integers(1, 9999))),
        draw(st.sampled_from(STACKS)),
    )


def plain(record):
    columns = (record.key, record.path, record.labels, record.unknown, record.difficult, record.size, record.bands)
    if record.boxes is None:
        return *columns, None
    b = record.boxes
    shapes = [s if s is None or isinstance(s, dict) else [p.tolist() for p in s] for s in b.segmentation]
    return *columns, b.xyxy.tolist(), b.labels.tolist(), b.crowd.tolist(), b.difficult.tolist(), shapes


@settings(deadline=None)
@given(st.lists(record(), max_size=6), st.randoms())
def test_records_come_back_as_they_were(given_records, random):
    expected = [plain(r) for r in given_records]
    records = Records(given_records)

    assert [plain(r) for r in records] == expected
    assert (records.keys, records.paths) == ([r.key for r in given_records], [r.path for r in given_records])
    assert [plain(r) for r in records[::-1]] == expected[::-1]
    assert [plain(r) for r in pickle.loads(pickle.dumps(records))] == expected
    chosen = [random.randrange(len(expected)) for _ in expected]
    part = records.take(chosen)
    assert [plain(r) for r in part] == [expected[i] for i in chosen]
    assert [tuple(part.labels(i)) for i in range(len(part))] == [expected[i][2] for i in chosen]
    assert [plain(r) for r in Records(part)] == [expected[i] for i in chosen]


def test_places_count_from_both_ends_and_end():
    records = Records(Record(f"{i}.jpg", f"/r/{i}.jpg", (i,)) for i in range(3))
    assert [records[i].key for i in (0, -1, -3)] == ["0.jpg", "2.jpg", "0.jpg"]
    with pytest.raises(IndexError):
        records[3]
    assert len(Records([])) == 0
    assert list(Records([])) == []


def test_other_labels_of_a_part():
    records = Records(Record(f"{i}.jpg", f"/r/{i}.jpg", (i,), (9,)) for i in range(4)).take([3, 1])
    other = records.relabel([(7,), ()], [(), (1, 2)])
    assert [(r.key, r.labels, r.unknown) for r in other] == [("3.jpg", (7,), ()), ("1.jpg", (), (1, 2))]
    assert [(r.labels, r.unknown) for r in records] == [((3,), (9,)), ((1,), (9,))]


@pytest.mark.parametrize(
    ("key", "escaped"),
    [("a\nb", "a\\nb"), ("\r\t\0", "\\r\\t\\x00"), ("\x1b[2J", "\\x1b[2J"), ("\u2028", "\\u2028"), ("\udcff", "\\udcff"),
     ("a b\u00a0é\u200d\U0001f600", "a b\u00a0é\u200d\U0001f600"), ("a\\nb", "a\\nb")],
)  # fmt: skip
def test_characters_that_no_line_holds_are_escaped_in_keys(key, escaped):
    record = Record(key, f"/r/{key}", ())
    assert (record.key, record.path) == (escaped, f"/r/{key}")
    assert plain(Records([record])[0]) == plain(record)


def test_a_record_costs_little_memory():
    count = 20_000
    manifest = Manifest(
        tuple(f"class {c}" for c in range(27)),
        Records(Record(f"images/{i:08d}.jpg", f"/data/images/{i:08d}.jpg", (i % 20, 20 + i % 7)) for i in range(count)),
        "train",
    )
    assert len(pickle.dumps(manifest)) < 100 * count  # the key is 19 bytes of it


@settings(deadline=None)
@given(st.lists(record(), max_size=6), st.randoms())
def test_all_labels_and_objects_at_once_are_those_of_each_record(given_records, random):
    chosen = [random.randrange(len(given_records)) for _ in given_records]
    part, expected = Records(given_records).take(chosen), [given_records[i] for i in chosen]

    for column in ("labels", "unknown", "difficult"):
        pairs = [
            pair for rows, labels in part.pairs(column) for pair in zip(rows.tolist(), labels.tolist(), strict=True)
        ]
        assert pairs == [(i, label) for i, r in enumerate(expected) for label in getattr(r, column)]
    assert part.labels_per_image().tolist() == [len(r.labels) for r in expected]
    assert list(part.lists()) == [(list(r.labels), list(r.unknown)) for r in expected]
    rows, boxes = part.boxes()
    stated = [(i, r.boxes) for i, r in enumerate(expected) if r.boxes is not None]
    assert rows.tolist() == [i for i, one in stated for _ in range(len(one))]
    for name in ("xyxy", "labels", "crowd", "difficult"):
        assert getattr(boxes, name).tolist() == [value for _, one in stated for value in getattr(one, name).tolist()]


def test_columns_give_the_same_records_as_objects():
    keys = ["a/1.jpg", "b\n2.jpg", "/elsewhere/3.jpg"]
    rows, classes = np.array([2, 0, 2, 0, 2]), np.array([7, 1, 0, 1, 3])  # in any order, one of them twice
    sizes = np.array([[4, 3], [0, 0], [8, 9]])
    unknown = LabelLists([(5,), (), (5,)])

    columns = Records.under("/root", keys, LabelLists.of_pairs(rows, classes, 3), unknown, sizes=sizes)

    expected = [
        Record("a/1.jpg", "/root/a/1.jpg", (1,), (5,), size=(4, 3)),
        Record("b\n2.jpg", "/root/b\n2.jpg", ()),
        Record("/elsewhere/3.jpg", "/elsewhere/3.jpg", (0, 3, 7), (5,), size=(8, 9)),
    ]
    assert [plain(r) for r in columns] == [plain(r) for r in expected]
    assert columns.keys[1] == "b\\n2.jpg"
    assert list(Records.under("/root", [], LabelLists([]))) == []
