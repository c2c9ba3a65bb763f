"""A board of four squares, each of one of five colours: classes in groups of which each image shows exactly one.

Nothing but the labels' table and data.groups says so; scores, decisions, measures and explanations follow.
"""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mlvision import load_run
from mlvision.commands import eval as eval_script
from mlvision.commands import explain, predict
from mlvision.commands import train as train_script
from mlvision.errors import InputError
from mlvision.runs.load import read_for
from mlvision.space import LabelSpace

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 60, 220),
    "white": (250, 250, 250),
    "black": (9, 9, 9),
}
CLASSES = tuple(f"{square} {colour}" for square in ("a1", "b1", "a2", "b2") for colour in COLOURS)
GROUPS = (5, 5, 5, 5)
NUM_IMAGES = {"train": 32, "test": 11}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "part", *CLASSES])
        for part, number in NUM_IMAGES.items():
            for i in range(number):
                colours = noise.integers(5, size=4)
                squares = np.array(list(COLOURS.values()), dtype=np.uint8)[colours].reshape(2, 2, 3)
                Image.fromarray(squares.repeat(24, axis=0).repeat(24, axis=1)).save(folder / f"images/{part}{i}.png")
                writer.writerow([f"{part}{i}.png", part, *np.eye(5, dtype=int)[colours].flatten()])
    return folder


def arguments(root, *more):
    return [
        *("data.name=csv", f"data.root={root}", "data.images=images", "data.split_column=part", "data.val_fraction=0.25"),
        *("data.groups=[5,5,5,5]", "model.name=test_resnet", "view.size=48", "view.scale=[0.9,1]", "view.flip=0"),
        *("loader.batch_size=8", "loader.num_workers=0", "optim.epochs=1", "device=cpu", "threads=1"),
        *("log.tensorboard=false", *more),
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["softmax", "bce"])
def run(request, root, tmp_path_factory):
    """A run of each of the losses, and what of its logits is a probability."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    train_script.main(arguments(root, f"method.loss={request.param}", f"out={folder}"))
    return load_run(folder, device="cpu")


def one_of_each(decided):
    return np.asarray(decided).reshape(-1, 4, 5).sum(axis=2) == 1


def test_the_space_of_a_run_is_what_loss_and_data_make_of_it(run):
    softmax = run.folder.name == "softmax"
    assert run.space == LabelSpace(CLASSES, groups=GROUPS if softmax else (), exclusive=GROUPS)
    assert run.context.space == read_for(run, "test")[0].space == LabelSpace(CLASSES, exclusive=GROUPS)
    logits = torch.randn(3, 20)
    expected = logits.view(3, 4, 5).softmax(2).flatten(1) if softmax else logits.sigmoid()
    torch.testing.assert_close(run.space.scores(logits), expected)


def test_evaluation_decides_one_class_of_each_group(run):
    metrics = eval_script.main([str(run.folder)])["raw"]
    assert metrics["OP"] == metrics["OR"] == metrics["OF1"]  # as many decisions as labels, whatever the threshold
    assert 0 < metrics["OP"] < 1
    with np.load(run.folder / "predictions_test.npz", allow_pickle=False) as arrays:
        kept = dict(arrays)
    space = LabelSpace(tuple(kept["classes"]), tuple(kept["groups"].tolist()), tuple(kept["exclusive"].tolist()))
    assert space == run.space
    decided = space.decide(kept["logits"], 0.0)
    assert one_of_each(decided).all()
    assert (decided & (kept["targets"] == 1)).sum() == pytest.approx(metrics["OP"] * 4 * NUM_IMAGES["test"])
    rows = list(csv.DictReader(open(run.folder / "per_class_test.csv", newline="")))
    hits = sum(float(row["recall"]) * int(row["num_positive"]) for row in rows if row["recall"] != "nan")
    assert hits == pytest.approx(metrics["OP"] * 4 * NUM_IMAGES["test"])


def test_prediction_names_one_class_of_each_group_whatever_the_threshold(run, tmp_path):
    out = tmp_path / "rows.jsonl"
    predict.main([str(run.folder), "split=test", f"out={out}", "num_workers=0", "threshold=0.999", "device=cpu"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == NUM_IMAGES["test"]
    for row in rows:
        scores = np.array(list(row["scores"].values())).reshape(4, 5)
        assert [name.split()[0] for name in row["labels"]] == ["a1", "b1", "a2", "b2"]
        assert [CLASSES.index(name) % 5 for name in row["labels"]] == scores.argmax(1).tolist()


def test_explanations_are_of_the_decided_classes(run, tmp_path):
    out = tmp_path / "explanations"
    options = ["num_images=3", "grids=1", "num_workers=0", "device=cpu", "split=test"]
    explain.main([str(run.folder), "labels=[predicted]", "threshold=0.999", f"out={out}", *options])
    listed = json.loads((out / "report/data/index.js").read_text().removeprefix("mlvisionReport.index(")[:-3])["images"]
    assert len(listed) == 3
    for image in listed:
        decided = np.zeros(20)
        decided[image["predicted"]] = 1
        assert one_of_each(decided).all()
        assert {label["label"] for label in image["labels"]} == set(image["predicted"])
        assert all(label["outcome"] in (1, 2) for label in image["labels"])  # FP or TP, as the report orders them


def test_data_without_the_groups_of_a_run_are_refused(run):
    with pytest.raises(InputError, match=r"trained on groups of classes \[5, 5, 5, 5\], but the data has \[1, 1, 1"):
        eval_script.main([str(run.folder), "data.groups=[]"])


def test_the_groups_of_a_run_are_a_part_of_what_it_goes_on_with(run, root):
    saved = torch.load(run.folder / "checkpoints/last.pt", weights_only=True)
    assert saved["groups"] == list(GROUPS)
    assert saved["data_hashes"]["groups of classes"] == read_for(run, "train")[0].class_hash
