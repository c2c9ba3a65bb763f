"""From dense maps to a store and back: the best of each cell with their fill, filling a store, verifying one."""

import multiprocessing
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from mlvision.errors import InputError
from mlvision.label_maps.annotate import annotate, top_k_of, verify
from mlvision.label_maps.store import LabelMapStore, LabelMapWriter, StoreMeta
from mlvision.types import LabelMap

C, K, GRID = 20, 4, (3, 7)


def meta_of(**changes) -> StoreMeta:
    default = {
        "record_hash": "aa",
        "num_records": 11,
        "class_hash": "cc",
        "num_classes": C,
        "teacher": "resnet",
        "teacher_hash": "ee",
        "grid": GRID,
        "kind": "logit",
        "groups": (C,),
        "top_k": K,
        "block_size": 3,
    }
    return StoreMeta(**default | changes)


def maps_of(rows) -> torch.Tensor:
    """A teacher: its images are their row numbers."""
    maps = np.stack([np.random.default_rng(int(row)).normal(0, 4, (C, *GRID)) for row in rows])
    return torch.from_numpy(maps).float()


def fill_store(path: Path, meta: StoreMeta, rank: int = 0, world_size: int = 1, seconds: float = 0.0) -> None:
    def teacher(rows):
        time.sleep(seconds)
        return maps_of(rows)

    writer = LabelMapWriter.create_or_resume(path, meta, rank=rank, world_size=world_size)
    annotate(teacher, ((block, block) for block in writer.outstanding()), writer)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# The best of each cell, against float64


def best_in_float64(maps: np.ndarray, k: int, kind: str, activation: str | None):
    """Values, ids and fill of each cell, from the definitions."""
    order = np.argsort(-maps, axis=1, kind="stable")  # of equals the lower class
    ids, rest = order[:, :k], np.take_along_axis(maps, order[:, k:], axis=1)
    values = np.take_along_axis(maps, ids, axis=1)
    if kind == "probability":
        fill = rest.mean(axis=1)
    elif activation == "softmax":
        fill = np.log(np.exp(rest).mean(axis=1))
    else:
        mean = (1 / (1 + np.exp(-rest))).mean(axis=1)
        fill = np.log(mean / (1 - mean))
    return values, ids, fill


def softmax(x: np.ndarray) -> np.ndarray:
    odds = np.exp(x - x.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


KINDS = [("logit", "softmax"), ("logit", "sigmoid"), ("probability", None), ("probability", "softmax")]


def groups_of(num_classes, activation):
    return (num_classes,) if activation == "softmax" else ()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kind", "activation"), KINDS)
@pytest.mark.parametrize(("num_classes", "k"), [(20, 1), (20, 4), (20, 19), (3000, 5), (70_000, 5)])
def test_best_and_fill_equal_float64(num_classes, k, kind, activation, memory_format):
    maps = torch.from_numpy(np.random.default_rng(k).normal(-2, 3, (2, num_classes, 2, 3))).float()
    if kind == "probability":
        maps = maps.softmax(1)
    values, ids, fill = best_in_float64(maps.double().numpy(), k, kind, activation)
    ours = top_k_of(maps.to(memory_format=memory_format), k, kind, groups_of(num_classes, activation))
    np.testing.assert_array_equal(ours[0], values)
    np.testing.assert_array_equal(ours[1], ids)
    np.testing.assert_allclose(ours[2], fill, rtol=1e-5, atol=1e-5 if kind == "logit" else 1e-9)


def test_one_hot_cell_by_hand():
    maps = torch.zeros(1, 3, 2, 3)
    maps[0, 2, 1, 0], maps[0, 0, 1, 0] = np.log(6), np.log(2)
    values, ids, fill = top_k_of(maps, 1, "logit", (3,))
    assert values[0, 0].flatten().tolist() == pytest.approx([0, 0, 0, np.log(6), 0, 0])
    assert ids[0, 0].tolist() == [[0, 0, 0], [2, 0, 0]]
    assert fill[0].flatten().tolist() == pytest.approx([0, 0, 0, np.log((2 + 1) / 2), 0, 0], abs=1e-7)


@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_of_equal_values_the_lower_class_comes_first(kind, activation):
    noise = np.random.default_rng(0)
    steps = torch.from_numpy(noise.choice([-0.25, -0.0, 0.0, 0.25], (3, 50, *GRID))).float()  # both zeros are equal
    maps = steps if kind == "logit" else steps + 0.5
    _, ids, _ = best_in_float64(maps.double().numpy(), 30, kind, activation)
    np.testing.assert_array_equal(top_k_of(maps, 30, kind, groups_of(50, activation))[1], ids)


@pytest.mark.parametrize(("kind", "activation"), KINDS)
@pytest.mark.parametrize("level", [1 / 3, 0.1, 0.7, 1e-6])
def test_the_fill_is_never_above_a_stored_value_nor_when_rounded(kind, activation, level):
    noise = torch.from_numpy(np.random.default_rng(0).uniform(1, 1 + 3e-7, (2, 90, *GRID))).float()
    values, _, fill = top_k_of(noise * level, 5, kind, groups_of(90, activation))
    assert (fill <= values.amin(1)).all()
    assert (fill.half() <= values.half().amin(1)).all()


@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_where_all_classes_are_stored_the_fill_is_the_least(kind, activation):
    values, ids, fill = top_k_of(maps_of([1, 2]).softmax(1), C, kind, groups_of(C, activation))
    assert torch.equal(fill, values[:, -1])
    assert (ids.sort(1).values == torch.arange(C)[:, None, None]).all()


@pytest.mark.parametrize("shift", [-90.0, -6.0, 0.0, 6.0, 90.0])
def test_an_absent_class_of_a_sigmoid_teacher_is_worth_its_mean_probability(shift):
    """Not sigmoid(0) = 0.5, which a fill of 0 would say."""
    maps = maps_of([3]).double().numpy() / 4 + shift
    _, _, fill = top_k_of(torch.from_numpy(maps), K, "logit")
    rest = np.sort(maps, axis=1)[:, :-K]
    # The log of the odds in terms that neither vanish nor overflow: mean(p) / mean(1 - p).
    odds = np.logaddexp.reduce(-np.logaddexp(0, -rest), 1) - np.logaddexp.reduce(-np.logaddexp(0, rest), 1)
    np.testing.assert_allclose(fill, odds, rtol=1e-5, atol=1e-5)
    if shift == -6:
        probability = torch.sigmoid(fill).double().numpy()
        np.testing.assert_allclose(probability, (1 / (1 + np.exp(-rest))).mean(1), rtol=1e-5)
        assert probability.max() < 0.01


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@pytest.mark.parametrize("k", [1, 4, 19, 20])
def test_stored_logits_become_the_full_softmax_again(tmp_path, k, dtype):
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of(top_k=k, dtype=dtype))
    annotate(lambda rows: maps_of(rows) / 4, ((block, block) for block in writer.outstanding()), writer)
    read = LabelMapStore.open(tmp_path / "maps").read(range(11)).as_kind("probability")
    exact = softmax(maps_of(range(11)).double().numpy() / 4)
    stored = np.take_along_axis(exact, read.ids.long().numpy(), axis=1)
    np.testing.assert_allclose(read.values, stored, atol=1e-3 if dtype == "float16" else 5e-3)
    np.testing.assert_allclose(read.values.sum(1) + (C - k) * read.fill, 1, atol=1e-5)


def test_stored_probabilities_keep_their_mass(tmp_path):
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of(kind="probability"))
    annotate(lambda rows: maps_of(rows).softmax(1), ((block, block) for block in writer.outstanding()), writer)
    read = LabelMapStore.open(tmp_path / "maps").read(range(11))
    np.testing.assert_allclose(read.values.float().sum(1) + (C - K) * read.fill, 1, atol=1e-3)


@pytest.mark.parametrize(
    ("k", "kind", "groups", "message"),
    [
        (0, "logit", (C,), "top_k: expected 1 to the 20 classes, got 0"),
        (21, "logit", (C,), "top_k: expected 1 to the 20 classes, got 21"),
        (4, "logit", (8, 12), "got logits in 2 groups; store all classes"),
        (4, "mass", (), "got mass; store all classes"),
        (4, "attribution", (C,), "got attribution"),
    ],
)
def test_what_has_no_best_of_each_cell_is_refused(k, kind, groups, message):
    with pytest.raises(InputError, match=message):
        top_k_of(maps_of([0]), k, kind, groups)


# Filling a store


def test_a_store_holds_the_best_of_what_the_teacher_gives(tmp_path):
    fill_store(tmp_path / "maps", meta_of())
    values, ids, fill = top_k_of(maps_of(range(11)), K, "logit", (C,))
    store = LabelMapStore.open(tmp_path / "maps")
    store.check(record_hash="aa", class_hash="cc", num_records=11)
    maps = store.read(range(11))
    assert torch.equal(maps.values, values.half())
    assert torch.equal(maps.ids, ids)
    assert torch.equal(maps.fill, fill.half().float())


def test_all_classes_of_attributions_are_stored(tmp_path):
    fill_store(tmp_path / "maps", meta_of(top_k=0, kind="attribution", groups=()))
    maps = LabelMapStore.open(tmp_path / "maps").read([10, 2])
    assert torch.equal(maps.values, maps_of([10, 2]).half())
    assert (maps.ids, maps.kind) == (None, "attribution")


def test_a_block_may_come_in_parts(tmp_path):
    fill_store(tmp_path / "whole", meta_of())
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of())
    parts = [part for block in writer.outstanding() for part in (block[:2], block[2:]) if part]
    annotate(maps_of, ((torch.tensor(part), part) for part in parts), writer)
    assert content(tmp_path / "maps") == content(tmp_path / "whole")


def test_bad_maps_are_refused(tmp_path):
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of())
    blocks = [(block, block) for block in writer.outstanding()]
    with pytest.raises(InputError, match=r"maps of \(classes, h, w\) \(19, 3, 7\), but the store's are \(20, 3, 7\)"):
        annotate(lambda rows: maps_of(rows)[:, 1:], blocks, writer)
    with pytest.raises(InputError, match=r"\(20, 7, 3\), but the store's are \(20, 3, 7\)"):
        annotate(lambda rows: maps_of(rows).mT, blocks, writer)
    with pytest.raises(InputError, match=r"the batches ended with 2 blocks left, from row 3"):
        annotate(maps_of, [blocks[0], blocks[2]], writer)


@pytest.mark.parametrize("top_k", [0, K])
@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
def test_a_map_with_nan_is_refused_wherever_it_is(tmp_path, top_k, best, value):
    def teacher(rows):
        maps = maps_of(rows)
        maps[-1, maps[-1, :, 1, 6].argmax() if best else maps[-1, :, 1, 6].argmin(), 1, 6] = value
        return maps

    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta_of(top_k=top_k))
    with pytest.raises(InputError, match=r"row 2: (values|fill) not finite in float16"):
        annotate(teacher, ((block, block) for block in writer.outstanding()), writer)


# Interruptions and ranks


def in_fork(*arguments) -> multiprocessing.Process:
    """A started process that fills a store; it shares none of the locks that a killed one would leave taken."""

    def work():
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # the default is one for all forks
        fill_store(*arguments)

    child = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    child.start()
    return child


def test_killed_at_ten_moments_and_resumed_equals_one_made_in_one_go(tmp_path):
    meta = meta_of(num_records=300)
    fill_store(tmp_path / "whole" / "maps", meta)
    folder, chance = tmp_path / "killed" / "maps", random.Random(0)
    for _ in range(10):
        # 100 blocks of 20 ms: all ten together do not finish it.
        child = in_fork(folder, meta, 0, 1, 0.02)
        child.join(chance.uniform(0, 0.2))
        child.kill()
        child.join(60)
        assert child.exitcode == -9
    fill_store(folder, meta)
    assert content(folder) == content(tmp_path / "whole" / "maps")
    assert [entry.name for entry in folder.parent.iterdir()] == ["maps"]


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_that_run_at_once_make_the_store_of_one(tmp_path, world_size):
    meta = meta_of(num_records=40)
    fill_store(tmp_path / "one", meta)
    # Rank 0 last: the others have to wait for it.
    ranks = [in_fork(tmp_path / "many", meta, r, world_size, 0.005) for r in reversed(range(world_size))]
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * world_size
    assert content(tmp_path / "many") == content(tmp_path / "one")


# Verifying


@pytest.fixture(params=[("float16", K), ("uint8", K), ("float16", 0), ("uint8", 0)], ids=str)
def store(request, tmp_path) -> LabelMapStore:
    dtype, top_k = request.param
    fill_store(tmp_path / "maps", meta_of(dtype=dtype, top_k=top_k))
    return LabelMapStore.open(tmp_path / "maps")


BATCHES = [([9, 2], [9, 2]), (np.array([4]), [4])]


def test_a_store_of_the_same_teacher_is_verified(store):
    share = 5e-4 if store.meta.dtype == "float16" else 4e-3
    assert 0 < verify(maps_of, BATCHES, store, share) <= share
    verify(lambda rows: maps_of(rows) + 1e-4 * maps_of([77]), BATCHES, store, share + 1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda maps: maps + 0.2,
        lambda maps: maps.flip(-1),
        lambda maps: maps.roll(1, dims=1),
        lambda maps: torch.full_like(maps, torch.nan),
    ],
    ids=["shifted", "mirrored", "other classes", "nan"],
)
def test_another_teacher_is_noticed(store, change):
    def teacher(rows):
        maps = maps_of(rows)
        maps[-1] = change(maps[-1:])[0]
        return maps

    with pytest.raises(
        InputError, match=r"maps: row 2 differs by .* from the map made now, more than the tolerance 0.005"
    ):
        verify(teacher, BATCHES, store, 5e-3)


def test_classes_that_are_not_the_best_are_noticed(tmp_path):
    """Their values are right, and the fill: only the choice is wrong."""
    meta = meta_of(num_records=2, block_size=2)
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    maps = maps_of([0, 1])
    values, ids = maps.sort(dim=1, descending=True)
    _, _, fill = top_k_of(maps, K, "logit", (C,))
    writer.write([0, 1], values[:, 1 : K + 1], ids[:, 1 : K + 1], fill)
    with pytest.raises(InputError, match=r"maps: row 0 differs"):
        verify(maps_of, [([0, 1], [0, 1])], LabelMapStore.open(tmp_path / "maps"), 1e-3)


def test_another_fill_is_noticed(tmp_path):
    meta = meta_of(num_records=1)
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    values, ids, fill = top_k_of(maps_of([0]), K, "logit", (C,))
    writer.write([0], values, ids, fill - 1)
    with pytest.raises(InputError, match=r"maps: row 0 differs"):
        verify(maps_of, [([0], [0])], LabelMapStore.open(tmp_path / "maps"), 1e-3)


def test_classes_of_nearly_equal_values_may_change_places(tmp_path):
    meta = meta_of(num_records=1)
    maps = torch.zeros(1, C, *GRID)
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    annotate(lambda rows: maps, [([0], [0])], writer)
    other = maps + torch.linspace(0, 1e-5, C)[:, None, None]
    assert verify(lambda rows: other, [([0], [0])], LabelMapStore.open(tmp_path / "maps"), 1e-4) < 2e-5


def test_the_tolerance_is_a_share_of_large_values(tmp_path):
    meta = meta_of(num_records=1, top_k=0)
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    annotate(lambda rows: maps_of(rows) * 500, [([0], [0])], writer)
    opened = LabelMapStore.open(tmp_path / "maps")
    largest = float((maps_of([0]) * 500).abs().max())
    found = verify(lambda rows: maps_of(rows) * 500 + 0.01 * largest, [([0], [0])], opened, 0.02)
    assert found == pytest.approx(0.01, abs=1e-3)


def test_a_label_map_is_made_of_the_best_of_each_cell():
    """What annotate stores is what LabelMap takes, without a store between."""
    values, ids, fill = top_k_of(maps_of([5]), K, "logit", (C,))
    maps = LabelMap(values=values, ids=ids, kind="logit", fill=fill, groups=(C,)).as_kind("probability")
    exact = softmax(maps_of([5]).double().numpy())
    np.testing.assert_allclose(maps.values, np.take_along_axis(exact, ids.long().numpy(), axis=1), atol=1e-6)
