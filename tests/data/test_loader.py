import multiprocessing
import multiprocessing.queues
import multiprocessing.resource_sharer
import os
import pickle
import select
import signal
import struct
import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mlvision.data.loader import (
    EpochBatches,
    ImageDataset,
    LoaderConfig,
    eval_loader,
    rank_slice,
    train_loader,
)
from mlvision.data.manifest import Manifest, Record
from mlvision.data.samplers import shuffled
from mlvision.data.views import EvalView, TrainView, ViewConfig
from mlvision.errors import InputError
from mlvision.label_maps.store import LabelMapStore, LabelMapWriter, StoreMeta
from mlvision.types import Batch, EpochPlan

VIEW = TrainView(ViewConfig(color_jitter=0.3), (12, 20))
TWIN = TrainView(ViewConfig(color_jitter=0.3, backend="torchvision"), (12, 20))
NUM_IMAGES = 14


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    records = []
    for i in range(NUM_IMAGES):
        path = folder / f"{i}.png"
        Image.fromarray(noise.integers(0, 256, (30 + i, 50 - i, 3), dtype=np.uint8)).save(path)
        records.append(Record(path.name, str(path), labels=(i % 3,), unknown=(3,) if i % 4 == 0 else ()))
    return Manifest(("sea", "sand", "trees", "cars"), tuple(records), "train")


def config(num_workers: int = 0, batch_size: int = 4) -> LoaderConfig:
    return LoaderConfig(batch_size=batch_size, eval_batch_size=batch_size, num_workers=num_workers)


def content(batches: Iterable[Batch]) -> list[tuple]:
    """Batches as values that == compares bit for bit, NaN too."""
    return [
        tuple(t.contiguous().numpy().tobytes() for t in (b.images, b.targets, b.index, b.view.boxes, b.view.flipped))
        for b in batches
    ]


def two_epochs(loader) -> list[list[tuple]]:
    epochs = []
    for epoch in range(2):
        loader.set_position(epoch)
        epochs.append(content(loader))
    return epochs


def indices(batches: Iterable[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.index.tolist()]


# What a batch holds


def test_a_batch_holds_the_views_of_its_images(manifest):
    dataset = ImageDataset(manifest, VIEW, seed=5)
    loader = train_loader(manifest, VIEW, config(), seed=5)
    loader.set_position(3)
    for batch in loader:
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (4, 3, 12, 20)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for row, index in enumerate(batch.index.tolist()):
            (view,) = dataset[3, index].views
            assert torch.equal(batch.images[row], view.image)
            assert batch.view.boxes[row].tolist() == pytest.approx(view.box)
            assert batch.view.flipped[row].item() == view.flipped
            np.testing.assert_array_equal(batch.targets[row], manifest.targets[index])


def test_views_of_an_image_are_adjacent_and_differ(manifest):
    one, three = (train_loader(manifest, VIEW, config(), seed=5, num_views=n) for n in (1, 3))
    for single, batch in zip(one, three, strict=True):
        assert len(batch.images) == 12
        assert batch.index.tolist() == [i for i in single.index.tolist() for _ in range(3)]
        assert torch.equal(batch.images[::3], single.images)  # the first view is the only one of num_views=1
        assert torch.equal(batch.view.boxes[::3], single.view.boxes)
        np.testing.assert_array_equal(batch.targets, single.targets.repeat_interleave(3, dim=0))
        boxes = batch.view.boxes.reshape(4, 3, 4).tolist()
        assert all(len({tuple(box) for box in views}) == 3 for views in boxes)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_holds_the_label_maps_of_its_images(manifest, tmp_path, num_workers):
    meta = StoreMeta(
        manifest.hash, NUM_IMAGES, manifest.class_hash, 4, "a ramp", "", (2, 3), "logit", (), 0, NUM_IMAGES
    )
    maps = torch.arange(NUM_IMAGES * 4 * 6).view(NUM_IMAGES, 4, 2, 3).float()
    LabelMapWriter.create_or_resume(tmp_path / "maps", meta).write(range(NUM_IMAGES), maps)
    store = LabelMapStore.open(tmp_path / "maps")
    loader = train_loader(manifest, VIEW, config(num_workers), seed=5, num_views=2, label_maps=store)
    seen = 0
    for batch in loader:
        assert (batch.label_map.kind, batch.label_map.groups) == ("logit", ())
        assert torch.equal(batch.label_map.values.float(), maps[batch.index])
        moved = batch.to("cpu")
        assert torch.equal(moved.label_map.values, batch.label_map.values)
        seen += len(batch.index)
    assert seen == 24


@pytest.mark.parametrize("num_workers", [0, 2])
def test_labels_as_lists_are_those_of_the_table(manifest, num_workers):
    """Two, one, no and three labels, of two views each; what is left of a row is -1."""
    lists = [(0, 2), (1,), (), (0, 1, 3)]
    records = [replace(record, labels=lists[i % 4], unknown=()) for i, record in enumerate(manifest.records)]
    known = replace(manifest, records=tuple(records))
    loader = train_loader(known, VIEW, config(num_workers), seed=5, num_views=2, sparse_targets=True)
    for batch in loader:
        assert batch.targets.shape == (8, 0)
        longest = max(len(lists[i % 4]) for i in batch.index.tolist())
        for row, index in zip(batch.labels.tolist(), batch.index.tolist(), strict=True):
            assert row == [*lists[index % 4], *[-1] * (longest - len(lists[index % 4]))]
        assert torch.equal(batch.split(4)[1].labels, batch.labels[2:4])


def test_lists_of_labels_cannot_say_what_is_unknown(manifest):
    with pytest.raises(InputError, match="split 'train': expected every label to be known, 4 are not"):
        train_loader(manifest, VIEW, config(), seed=5, sparse_targets=True)


def test_a_batch_of_very_many_classes_stays_small(manifest):
    """A million classes: a table of 4 images would have 16 MB."""
    classes = tuple(map(str, range(1_000_000)))
    records = [replace(record, labels=(999_999,), unknown=()) for record in manifest.records]
    known = Manifest(classes, tuple(records), "train")
    batch = next(iter(train_loader(known, VIEW, config(), seed=5, sparse_targets=True)))
    assert batch.labels.tolist() == [[999_999]] * 4


# Reproducibility


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("view", [VIEW, TWIN], ids=["albumentations", "torchvision"])
def test_batches_are_the_same_for_any_number_of_workers(manifest, view):
    alone, *others = (two_epochs(train_loader(manifest, view, config(n), seed=7, num_views=2)) for n in (0, 2, 4))
    assert len(alone[0]) == 3
    for other in others:
        assert other == alone


def test_views_differ_between_epochs_images_and_seeds(manifest):
    boxes = {
        view.box
        for seed in (0, 1)
        for epoch in (0, 1)
        for index in (0, 1, 2)
        for view in ImageDataset(manifest, VIEW, seed, num_views=2)[epoch, index].views
    }
    assert len(boxes) == 2 * 2 * 3 * 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_start_step_gives_the_tail_of_the_epoch(manifest, num_workers):
    loader = train_loader(manifest, VIEW, config(num_workers), seed=1)
    loader.set_position(2)
    whole = content(loader)
    for start in range(4):
        loader.set_position(2, start)
        assert len(loader) == 3
        assert content(loader) == whole[start:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_left_early_does_not_spoil_the_next(manifest, num_workers):
    loader = train_loader(manifest, VIEW, config(num_workers), seed=1)
    expected = two_epochs(loader)[1]
    loader.set_position(0)
    next(iter(loader))
    loader.set_position(1)
    assert content(loader) == expected


@pytest.mark.parametrize("view", [VIEW, TWIN], ids=["albumentations", "torchvision"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_random_states_are_untouched(manifest, view, num_workers):
    # Python's own generator: see test_transforms. Here beartype, which checks types in these tests, draws from it.
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    two_epochs(train_loader(manifest, view, config(num_workers), seed=1))
    list(eval_loader(manifest, EvalView((8, 8)), config(num_workers)))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))


def test_a_dataset_can_be_sent_to_a_process_that_was_not_forked(manifest):
    dataset = ImageDataset(manifest, VIEW, seed=5)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[1, 2].views[0].image, dataset[1, 2].views[0].image)


# Ranks


def test_two_ranks_share_the_batches_of_one(manifest):
    one = train_loader(manifest, VIEW, config(), seed=1)
    two = [train_loader(manifest, VIEW, config(), seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    for loader in (one, *two):
        loader.set_position(1)
    for whole, first, second in zip(one, *two, strict=True):
        assert len(first.index) == len(second.index) == 2
        assert torch.equal(torch.cat([first.images, second.images]), whole.images)
        assert torch.equal(torch.cat([first.index, second.index]), whole.index)
        assert torch.equal(torch.cat([first.view.boxes, second.view.boxes]), whole.view.boxes)
        assert torch.equal(torch.cat([first.view.flipped, second.view.flipped]), whole.view.flipped)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("rows", [None, np.array([9, 1, 4, 4, 0])])
def test_evaluation_has_the_same_batches_for_any_number_of_ranks(manifest, world_size, rows):
    def batches(rank, world_size):
        loader = eval_loader(manifest, EvalView((8, 8)), config(), rows=rows, rank=rank, world_size=world_size)
        found = [batch.index.tolist() for batch in loader]
        assert len(loader) == len(found)
        return found

    whole = batches(0, 1)
    assert [i for batch in whole for i in batch] == list(range(NUM_IMAGES) if rows is None else rows)
    for rank in range(world_size):
        assert batches(rank, world_size) == whole[rank::world_size]


def test_slices_of_a_short_batch_are_disjoint_and_whole():
    rows = np.arange(100, 107)
    assert [rank_slice(rows, rank, 3).tolist() for rank in range(3)] == [[100, 101], [102, 103], [104, 105, 106]]
    last = [list(EpochBatches(lambda epoch: rows, 6, rank, 3, drop_last=False))[-1] for rank in range(3)]
    assert last == [[], [], [(0, 106)]]


def test_a_plan_replaces_order_and_targets_of_its_epoch_only(manifest):
    """The order repeats and leaves out; 14 rows in batches of 4, from the second batch on."""
    order = torch.tensor([7, 7, 2, 5, 0, 1, 13, 3, 7, 7, 8, 9, 9, 2])
    targets = torch.arange(NUM_IMAGES * 4).view(NUM_IMAGES, 4).float()
    loader = train_loader(manifest, VIEW, config(num_workers=1), seed=1, num_views=2)
    loader.set_position(5, 1, EpochPlan(order, targets, {"place": torch.arange(14)}))
    batches = list(loader)
    assert [batch.index[::2].tolist() for batch in batches] == [[0, 1, 13, 3], [7, 7, 8, 9]]
    assert [batch.extra["place"].tolist() for batch in batches] == [
        [4, 4, 5, 5, 6, 6, 7, 7],
        [8, 8, 9, 9, 10, 10, 11, 11],
    ]
    for batch in batches:
        assert torch.equal(batch.targets, targets[batch.index])
        assert torch.equal(batch.split(2)[1].extra["place"], batch.extra["place"][4:])
        assert torch.equal(batch.to("cpu").extra["place"], batch.extra["place"])
    loader.set_position(5, 1)
    assert indices(loader) == shuffled(manifest, 1)(5)[4:12].repeat(2).tolist()
    assert not next(iter(loader)).extra


def test_the_processes_share_the_rows_of_a_plan(manifest):
    order, place = torch.arange(14).flip(0), {"place": torch.arange(14)}
    for rank in (0, 1):
        loader = train_loader(manifest, VIEW, config(), seed=1, rank=rank, world_size=2)
        loader.set_position(0, 1, EpochPlan(order, extra=place))
        (first, *_) = loader
        places = [[4, 5], [6, 7]][rank]
        assert first.extra["place"].tolist() == places
        assert first.index.tolist() == [13 - number for number in places]


# Bad input


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_one_line_that_names_it(manifest, tmp_path, num_workers):
    bad = tmp_path / "torn.jpg"
    Image.new("RGB", (40, 30), "red").save(bad)
    bad.write_bytes(bad.read_bytes()[:200])
    records = list(manifest.records)
    records[6] = replace(records[6], path=str(bad))
    loader = eval_loader(replace(manifest, records=tuple(records)), EvalView((8, 8)), config(num_workers))
    batches = iter(loader)
    assert next(batches).index.tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError) as error:
        next(batches)
    assert error.type is InputError
    assert str(error.value).startswith(f"{bad}: ")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="torn"):
        ImageDataset(replace(manifest, records=tuple(records)), EvalView((8, 8)))[0, 6]


def test_batches_that_cannot_be_made_are_refused(manifest):
    with pytest.raises(InputError, match=r"^loader.batch_size: expected at most the 14 images of an epoch, got 15$"):
        train_loader(manifest, VIEW, config(batch_size=15), seed=0)
    with pytest.raises(InputError, match=r"^loader.batch_size: 7 images cannot be divided over 2 ranks$"):
        train_loader(manifest, VIEW, config(batch_size=7), seed=0, world_size=2)
    assert len(train_loader(manifest, VIEW, config(batch_size=14), seed=0)) == 1


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [("batch_size", 0, "at least 1"), ("eval_batch_size", 0, "at least 1"), ("num_workers", -1, "0 to 256")],
)
def test_a_bad_option_is_named(field, value, expected):
    with pytest.raises(InputError, match=rf"^loader\.{field}: expected {expected}, got {value}$"):
        LoaderConfig(**{field: value})


# Workers that fail: tried in processes of their own, which they may leave behind spoilt


def outcome_of_workers(spoil, manifest, limit=60) -> str:
    """What the loader raises, and how long that took to come is not asked; "" where all batches came."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "something else"
        try:
            signal.alarm(limit)
            for batch in train_loader(manifest, TWIN, config(num_workers=2, batch_size=2), seed=0):
                spoil(batch)
            said = ""
        except InputError as error:
            said = str(error)
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        said = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return said


def refused(*_, **__):
    raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize("announced", [False, True])
def test_a_killed_worker_is_one_line(manifest, announced):
    """Killed at any time, or between saying that a batch is ready and handing it over, which is too short to hit."""

    def spoil(batch):
        if announced:
            multiprocessing.resource_sharer.DupFd.detach = refused
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    said = outcome_of_workers(spoil, manifest)
    assert said.startswith("a loader process was killed, most often because memory ran out")
    assert said.endswith("loader.num_workers=0 needs none of this")


def no_room(*_, **__):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def fail_to_collate():
    torch.UntypedStorage._new_shared = no_room


def fail_to_send():
    """As when there is room for the images but not for their targets, which another thread of the worker sends."""

    multiprocessing.queues._ForkingPickler.dumps = no_room


@pytest.mark.parametrize("spoil", [fail_to_collate, fail_to_send])
def test_full_shared_memory_ends_the_wait_and_is_named(manifest, monkeypatch, spoil):
    monkeypatch.setattr("mlvision.data.loader.cv2.setNumThreads", lambda _: spoil())  # in each worker, as it starts
    said = outcome_of_workers(lambda batch: None, manifest)
    assert said.startswith("the loader's processes hand batches over in shared memory, and that is full (")
    assert "/dev/shm" in said
    assert "\n" not in said


def test_a_long_wait_is_said_once_and_ends_nothing(manifest, monkeypatch, capfd):
    monkeypatch.setattr("mlvision.data.loader._IMPATIENT_AFTER", 0.1)
    monkeypatch.setattr(
        "mlvision.data.loader.cv2.setNumThreads", lambda _: time.sleep(1)
    )  # in each worker, as it starts
    # One batch: there is one wait, whatever else the machine is doing.
    assert len(list(train_loader(manifest, TWIN, config(num_workers=1, batch_size=len(manifest)), seed=0))) == 1
    said = capfd.readouterr().err
    assert said.count("still waiting for the loader's processes after 0 s") == 1
    assert "loader.num_workers=0" in said


def test_dead_workers_are_noticed_by_who_waits_for_them(manifest):
    """torch has them raise an error wherever the main process is."""
    before = signal.getsignal(signal.SIGCHLD)
    loader = train_loader(manifest, TWIN, config(num_workers=1), seed=0)
    next(iter(loader))
    assert signal.getsignal(signal.SIGCHLD) is before


# Signals


def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_main_process(manifest):
    """As `timeout` and torchrun send it; the main process must still get the rest of its batches, to stop in order."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            signal.alarm(60)
            received = []
            signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
            loader = train_loader(manifest, TWIN, config(num_workers=2, batch_size=1), seed=0)
            batches = iter(loader)
            next(batches), next(batches)  # one of each worker: both have started
            os.killpg(0, signal.SIGTERM)
            code = 0 if len(list(batches)) == 12 and received else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_worker_whose_run_was_killed_while_it_started_leaves(manifest, monkeypatch):
    reader, writer = os.pipe()

    def start_slowly(threads):
        os.write(writer, struct.pack("i", os.getpid()))
        time.sleep(0.5)

    monkeypatch.setattr("mlvision.data.loader.cv2.setNumThreads", start_slowly)
    child = os.fork()
    if child == 0:
        try:
            next(iter(train_loader(manifest, TWIN, config(num_workers=1), seed=0)))
        finally:
            os._exit(1)
    os.close(writer)
    (worker,) = struct.unpack("i", os.read(reader, 4))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    # The pipe ends with the last process that holds it. DataLoader's own watch looks every five seconds.
    left = bool(select.select([reader], [], [], 15)[0]) and os.read(reader, 1) == b""
    os.close(reader)
    if not left:
        os.kill(worker, signal.SIGKILL)
    assert left
