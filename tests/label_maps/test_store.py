"""The store's format, its reader and its writer; how it is filled from dense maps is in test_annotate."""

import hashlib
import json
import os
import pickle
import random
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mlvision.errors import InputError
from mlvision.label_maps import store as store_file
from mlvision.label_maps.store import META, Geometry, LabelMapStore, LabelMapWriter, StoreMeta

ROOT = Path(__file__).parents[2]


def meta_of(**changes) -> StoreMeta:
    """Five images, two of a block, 20 classes, 3 x 7 cells."""
    default = {
        "record_hash": "aa11",
        "num_records": 5,
        "class_hash": "cc22",
        "num_classes": 20,
        "teacher": "resnet",
        "teacher_hash": "ee33",
        "grid": (3, 7),
        "kind": "logit",
        "groups": (changes.get("num_classes", 20),),
        "top_k": 4,
        "block_size": 2,
        "preprocessing": {"size": [96, 224], "mean": [0.5, 0.5, 0.5]},
    }
    return StoreMeta(**default | changes)


def rows_of(meta: StoreMeta, rows, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Each row's arrays as the writer takes them; a row's content depends on its number alone."""
    values, ids, fill = [], [], []
    for row in rows:
        noise = np.random.default_rng([seed, row])
        depth = meta.top_k or meta.num_classes
        best = -np.sort(-noise.normal(0, 5, (depth, *meta.grid)), axis=0)
        values.append(best)
        if meta.top_k:
            order = noise.permuted(np.arange(meta.num_classes - 30, meta.num_classes).clip(0), axis=0)
            order = np.unique(order)[::-1][: meta.top_k, None, None]
            ids.append(np.broadcast_to(order, best.shape))
            fill.append(best[-1] - noise.uniform(0, 3, meta.grid))
    columns = [torch.tensor(np.stack(column)).float() for column in (values, fill) if column]
    return (columns[0], torch.tensor(np.stack(ids)), columns[1]) if ids else (columns[0],)


def fill_store(path: Path, meta: StoreMeta, **ranks) -> LabelMapStore:
    writer = LabelMapWriter.create_or_resume(path, meta, **ranks)
    for block in writer.outstanding():
        writer.write(block, *rows_of(meta, block))
    return LabelMapStore.open(path)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def in_child(work) -> int:
    """The exit code of a fork that runs `work`; nothing of the tests runs after it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# What is read is what was written


@pytest.mark.parametrize(
    ("num_classes", "on_disk", "read"),
    [
        (20, "uint16", torch.int16),
        (32_768, "uint16", torch.int16),
        (65_536, "uint16", torch.int64),
        (65_537, "uint32", torch.int64),
    ],
)
def test_best_of_each_cell_are_read_as_written(tmp_path, num_classes, on_disk, read):
    meta = meta_of(num_classes=num_classes)
    store = fill_store(tmp_path / "maps", meta)
    assert np.load(tmp_path / "maps" / "ids.npy", mmap_mode="r").dtype == on_disk
    order = [4, 0, 4, 3]
    maps, (values, ids, fill) = store.read(order), rows_of(meta, order)
    assert (maps.values.dtype, maps.ids.dtype, maps.fill.dtype) == (torch.float16, read, torch.float32)
    assert torch.equal(maps.values, values.half())
    assert torch.equal(maps.ids.long(), ids)
    assert maps.ids.max() == num_classes - 1
    assert torch.equal(maps.fill, fill.half().float())
    assert (maps.kind, maps.extent) == ("logit", None)


def test_rows_come_first_on_an_asymmetric_grid(tmp_path):
    meta = meta_of(num_records=1, grid=(2, 5))
    values, ids, fill = torch.zeros(1, 4, 2, 5), torch.arange(4)[None, :, None, None].repeat(1, 1, 2, 5), None
    fill = torch.zeros(1, 2, 5)
    values[0, 0, 1, 3], ids[0, 0, 1, 3], fill[0, 0, 4] = 9, 17, -2
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    writer.write([0], values, ids, fill)
    maps = LabelMapStore.open(tmp_path / "maps").read([0])
    assert maps.values.nonzero().tolist() == [[0, 0, 1, 3]]
    assert (maps.ids == 17).nonzero().tolist() == [[0, 0, 1, 3]]
    assert maps.fill.nonzero().tolist() == [[0, 0, 4]]


def test_large_class_indices_survive(tmp_path):
    meta = meta_of(num_records=1, num_classes=70_000, top_k=4, grid=(1, 2))
    ids = torch.tensor([[2049, 65_535], [65_537, 2], [69_999, 65_536], [0, 4097]])[None, :, None]
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    writer.write([0], torch.zeros(1, 4, 1, 2), ids, torch.zeros(1, 1, 2))
    assert LabelMapStore.open(tmp_path / "maps").read([0]).ids.tolist() == ids.tolist()


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_all_classes_are_read_as_written(tmp_path, dtype):
    meta = meta_of(top_k=0, kind="mass", groups=(), dtype=dtype)
    store = fill_store(tmp_path / "maps", meta)
    names = {"values.npy", "done.npy", META} | ({"scale.npy"} if dtype == "uint8" else set())
    assert content(tmp_path / "maps").keys() == names
    maps, (values,) = store.read(torch.tensor([3, 1])), rows_of(meta, [3, 1])
    assert (maps.ids, maps.fill, maps.kind) == (None, 0.0, "mass")
    if dtype == "float16":
        assert torch.equal(maps.values, values.half())
    else:
        step = (values.amax((1, 2, 3)) - values.amin((1, 2, 3))) / 255
        assert ((maps.values - values).abs().amax((1, 2, 3)) <= step / 2 + 1e-6).all()


def test_uint8_is_within_half_a_step_and_the_fill_below_what_is_read(tmp_path):
    meta = meta_of(dtype="uint8", num_records=40, block_size=16)
    values, ids, fill = rows_of(meta, range(40))
    fill[::2] = values[::2, -1]  # no room between them: rounding alone would put some fills above
    values[7], fill[7] = 1.25, 1.25  # no range
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    for block in writer.outstanding():
        rows = slice(block.start, block.stop)
        writer.write(block, values[rows], ids[rows], fill[rows])
    maps = LabelMapStore.open(tmp_path / "maps").read(range(40))
    exact = values.double().numpy()
    step = (exact.max((1, 2, 3)) - exact.min((1, 2, 3))) / 255
    error = np.abs(maps.values.double().numpy() - exact).max((1, 2, 3))
    assert maps.values.dtype == torch.float32
    assert (error <= step / 2 + 1e-5).all()
    assert error[7] == 0
    assert (maps.fill <= maps.values.amin(1)).all()
    lowered = (fill - maps.fill).amax((1, 2)).numpy()
    assert (lowered <= step / 2 + 2**-6).all()  # by a rounding of the value, and one of float16
    assert (maps.fill[::2] < fill[::2]).any()


def test_extent_is_given_to_every_image(tmp_path):
    extent = (0.0, 0.125, 1.0, 0.875)
    store = fill_store(tmp_path / "maps", meta_of(geometry=Geometry(squash=False, extent=extent)))
    assert store.meta.geometry == Geometry(False, extent)
    assert store.read([2, 0]).extent.tolist() == [list(extent)] * 2


def test_meta_is_read_as_written(tmp_path):
    meta = meta_of(approximate=0.25, precision="bf16", block_size=3)
    assert fill_store(tmp_path / "maps", meta).meta == meta
    entries = json.loads((tmp_path / "maps" / META).read_text())
    assert (entries["format_version"], entries["grid"], entries["geometry"]["squash"]) == (1, [3, 7], True)


def test_an_image_takes_less_than_5000_bytes(tmp_path):
    meta = meta_of(num_records=1000, num_classes=1000, top_k=5, grid=(15, 15), block_size=500)
    LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    assert sum(file.stat().st_size for file in (tmp_path / "maps").iterdir()) < 5000 * 1000


def test_a_store_goes_to_another_process_as_its_path(tmp_path):
    store = fill_store(tmp_path / "maps", meta_of())
    expected = store.read([1, 4])  # opened: the open arrays must not go with it
    (tmp_path / "pickled").write_bytes(pickle.dumps(store))
    assert (tmp_path / "pickled").stat().st_size < 2000
    program = (
        "import pickle, sys, torch\n"
        "maps = pickle.load(open(sys.argv[1], 'rb')).read([1, 4])\n"
        "torch.save((maps.values, maps.ids, maps.fill), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "pickled"), str(tmp_path / "read")]
    with open(tmp_path / "output", "wb") as output:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(command, stdout=output, stderr=output, timeout=120, check=True, env=environment)
    read = torch.load(tmp_path / "read")
    assert all(torch.equal(a, b) for a, b in zip(read, (expected.values, expected.ids, expected.fill), strict=True))


# Blocks, ranks and resuming


def test_blocks_go_round_the_ranks(tmp_path):
    meta = meta_of(num_records=9)
    ranks = [LabelMapWriter.create_or_resume(tmp_path / "maps", meta, rank=r, world_size=2) for r in (0, 1)]
    assert [rank.outstanding() for rank in ranks] == [
        [range(0, 2), range(4, 6), range(8, 9)],
        [range(2, 4), range(6, 8)],
    ]
    ranks[0].write(range(4, 6), *rows_of(meta, range(4, 6)))
    assert ranks[0].outstanding() == [range(0, 2), range(8, 9)]
    assert np.load(tmp_path / "maps" / "done.npy").tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0]
    alone = LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    assert alone.outstanding() == [range(0, 2), range(2, 4), range(6, 8), range(8, 9)]


def test_a_block_with_an_undone_row_is_made_again_whole(tmp_path):
    meta = meta_of()
    fill_store(tmp_path / "whole", meta)
    fill_store(tmp_path / "maps", meta)
    done = np.lib.format.open_memmap(tmp_path / "maps" / "done.npy", mode="r+")
    done[3] = 0
    values = np.lib.format.open_memmap(tmp_path / "maps" / "values.npy", mode="r+")
    values[2:4] = np.nan  # as a torn write may leave it
    del done, values
    assert LabelMapWriter.create_or_resume(tmp_path / "maps", meta).outstanding() == [range(2, 4)]
    fill_store(tmp_path / "maps", meta)
    assert content(tmp_path / "maps") == content(tmp_path / "whole")


def test_a_block_is_done_with_its_last_row(tmp_path):
    meta = meta_of(num_records=6, block_size=3)
    fill_store(tmp_path / "whole", meta)
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    for rows in ([0], [1, 2], [3, 4]):
        writer.write(rows, *rows_of(meta, rows))
    assert writer.outstanding() == [range(3, 6)]
    resumed = LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    with pytest.raises(InputError, match=r"rows 5 to 5 neither start nor go on with a block of rank 0 of 1"):
        resumed.write([5], *rows_of(meta, [5]))  # what another process wrote of the block is not trusted
    resumed.write(range(3, 6), *rows_of(meta, range(3, 6)))
    assert content(tmp_path / "maps") == content(tmp_path / "whole")


def test_data_is_on_the_disk_before_its_rows_are_done(tmp_path, monkeypatch):
    """A power cut may lose what was not synced, in any order; a kill alone would not show it."""
    meta = meta_of(dtype="uint8")
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    steps = []
    put = writer._put
    monkeypatch.setattr(
        writer, "_put", lambda name, *rest, **how: (steps.append(("put", name)), put(name, *rest, **how))
    )
    monkeypatch.setattr(store_file, "sync", lambda path: steps.append(("sync", path.stem)))
    writer.write([0, 1], *rows_of(meta, [0, 1]))
    data = {"values", "ids", "fill", "scale"}
    done = steps.index(("put", "done"))
    assert steps[done:] == [("put", "done"), ("sync", "done")]
    assert all(steps.index(("put", name)) < steps.index(("sync", name)) < done for name in data)


def test_killed_at_many_lines_and_resumed_equals_one_made_in_one_go(tmp_path):
    meta = meta_of(dtype="uint8")
    fill_store(tmp_path / "whole", meta)
    lines = 0

    def counting(last, end):
        def trace(frame, event, argument):
            nonlocal lines
            if frame.f_code.co_filename != store_file.__file__:
                return None
            lines += event == "line"
            if lines == last:
                end()
            return trace

        return trace

    def killed(folder, last):
        sys.settrace(counting(last, lambda: os._exit(9)))  # nothing is tidied up, as with SIGKILL
        fill_store(folder, meta)

    earlier = sys.gettrace()
    sys.settrace(counting(None, None))
    fill_store(tmp_path / "counted" / "maps", meta)
    sys.settrace(earlier)
    total, lines = lines, 0
    assert total > 200
    for last in range(1, total, 17):
        folder = tmp_path / f"line-{last}" / "maps"
        assert in_child(lambda folder=folder, last=last: killed(folder, last)) == 9, f"line {last} of {total}"
        fill_store(folder, meta)
        assert content(folder) == content(tmp_path / "whole"), f"line {last} of {total}"
        assert [entry.name for entry in folder.parent.iterdir()] == ["maps"]


def test_of_several_that_create_a_store_at_once_one_does(tmp_path):
    meta = meta_of()
    fill_store(tmp_path / "whole" / "maps", meta)
    children = []
    for _ in range(6):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                fill_store(tmp_path / "many" / "maps", meta)
                code = 0
            finally:
                os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    assert content(tmp_path / "many" / "maps") == content(tmp_path / "whole" / "maps")
    assert [entry.name for entry in (tmp_path / "many").iterdir()] == ["maps"]


# Stores that are refused

OWN = {"record_hash": "aa11", "class_hash": "cc22", "num_records": 5}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"record_hash": "bb"}, "made for the record list aa11 of 5 images, but the data has bb of 5"),
        ({"num_records": 6}, "made for the record list aa11 of 5 images, but the data has aa11 of 6"),
        ({"class_hash": "dd"}, "made for the class list cc22, but the data has dd"),
    ],
)
def test_a_store_of_other_data_is_refused(tmp_path, other, message):
    store = fill_store(tmp_path / "maps", meta_of())
    store.check(**OWN)
    with pytest.raises(InputError, match=message):
        store.check(**OWN | other)


def test_an_unfinished_store_is_refused(tmp_path):
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of())
    writer.write([2, 3], *rows_of(writer.meta, [2, 3]))
    with pytest.raises(InputError, match=r"maps: 3 of 5 rows are unfinished"):
        LabelMapStore.open(tmp_path / "maps").check(**OWN)


@pytest.mark.parametrize(
    ("name", "value", "dtype", "message"),
    [
        ("values", np.nan, "float16", "values.npy: row 3 holds NaN or infinity"),
        ("values", -np.inf, "float16", "values.npy: row 3 holds NaN or infinity"),
        ("fill", np.nan, "uint8", "fill.npy: row 3 holds NaN or infinity"),
        ("scale", np.inf, "uint8", "scale.npy: row 3 holds NaN or infinity"),
        ("ids", 20, "float16", "ids.npy: row 3 holds class ids outside the 20 classes"),
    ],
)
def test_a_damaged_row_is_refused(tmp_path, monkeypatch, name, value, dtype, message):
    """In whichever part of the rows it is: a NaN would be an unknown label to a student, a foreign class another image's."""
    monkeypatch.setattr(store_file, "_ROWS_AT_ONCE", 2)
    store = fill_store(tmp_path / "maps", meta_of(dtype=dtype))
    store.check(**OWN)
    array = np.load(tmp_path / "maps" / f"{name}.npy")
    array[3, ..., -1] = value
    np.save(tmp_path / "maps" / f"{name}.npy", array)
    with pytest.raises(InputError, match=message):
        LabelMapStore.open(tmp_path / "maps").check(**OWN)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"format_version": 2},
            r"format \('mlvision label maps', 2\), but this code reads \('mlvision label maps', 1\)",
        ),
        ({"format": "other"}, r"format \('other', 1\)"),
        ({"surplus": 1}, "does not describe a label-map store .*surplus"),
        ({"grid": None}, "expected two whole numbers as grid, got None"),
    ],
)
def test_another_format_is_refused(tmp_path, entries, message):
    fill_store(tmp_path / "maps", meta_of())
    file = tmp_path / "maps" / META
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    with pytest.raises(InputError, match=message):
        LabelMapStore.open(tmp_path / "maps")


def test_folders_that_are_no_store_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"missing: no label-map store \(meta.json is missing\)"):
        LabelMapStore.open(tmp_path / "missing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").touch()
    with pytest.raises(InputError, match="full: the store could not be made there"):
        LabelMapWriter.create_or_resume(tmp_path / "full", meta_of())
    assert [entry.name for entry in tmp_path.iterdir()] == ["full"]
    fill_store(tmp_path / "maps", meta_of())
    (tmp_path / "maps" / META).write_text("{")
    with pytest.raises(InputError, match="does not describe a label-map store"):
        LabelMapStore.open(tmp_path / "maps")


def test_arrays_that_are_cut_missing_or_others_are_refused(tmp_path):
    store = fill_store(tmp_path / "maps", meta_of())
    values = tmp_path / "maps" / "values.npy"
    np.save(values, np.zeros((5, 4, 7, 3), dtype=np.float16))
    with pytest.raises(InputError, match=r"values.npy: holds float16 \(5, 4, 7, 3\), but .* float16 \(5, 4, 3, 7\)"):
        store.read([0])
    values.write_bytes(values.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"values.npy: the file is damaged, or was cut short"):
        store.check(**OWN)
    values.unlink()
    with pytest.raises(InputError, match=r"values.npy: .*No such file"):
        LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of())


@pytest.mark.parametrize("rows", [[-1], [0, 5]])
def test_rows_outside_the_store_are_refused(tmp_path, rows):
    store = fill_store(tmp_path / "maps", meta_of())
    with pytest.raises(InputError, match=r"rows 0 to 4, asked for -?\d to \d|-1"):
        store.read(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_hash": "ff"}, "teacher_hash is 'ee33' in the store that is there, but 'ff' was asked for"),
        ({"grid": (7, 3)}, r"grid is \[3, 7\] in the store that is there, but \[7, 3\]"),
        ({"block_size": 3}, "block_size is 2 .* but 3"),
        ({"groups": ()}, "activation is 'softmax' .* but 'sigmoid'"),
        ({"preprocessing": {"size": [96, 96]}}, r"preprocessing is .*\[96, 224\].* but \{'size': \[96, 96\]\}"),
        ({"geometry": Geometry(squash=False)}, "geometry is .*True.* but .*False"),
        ({"approximate": 0.5}, "approximate is None .* but 0.5"),
    ],
)
def test_another_store_is_not_resumed(tmp_path, changes, message):
    fill_store(tmp_path / "maps", meta_of())
    before = content(tmp_path / "maps")
    with pytest.raises(InputError, match=message):
        LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of(**changes))
    assert content(tmp_path / "maps") == before


def test_a_gap_that_differs_in_its_last_bits_is_no_other_store(tmp_path):
    """Each process measures it, with its own threads."""
    fill_store(tmp_path / "maps", meta_of(approximate=0.5))
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of(approximate=0.5000001))
    assert not writer.outstanding()
    assert LabelMapStore.open(tmp_path / "maps").meta.approximate == 0.5


def test_a_rank_does_not_wait_for_ever(tmp_path):
    with pytest.raises(InputError, match=r"maps: rank 1 waited 0.1 s, but rank 0 made no store there"):
        LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of(), rank=1, world_size=2, timeout=0.1)
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    "changes", [{"kind": "score"}, {"dtype": "float32"}, {"groups": (7, 14)}, {"top_k": 21}, {"grid": (0, 7)}]
)
def test_a_store_that_cannot_be_is_refused(changes):
    with pytest.raises(InputError, match=re.escape(str(next(iter(changes.values()))).strip("()"))):
        meta_of(**changes)


# Rows that are refused


def spoilt(column: int, value: float) -> tuple[torch.Tensor, ...]:
    """Rows 2 and 3 of the store, of which row 3 has one bad entry."""
    arrays = [array.clone() for array in rows_of(meta_of(), [2, 3])]
    arrays[column][1, ..., 1, 6] = value
    return tuple(arrays)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, np.nan, "row 3: values not finite"),
        (0, np.inf, "row 3: values not finite"),
        (0, 70_000.0, "row 3: values not finite in float16"),
        (2, -np.inf, "row 3: fill not finite"),
        (1, 20, "row 3: class ids outside the 20 classes"),
        (1, -1, "row 3: class ids outside the 20 classes"),
        (1, 7, "row 3: a class twice in one cell"),
        (2, 60.0, "row 3: a fill above the least stored value"),
    ],
)
def test_a_bad_row_is_named_and_not_written(tmp_path, dtype, column, value, message):
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of(dtype=dtype))
    before = content(tmp_path / "maps")
    with pytest.raises(InputError, match=message):
        writer.write([2, 3], *spoilt(column, value))
    assert content(tmp_path / "maps") == before


def test_rows_that_are_no_block_of_this_rank_are_refused(tmp_path):
    meta = meta_of()
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta, rank=0, world_size=2)
    for rows in ([2, 3], [1], [0, 2], [1, 0], [0, 1, 2]):
        with pytest.raises(
            InputError, match=rf"rows {rows[0]} to {rows[-1]} neither start nor go on with a block of rank 0"
        ):
            writer.write(rows, *rows_of(meta, rows))
    assert not np.load(tmp_path / "maps" / "done.npy").any()


def test_other_shapes_are_refused(tmp_path):
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of())
    values, ids, fill = rows_of(meta_of(), [0, 1])
    for arrays in ((values.mT, ids.mT, fill.mT), (values[:1], ids[:1], fill[:1]), (values,)):
        with pytest.raises(InputError, match=r"the store takes .*'values': \(2, 4, 3, 7\)"):
            writer.write([0, 1], *arrays)


def test_a_full_disk_keeps_the_finished_blocks(tmp_path):
    """A limit on the size of files stands for it: the second block's values lie beyond."""
    meta = replace(meta_of(), grid=(30, 70))
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    limit = 128 + 3 * 4 * 30 * 70 * 2

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        writer.write([0, 1], *rows_of(meta, [0, 1]))
        with pytest.raises(InputError, match=r"values.npy: could not be written \(File too large\)"):
            writer.write([2, 3], *rows_of(meta, [2, 3]))

    assert in_child(work) == 0
    assert writer.outstanding() == [range(2, 4), range(4, 5)]
    fill_store(tmp_path / "maps", meta)
    fill_store(tmp_path / "whole", meta)
    assert content(tmp_path / "maps") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_records": "5"}, "expected a whole number as num_records, got '5'"),
        ({"num_records": 5.0}, "expected a whole number as num_records, got 5.0"),
        ({"num_records": True}, "expected a whole number as num_records, got True"),
        ({"num_records": 10**30}, "expected a whole number as num_records"),
        ({"top_k": None}, "expected a whole number as top_k, got None"),
        ({"grid": [3]}, r"expected two whole numbers as grid, got \[3\]"),
        ({"grid": [3, 7.5]}, "expected two whole numbers as grid"),
        ({"class_hash": 7}, "expected text as class_hash, got 7"),
        ({"preprocessing": []}, "expected names and values as preprocessing"),
        ({"approximate": "0"}, "expected a number or nothing as approximate"),
        ({"kind": ["logit"]}, "expected text as kind"),
        ({"kind": "logits"}, "expected a kind of"),
        ({"geometry": {"squash": True, "extent": [0, 0, 1]}}, "and an extent of x1, y1, x2, y2"),
        ({"geometry": {"squash": True, "extent": [0, 0, "1", 1]}}, "and an extent of x1, y1, x2, y2"),
        ({"geometry": {"squash": True, "extent": [0.5, 0, 0.5, 1]}}, "and an extent of x1, y1, x2, y2"),
        ({"geometry": 3}, "as geometry, got 3"),
    ],
)
def test_entries_of_another_kind_are_refused(tmp_path, entries, message):
    fill_store(tmp_path / "maps", meta_of())
    file = tmp_path / "maps" / META
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    with pytest.raises(InputError, match=f"meta.json: .*{message}"):
        LabelMapStore.open(tmp_path / "maps")


@pytest.mark.parametrize("content", [b"\xff{}", b"[" * 100_000, b"[]", b"3", b'{"num_records": ' + b"9" * 5000 + b"}"])
def test_descriptions_that_are_none_are_one_line(tmp_path, content):
    fill_store(tmp_path / "maps", meta_of())
    (tmp_path / "maps" / META).write_bytes(content)
    with pytest.raises(InputError, match="meta.json: does not describe a label-map store") as caught:
        LabelMapStore.open(tmp_path / "maps")
    assert "\n" not in str(caught.value)


def test_a_row_that_is_marked_by_a_flipped_bit_is_not_done(tmp_path):
    store = fill_store(tmp_path / "maps", meta_of())
    done = np.lib.format.open_memmap(tmp_path / "maps" / "done.npy", mode="r+")
    done[3] = 3
    done.flush()
    with pytest.raises(InputError, match="1 of 5 rows are unfinished"):
        store.check(**OWN)
    assert LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of()).outstanding() == [range(2, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [META, "values.npy", "ids.npy", "fill.npy", "scale.npy", "done.npy"])
def test_damaged_headers_are_one_line_or_harmless(tmp_path, name):
    """Flipped bits, other bytes and missing ends of every file: the maps, or one line; never another error."""
    meta = replace(meta_of(), dtype="uint8")
    store = fill_store(tmp_path / "maps", meta)
    expected, file = store.read(range(5)), tmp_path / "maps" / name
    whole, draw, refused = file.read_bytes(), random.Random(0), []
    header = len(whole) if name == META else 128
    for _ in range(120):
        content, place = bytearray(whole), draw.randrange(header)
        if draw.random() < 0.2:
            del content[place:]
        else:
            content[place] = draw.randrange(256) if draw.random() < 0.5 else content[place] ^ 1 << draw.randrange(8)
        file.unlink()  # another file: the old one may be mapped
        file.write_bytes(content)
        try:
            opened = LabelMapStore.open(tmp_path / "maps")
            opened.check(**OWN)
            maps = opened.read(range(5))
            LabelMapWriter.create_or_resume(tmp_path / "maps", meta).outstanding()
        except InputError as error:
            refused.append(str(error))
        else:
            assert name == META or torch.equal(maps.values, expected.values)
    assert len(refused) > 40
    assert all("\n" not in message for message in refused)


def test_maps_of_one_softmax_or_of_sigmoids_are_described_as_they_always_were(tmp_path):
    """So stores that older versions made are read, and runs that learn from them find the same hash."""
    old = {
        "format": "mlvision label maps", "format_version": 1, "record_hash": "aa11", "num_records": 5, "class_hash": "cc22",
        "num_classes": 20, "teacher": "resnet", "teacher_hash": "ee33", "grid": [3, 7], "kind": "logit",
        "activation": "softmax", "top_k": 0, "block_size": 2, "dtype": "float16", "precision": "fp32", "approximate": None,
        "preprocessing": {"size": [96, 224], "mean": [0.5, 0.5, 0.5]}, "geometry": {"squash": True, "extent": None},
    }  # fmt: skip
    for kind, activation, groups in (
        ("logit", "softmax", (20,)),
        ("logit", "sigmoid", ()),
        ("probability", None, ()),
        ("logit", "sigmoid", (1,) * 20),
    ):
        meta, described = meta_of(kind=kind, groups=groups, top_k=0), old | {"kind": kind, "activation": activation}
        assert meta.to_json() == described
        assert meta.hash == hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        folder = tmp_path / f"{kind} {len(groups)}"
        store = fill_store(folder, meta)
        (folder / "meta.json").write_text(json.dumps(described))
        assert LabelMapStore.open(folder).meta == replace(meta, groups=groups if len(groups) == 1 else ())
        assert store.read([1]).groups == (groups if len(groups) == 1 else ())


def test_maps_of_several_groups_keep_them(tmp_path):
    store = fill_store(tmp_path / "maps", meta_of(groups=(8, 12), top_k=0))
    assert "activation" not in json.loads((tmp_path / "maps" / "meta.json").read_text())
    assert LabelMapStore.open(tmp_path / "maps").meta == store.meta
    assert store.read([3, 0]).groups == (8, 12)
    found = store.read([3, 0]).as_kind("probability").values
    torch.testing.assert_close(found[:, 8:].sum(1), torch.ones(2, 3, 7))
    with pytest.raises(InputError, match=r"activation is None .* but 'softmax'"):
        LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of(top_k=0))
    content = json.loads((tmp_path / "maps" / "meta.json").read_text())
    (tmp_path / "maps" / "meta.json").write_text(json.dumps(content | {"groups": [8, "12"]}))
    with pytest.raises(InputError, match="expected whole numbers as groups"):
        LabelMapStore.open(tmp_path / "maps")
