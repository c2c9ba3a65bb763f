"""The whole path through the scripts' own `main`: data -> train -> eval -> record; and what users get wrong on it."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import write_sen12ms
from PIL import Image

from mlvision import load_run
from mlvision.commands import eval as eval_script
from mlvision.commands import explain as explain_tool
from mlvision.commands import predict as predict_tool
from mlvision.commands import train as train_script
from mlvision.config import Config
from mlvision.data.edits import EDITS
from mlvision.data.loader import eval_loader
from mlvision.engine.callbacks import ProgressBar
from mlvision.engine.checkpoint import load_checkpoint
from mlvision.engine.evaluate import predict
from mlvision.engine.fit import LAST
from mlvision.engine.guard import NonFiniteError
from mlvision.engine.lock import locked
from mlvision.errors import InputError
from mlvision.losses import LOSSES
from mlvision.metrics import average_precision
from mlvision.options import load_options, parse_options
from mlvision.runs.build import build_run
from mlvision.runs.folder import choose_folder
from mlvision.runs.load import read_for
from mlvision.runs.splits import read_role
from mlvision.versions import CONFIG_VERSION

ROOT = Path(__file__).parents[1]


def metric_rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return {(int(r["step"]), r["name"]): float(r["value"]) for r in csv.DictReader(file)}


@pytest.fixture(scope="module")
def trained(scenes_root, tmp_path_factory):
    """A finished and evaluated run."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    config = ROOT / "configs/smoke/scenes_test_resnet_baseline.yaml"
    train_script.main([str(config), f"data.root={scenes_root}", "device=cpu", "threads=1", f"out={folder}"])
    metrics = eval_script.main([str(folder)])
    return folder, metrics


def test_a_run_folder_holds_what_it_promises(trained):
    folder, metrics = trained
    config = load_options(Config, folder / "config.yaml")
    assert (config.device, config.precision, config.threads) == ("cpu", "fp32", 1)
    assert config.name == "scenes_test_resnet_baseline"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert list((folder / "tensorboard").glob("events.*"))
    assert json.loads((folder / "metrics.json").read_text())["test"] == metrics
    record = json.loads((folder / "record.json").read_text())
    assert record["metrics"] == metrics
    assert Image.open(folder / "precision_recall_test.png").size[0] > 300
    assert not list(folder.glob("**/*.partial"))
    rows = list(csv.DictReader(open(folder / "per_class_test.csv", newline="")))
    assert [row["class"] for row in rows] == list(load_run(folder).classes)
    statistics = read_for(load_run(folder, device="cpu"), "train")[0].statistics()
    assert json.loads((folder / "statistics.json").read_text()) == {
        **{"positives": list(statistics.positives), "known": list(statistics.known)},
        "num_images": statistics.num_images,
    }


def test_the_scores_of_the_split_are_kept(trained):
    """All that the metrics were computed of, readable without pickle and without this code."""
    folder, metrics = trained
    run = load_run(folder, device="cpu")
    manifest, _ = read_for(run, "test")
    with np.load(folder / "predictions_test.npz", allow_pickle=False) as arrays:
        kept = dict(arrays)
    assert kept["keys"].tolist() == [record.key for record in manifest.records]
    assert kept["classes"].tolist() == list(run.classes)
    assert kept["groups"].tolist() == kept["exclusive"].tolist() == [1] * len(run.classes)
    assert (kept["logits"].dtype, kept["targets"].dtype, kept["index"].dtype) == ("f4", "f4", "i8")
    predictions = predict(run.method, eval_loader(manifest, run.view, run.config.loader), run.precision)
    np.testing.assert_array_equal(kept["targets"], predictions.targets.numpy())
    np.testing.assert_allclose(kept["logits"], predictions.logits.numpy(), atol=1e-5)
    assert kept["index"].tolist() == list(range(len(manifest)))
    ap = average_precision(kept["logits"], kept["targets"])
    assert np.nanmean(ap) == pytest.approx(metrics["ema"]["mAP"], abs=1e-6)


def test_the_images_file_splits_the_training_images(trained, scenes_root):
    folder, _ = trained
    rows = list(csv.DictReader(open(folder / "images.csv", newline="")))
    train, val = ({r["key"] for r in rows if r["split"] == split} for split in ("train", "val"))
    assert not train & val
    document = json.loads((scenes_root / "annotations/instances_train.json").read_text())
    assert len(train | val) == len({a["image_id"] for a in document["annotations"]})


def test_metrics_can_be_recomputed_from_predictions(trained, scenes_root):
    """eval.py's mAP from `load_run` alone, image by image, through PIL and the annotation file."""
    folder, metrics = trained
    run = load_run(folder, device="cpu")
    assert run.weights == "ema"
    document = json.loads((scenes_root / "annotations/instances_test.json").read_text())
    column = {c["id"]: run.classes.index(c["name"]) for c in document["categories"]}
    labels: dict[int, set[int]] = {}
    for annotation in document["annotations"]:
        labels.setdefault(annotation["image_id"], set()).add(column[annotation["category_id"]])
    images = [image for image in document["images"] if image["id"] in labels]
    targets = torch.tensor([[float(c in labels[i["id"]]) for c in range(len(run.classes))] for i in images])
    with torch.no_grad():
        logits = torch.cat(
            [run.method.predict(run.preprocess([Image.open(scenes_root / "images" / i["file_name"])])) for i in images]
        )
    ap = average_precision(logits, targets)
    assert metrics["ema"]["mAP"] == pytest.approx(ap[~ap.isnan()].mean().item(), abs=1e-6)
    assert f"{len(images)} images, {len(run.classes)} classes, 48 px, split test; plain AP" in metrics["protocol"]


def test_evaluation_may_see_larger_images_than_training(smoke_arguments, tmp_path):
    train_script.main([*smoke_arguments, "view.eval_size=64", "optim.epochs=1", f"out={tmp_path / 'run'}"])
    run = load_run(tmp_path / "run", device="cpu")
    assert run.preprocess([Image.new("RGB", (30, 40))]).shape[2:] == (64, 64)
    assert "64 px" in eval_script.main([str(run.folder)])["protocol"]
    built = build_run(run.config)
    assert built.train_loader.dataset[0, 0].views[0].image.shape[1:] == (48, 48)
    assert built.eval_loaders["val"].dataset[0, 0].views[0].image.shape[1:] == (64, 64)


def test_evaluation_on_real_lists_reports_their_accuracy(scenes_root, smoke_arguments, tmp_path):
    photos = sorted((scenes_root / "images" / "train").iterdir())
    for i, photo in enumerate(photos[:40]):
        folder = tmp_path / "set" / ("train" if i < 32 else "val") / f"n{i % 3:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / f"ILSVRC2012_val_{i - 31:08d}.JPEG")
    lists = [[], [0, 2], [1], [0, 1, 2], [], [2], [0], [1, 2]]
    (tmp_path / "set" / "real.json").write_text(json.dumps(lists))
    run = tmp_path / "run"
    data = ["data.name=imagenet", f"data.root={tmp_path / 'set'}", "data.real=real.json", "optim.epochs=1"]
    config = tmp_path / "smoke.yaml"
    config.write_text(
        Path(smoke_arguments[0]).read_text().replace("name: coco, root: datasets/scenes, images: images", "")
    )
    train_script.main([str(config), *smoke_arguments[2:], *data, "loader.batch_size=8", f"out={run}"])

    metrics = eval_script.main([str(run)])

    loaded = load_run(run)
    right = []
    for key in (tmp_path / "set" / "val").rglob("*.JPEG"):
        of_image = lists[int(key.stem[-8:]) - 1]
        if of_image:
            logits = loaded.method.predict(loaded.preprocess([Image.open(key)]))[0]
            right.append(int(logits.argmax()) in of_image)
    assert len(right) == 6
    assert metrics[loaded.weights]["real_accuracy"] == pytest.approx(np.mean(right))
    assert "2 images with an empty list left out" in metrics["protocol"]
    assert "real_accuracy" not in eval_script.main([str(run), "split=val"])[loaded.weights]


def test_a_run_on_other_bands_than_red_green_and_blue(smoke_arguments, tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for number, split in enumerate(("train", "test")):
        shares = {
            f"ROIs1158_spring_s2_{number}_p{i}.tif": [float(c == 5 * (i % 3)) for c in range(17)] for i in range(12)
        }
        write_sen12ms(root, split, shares, texture=9000)
    config = tmp_path / "bands.yaml"
    smoke = Path(smoke_arguments[0]).read_text()
    config.write_text(smoke.replace("name: coco, root: datasets/scenes, images: images", "bands: [B8, B4, B3, B2]"))
    few = ["data.name=sen12ms", f"data.root={root}", "loader.batch_size=4", "optim.epochs=1", "data.val_fraction=0.3"]
    arguments = [str(config), *smoke_arguments[2:], *few]
    for wrong, message in (
        ([], "model.in_chans: images of split train have 4 channels, got 3"),
        (["model.in_chans=4", "view.hue=0.1"], "view.hue: expected 0 for images of 4 channels"),
    ):
        with pytest.raises(InputError, match=message):
            train_script.main([*arguments, *wrong, f"out={tmp_path / 'wrong'}"])

    train_script.main([*arguments, "model.in_chans=4", f"out={tmp_path / 'run'}"])

    assert "bands B8 B4 B3 B2" in eval_script.main([str(tmp_path / "run")])["protocol"]
    with pytest.raises(InputError, match="have 3 channels, got 4"):
        eval_script.main([str(tmp_path / "run"), "data.bands=[B4,B3,B2]"])
    with pytest.raises(InputError, match="takes images of 4 channels, pictures have 3"):
        load_run(tmp_path / "run").preprocess([Image.new("RGB", (9, 9))])
    Image.new("RGB", (9, 9)).save(root / "picture.png")
    with pytest.raises(InputError, match="have 3 channels, got 4"):
        predict_tool.main([str(tmp_path / "run"), f"images={root}", f"out={tmp_path / 'predictions.csv'}"])
    with pytest.raises(InputError, match="takes images of 4 channels; explanations are drawn on pictures"):
        explain_tool.main([str(tmp_path / "run")])


def test_a_loaded_run_gives_the_other_weights_of_its_checkpoint(trained):
    for path in (trained[0], trained[0] / LAST):
        run = load_run(path, device="cpu")
        before = {name: value.clone() for name, value in run.method.state_dict().items()}
        other, expected = run.with_weights("raw"), load_run(path, device="cpu", weights="raw")
        assert (other.weights, run.weights, other.checkpoint) == ("raw", "ema", expected.checkpoint)
        assert not other.method.training
        assert run.with_weights("ema") is run
        for name, value in expected.method.state_dict().items():
            assert torch.equal(other.method.state_dict()[name], value), name
        assert all(torch.equal(value, before[name]) for name, value in run.method.state_dict().items())
        assert any(not torch.equal(value, before[name]) for name, value in other.method.state_dict().items())
    with pytest.raises(InputError, match="no 'best' weights there; expected raw or ema"):
        run.with_weights("best")


def test_the_validation_loss_is_that_of_the_labels(trained):
    folder, _ = trained
    logged = metric_rows(folder)
    last = max(step for step, _ in logged)
    for weights in ("raw", "ema"):
        run = load_run(folder / LAST, device="cpu", weights=weights)
        manifest, _ = read_for(run, "val")
        found = predict(run.method, eval_loader(manifest, run.view, run.config.loader), run.precision)
        p = found.logits.double().sigmoid()
        expected = -(p.log() * found.targets + (1 - p).log() * (1 - found.targets)).sum(dim=1).mean()
        assert logged[last, f"val/{weights}/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_best_checkpoint_is_the_best_validation_epoch(trained):
    folder, _ = trained
    rows = metric_rows(folder)
    by_step = {step: value for (step, name), value in rows.items() if name == "val/ema/mAP"}
    best = torch.load(folder / "checkpoints/best.pt", weights_only=True)
    assert best["best"] == max(by_step.values())
    assert by_step[best["step"]] == best["best"]
    assert any(name == "val/raw/mAP" for _, name in rows)


def test_training_on_a_few_images_learns_them(smoke_arguments, tmp_path):
    folder = tmp_path / "r"
    fixed = ["view.scale=[1,1]", "view.flip=0", "head.dropout=0", "ema.decay=0", "checkpoint.every_steps=0"]
    few = ["data.val_fraction=0.8", "loader.batch_size=16", "optim.epochs=20", "optim.lr=2e-2"]
    train_script.main([*smoke_arguments, *fixed, *few, "loader.num_workers=0", f"out={folder}"])
    losses = [value for (_, name), value in sorted(metric_rows(folder).items()) if name == "train/loss"]
    assert losses[-1] < losses[0] / 3
    assert eval_script.main([str(folder / "checkpoints/last.pt"), "split=train"])["raw"]["mAP"] > 0.9


def test_validation_is_as_poor_as_training_unless_it_is_full(smoke_arguments, tmp_path, capsys):
    folder, phrase = tmp_path / "r", "each label known with probability 0.5 (seed 0)"
    edits = ["data.edits=[known_labels]", "data.edits.0.share=0.5"]
    train_script.main([*smoke_arguments, *edits, "data.val_fraction=0.3", "optim.epochs=1", f"out={folder}"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("training: ") and line.endswith(f"; {phrase}") for line in lines)
    as_train = f"; {phrase}; edited like the training images"
    assert any(line.startswith("validation: ") and as_train in line for line in lines)
    train = read_role(load_run(folder, device="cpu").config, "train")[0]
    num_empty = sum(not record.labels for record in train.records)
    assert num_empty
    assert f"note: no class is known to be present in {num_empty} of {len(train)} training images" in lines

    rows = {split: eval_script.main([str(folder), f"split={split}"]) for split in ("train", "val", "test")}
    full = eval_script.main([str(folder), "split=val", "data.val_labels=full"])
    unknown = {split: row["raw"]["num_unknown"] for split, row in (rows | {"full": full}).items()}
    assert unknown["test"] == unknown["full"] == 0
    assert unknown["train"] / (20 * len(train)) == pytest.approx(0.5, abs=0.1)
    assert unknown["val"] / (20 * rows["val"]["raw"]["num_images"]) == pytest.approx(0.5, abs=0.1)
    assert as_train in rows["val"]["protocol"]
    assert "; without the edits of the training images; " in full["protocol"]
    assert phrase not in full["protocol"] + rows["test"]["protocol"]
    logged = metric_rows(folder)
    assert logged[max(step for step, _ in logged), "val/raw/mAP"] == pytest.approx(rows["val"]["raw"]["mAP"], abs=1e-6)


def test_a_run_with_known_labels_of_an_older_version_goes_on(smoke_arguments, tmp_path):
    """Its options were two of `data`, and its validation images had all their labels."""
    edits = ["data.edits=[{name: known_labels, share: 0.4, seed: 3}]", "data.val_labels=full", "loader.num_workers=0"]
    folder = tmp_path / "r"
    train_script.main([*smoke_arguments, *edits, "optim.epochs=1", f"out={folder}"])
    saved = (folder / "config.yaml").read_text()
    today = "  edits:\n  - name: known_labels\n    share: 0.4\n    seed: 3\n  val_labels: full\n"
    assert today in saved
    old = saved.replace(today, "  known_labels: 0.4\n  known_seed: 3\n")
    (folder / "config.yaml").write_text(old.replace(f"config_version: {CONFIG_VERSION}\n", "config_version: 3\n"))
    with pytest.raises(InputError, match="another config: data.val_labels is 'full' there, 'as_train' was asked for"):
        train_script.main([*smoke_arguments, edits[0], "optim.epochs=1", f"out={folder}", "resume=auto"])
    assert train_script.main([*smoke_arguments, *edits, "optim.epochs=1", f"out={folder}", "resume=auto"]) == 0
    assert eval_script.main([str(folder), "split=val"])["raw"]["num_unknown"] == 0


def test_eval_says_how_sure_and_how_calibrated(trained, tmp_path, capsys):
    folder = tmp_path / "r"
    shutil.copytree(trained[0], folder)
    found = eval_script.main([str(folder), "evaluators=[multilabel,calibration,{name: bootstrap, num_samples: 50}]"])[
        "raw"
    ]
    assert found["mAP_low"] < found["mAP"] < found["mAP_high"]
    assert f"mAP from {found['mAP_low']:.4f} to {found['mAP_high']:.4f}" in capsys.readouterr().out
    run = load_run(folder, weights="raw")
    manifest, _ = read_for(run, "test")
    predictions = predict(run.method, eval_loader(manifest, run.view, run.config.loader), run.precision)
    p, y = predictions.logits.double().sigmoid().numpy(), predictions.targets.numpy()
    bins = np.minimum((p * 15).astype(int), 14)
    gaps = [abs((p - y)[bins == b].sum()) for b in range(15)]
    assert found["ECE"] == pytest.approx(sum(gaps) / p.size, abs=1e-6)


@pytest.mark.parametrize(("highest", "says"), [(-0.01, True), (0.01, False)])
def test_eval_says_where_no_score_reaches_one_half(trained, tmp_path, monkeypatch, capsys, highest, says):
    def shifted(*arguments):
        found = predict(*arguments)
        return replace(found, logits=found.logits - found.logits.max() + highest)

    monkeypatch.setattr(eval_script, "predict", shifted)
    shutil.copytree(trained[0], tmp_path / "r")
    eval_script.main([str(tmp_path / "r")])
    assert ("no score reaches 0.5" in capsys.readouterr().out) == says


def test_what_is_said_of_another_checkpoint_stands_beside_the_runs_own(trained, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(trained[0], folder)
    eval_script.main([str(folder)])
    chosen = {name: (folder / name).read_bytes() for name in ("record.json", "per_class_test.csv")}
    metrics = json.loads((folder / "metrics.json").read_text())
    eval_script.main([str(folder / "checkpoints/last.pt")])
    assert {name: (folder / name).read_bytes() for name in chosen} == chosen
    found = json.loads((folder / "metrics.json").read_text())
    assert found.pop("test_last")["checkpoint"].endswith("last.pt")
    assert found == metrics
    assert (folder / "per_class_test_last.csv").is_file()


def run_script(*arguments, env=None):
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | (env or {}),
    )
    return result.returncode, result.stderr


def test_a_mistake_is_one_line_and_exit_2(scenes_root, tmp_path):
    code, message = run_script(
        "train.py", "configs/smoke/scenes_test_resnet_baseline.yaml", "optim.lrr=1", f"out={tmp_path}/r"
    )
    assert code == 2
    assert message.count("\n") == 1
    assert message.startswith("error: optim.lrr: no such option; did you mean optim.lr?")
    assert not (tmp_path / "r").exists()


def break_class_list(root):
    path = root / "annotations/instances_test.json"
    document = json.loads(path.read_text())
    document["categories"][0]["name"] = "zebra"
    path.write_text(json.dumps(document))


def share_an_image(root):
    train, test = (json.loads((root / f"annotations/instances_{s}.json").read_text()) for s in ("train", "test"))
    test["images"][0]["file_name"] = train["images"][0]["file_name"]
    (root / "annotations/instances_test.json").write_text(json.dumps(test))


def empty_split(root):
    path = root / "annotations/instances_train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": [], "annotations": []}))


def malform(root):
    path = root / "annotations/instances_train.json"
    path.write_text(path.read_text()[:500])


def truncate_image(root):
    path = sorted((root / "images/train").iterdir())[5]
    path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (None, ["data.root=/nowhere"], "/nowhere"),
        (None, ["data.train=trian"], "instances_trian.json"),
        (None, ["loader.batch_size=1000"], "loader.batch_size: expected at most"),
        (None, ["device=cuda"], "device: 'cuda' was asked for, but torch sees no GPU"),
        (None, ["model.checkpoint=/nowhere/w.pt"], "/nowhere/w.pt"),
        (None, ["model.name=resnet5"], "model.name: timm has no model 'resnet5'"),
        (None, ["view.size=-3"], "view.size: expected 1 to 4096"),
        (None, ["view.eval_size=-3"], "view.eval_size: expected 0 (as size) to 4096"),
        (
            None,
            ["model.name=test_vit", "view.eval_size=64"],
            "view.eval_size: test_vit takes images of the size it was built for, view.size=48",
        ),
        (None, ["data.val_fraction=1.5"], "data.val_fraction: 1.5 of the 96 images of split 'train' gives 144 images"),
        (
            None,
            ["data.edits=[{name: known_labels, share: 0}]"],
            "data.edits.known_labels.share: expected a share above 0, at most 1, got 0.0",
        ),
        (
            None,
            ["data.edits=[known_label]"],
            f"data.edits.0.name: expected one of {', '.join(EDITS)}, got 'known_label'; did you mean known_labels?",
        ),
        (None, ["optim.name=adamww"], "optim.name: timm has no optimizer 'adamww'"),
        (None, ["optim.lr_scales.haed=2"], "optim.lr_scales: no parameter group 'haed'"),
        (None, ["checkpoint.select=map"], "checkpoint.select: no metric 'map'"),
        (
            None,
            ["checkpoint.select=mAP_small"],
            "no metric 'mAP_small' by which the evaluators could choose; expected one of last, mAP, mAP_env",
        ),
        (
            None,
            ["evaluators=[calibration]", "checkpoint.select=ECE"],
            "no metric 'ECE' by which the evaluators could choose; expected one of last",
        ),
        (None, ["evaluators=[multilabel,real]", "checkpoint.select=real_accuracy"], "no metric 'real_accuracy'"),
        (None, ["evaluators=[real,multilabel,real]"], "evaluators: expected each one once, got real twice"),
        (None, ["evaluators=[bootstrap]", "evaluators.0.num_samples=1"], "num_samples: expected 2 to a million"),
        (None, ["checkpoint.select=num_skipped_classes"], "checkpoint.select: no metric 'num_skipped_classes'"),
        (
            None,
            ["method.loss=asl", "method.loss.gamma_neg=-1.0"],
            "method.loss.gamma_neg: expected 0 or more, got -1.0",
        ),
        (None, ["method.loss=bce", "method.gamma_neg=2"], "did you mean method.loss.gamma_neg with method.loss=asl?"),
        (None, ["method.loss=focal", "method.loss.gamma=nan"], "method.loss.gamma: expected finite numbers"),
        (None, ["method.loss=soft_top_k", "method.loss.k=99"], "method.loss.k: expected 0, or less than the"),
        (None, ["optim.lr=inf"], "optim.lr: expected finite numbers"),
        (None, ["seed=-1"], "seed: expected 0 or more"),
        (None, ["bootstrap=100"], "bootstrap: no such option"),
        (None, ["log.every_steps=0"], "log.every_steps: expected at least 1"),
        (None, ["data.val=test"], "data.val: 'test' is the test split"),
        (None, ["model.in_chans=1"], "model.in_chans: images of split train have 3 channels, got 1"),
        (
            None,
            ["method.loss=mse"],
            f"method.loss.name: expected one of {', '.join(LOSSES)}, got 'mse'",
        ),
        (lambda root: (root / "annotations/instances_test.json").unlink(), [], "instances_test.json"),
        (lambda root: (root / "images/train/000003.jpg").unlink(), [], "000003.jpg"),
        (malform, [], "annotations/instances_train.json, line 1, column "),
        (break_class_list, [], "zebra"),
        (share_an_image, [], "train/000000.jpg"),
        (empty_split, [], "instances_train.json"),
        (truncate_image, [], "000005.jpg"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing_half_written(
    damage, arguments, message, scenes_root, smoke_arguments, tmp_path
):
    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    root = scenes_root
    if damage:
        root = tmp_path / "set"
        shutil.copytree(scenes_root, root)
        damage(root)
    with pytest.raises(InputError) as raised:
        train_script.main([*smoke_arguments, f"data.root={root}", *arguments, f"out={tmp_path}/r"])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    if damage is truncate_image:  # found only when its turn comes; what was saved until then is whole
        assert all(load_checkpoint(path) for path in tmp_path.glob("r/checkpoints/*"))
    else:
        assert not (tmp_path / "r").exists()


def test_bad_images_can_be_skipped_and_are_listed(scenes_root, smoke_arguments, tmp_path, capsys):
    root = tmp_path / "set"
    shutil.copytree(scenes_root, root)
    truncate_image(root)
    (root / "images/test/000001.jpg").write_text("no image")
    train_script.main(
        [*smoke_arguments, f"data.root={root}", "data.on_bad_image=skip", "optim.epochs=1", f"out={tmp_path}/r"]
    )
    (row,) = csv.DictReader(open(tmp_path / "r/bad_images.csv", newline=""))
    assert row["key"].endswith("train/000005.jpg")
    assert "000005.jpg" in capsys.readouterr().out
    metrics = eval_script.main([str(tmp_path / "r")])
    assert [Path(image["key"]).name for image in metrics["skipped_images"]] == ["000001.jpg"]
    assert metrics["ema"]["num_images"] == 31


def test_what_an_epoch_does_not_see_is_said(scenes_root, smoke_arguments, capsys, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(scenes_root, root)
    for split in ("train", "test"):
        path = root / f"annotations/instances_{split}.json"
        document = json.loads(path.read_text())
        document["categories"].append({"id": 99, "name": "unicorn"})
        path.write_text(json.dumps(document))
    smoke = [argument for argument in smoke_arguments if not argument.startswith("data.root=")]
    options = [f"data.root={root}", "loader.batch_size=40", "optim.epochs=1", f"out={tmp_path / 'r'}"]

    train_script.main([*smoke, *options])

    lines = capsys.readouterr().out.splitlines()
    num_train = sum(row["split"] == "train" for row in csv.DictReader(open(tmp_path / "r/images.csv", newline="")))
    assert (
        f"note: each epoch drops {num_train % 40} of {num_train} images (incomplete last batch of 40); which ones varies by "
        "epoch"
    ) in lines
    assert "note: no training image shows 1 of the classes: unicorn" in lines
    assert any(line.startswith("training: instances_train.json, ") for line in lines)


def test_a_folder_that_holds_a_run_is_refused(trained, smoke_arguments, scenes_root):
    folder, _ = trained
    before = (folder / "metrics.csv").read_bytes()
    with pytest.raises(InputError, match="already holds a run; resume=auto continues it"):
        train_script.main([*smoke_arguments, f"out={folder}"])
    with pytest.raises(InputError, match=r"holds a run of another config: optim.lr is 0.001 there, 0.5 was asked for"):
        train_script.main([*smoke_arguments, "log.tensorboard=true", f"out={folder}", "resume=auto", "optim.lr=0.5"])
    assert (folder / "metrics.csv").read_bytes() == before


def test_a_run_goes_on_with_other_options_that_change_no_result(trained, smoke_arguments, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    free = ["log.tensorboard=false", "log.every_steps=9", "loader.prefetch=1", "loader.num_workers=0", "name=other"]
    train_script.main([*smoke_arguments, *free, "checkpoint.every_steps=0", f"out={folder}", "resume=auto"])
    assert "all 3 epochs are trained already" in capsys.readouterr().out


def test_resume_auto_finds_the_newest_equal_run(smoke_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    once = [*smoke_arguments, "optim.epochs=1"]
    train_script.main([*once, "resume=auto"])  # nothing there: a new run
    (first,) = (tmp_path / "runs").iterdir()
    train_script.main([*once, "resume=auto", "seed=1"])  # another config
    assert len(list((tmp_path / "runs").iterdir())) == 2
    capsys.readouterr()
    train_script.main([*once, "resume=auto"])
    output = capsys.readouterr().out
    assert f"resuming runs/{first.name}" in output
    assert "all 1 epochs are trained already" in output
    assert len(list((tmp_path / "runs").iterdir())) == 2
    environment = json.loads((first / "environment.json").read_text())
    (again,) = environment["resumed"]
    assert again["machine"] == environment["machine"]
    assert again["started"] >= environment["started"]


def test_resume_auto_takes_a_name_for_itself_and_for_no_pattern(smoke_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    once = [*smoke_arguments, "optim.epochs=1", "resume=auto"]
    for name in ("a[1]**b", "a1xb", "a[1]**b"):
        train_script.main([*once, f"name={name}"])
    assert sorted(folder.name.partition("-")[0] for folder in (tmp_path / "runs").iterdir()) == ["a1xb", "a[1]**b"]
    assert "all 1 epochs are trained already" in capsys.readouterr().out


def test_evaluation_refuses_images_that_were_trained_on(trained):
    folder, _ = trained
    before = (folder / "metrics.json").read_bytes()
    with pytest.raises(InputError, match="were in the training split"):
        eval_script.main([str(folder), "data.test=train"])
    assert (folder / "metrics.json").read_bytes() == before


def test_evaluation_refuses_another_class_list(trained, scenes_root, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(scenes_root, root)
    break_class_list(root)
    with pytest.raises(InputError, match="class 0 is 'airplane' in the checkpoint, 'zebra' in the data"):
        eval_script.main([str(trained[0]), f"data.root={root}"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_evaluation_heeds_device_and_precision(trained, monkeypatch):
    monkeypatch.setattr("mlvision.engine.precision.cpu_has_bf16", lambda: True)
    with pytest.raises(InputError, match="device: 'cuda' was asked for, but torch sees no GPU"):
        eval_script.main([str(trained[0]), "device=cuda"])
    assert load_run(trained[0], overrides=["precision=bf16"]).precision.name == "bf16"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.yaml").unlink(), "no run there"),
        (
            lambda folder: os.truncate(folder / "checkpoints/best.pt", 5000),
            "best.pt: the file is damaged, or was cut short",
        ),
        (
            lambda folder: (folder / "checkpoints/best.pt").write_text("hello"),
            "best.pt: cannot be read, or was cut short",
        ),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), "best.pt: no such checkpoint"),
    ],
)
def test_a_damaged_run_is_named(trained, tmp_path, damage, message):
    folder = tmp_path / "copy"
    shutil.copytree(trained[0], folder)
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_run(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("environment.json", '{"command": "pyth', "environment.json, line 1"),
        ("metrics.json", "[]", "metrics.json: expected names and values"),
        ("statistics.json", "{}", "statistics.json: expected counts of 20 classes"),
        ("statistics.json", '{"positives": [1], "known": [2], "num_images": 3}', "statistics.json: expected counts of"),
        ("images.csv", "key\nimages/train/000000.jpg\n", "images.csv: expected the columns split and key"),
        ("images.csv", "", "images.csv: expected the columns split and key"),
        ("images.csv", "split,key\n", "images.csv: lists no image that was trained on"),
        ("images.csv", "split,key\nval,images/train/000000.jpg\n", "images.csv: lists no image that was trained on"),
        ("images.csv", "split,key\ntrain\n", "images.csv, row 2: expected train or val and a key, got"),
        ("images.csv", "split,key\ntran,images/train/000000.jpg\n", "images.csv, row 2: expected train or val"),
        ("images.csv", "split,key\ntrain," + "x" * 200_000, "images.csv, line 2: field larger than field limit"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(trained, smoke_arguments, tmp_path, monkeypatch, name, content, message):
    folder = tmp_path / "copy"
    shutil.copytree(trained[0], folder)
    (folder / name).write_text(content)
    monkeypatch.setattr(eval_script, "predict", lambda *_: pytest.fail("found after the evaluation, not before"))
    with pytest.raises(InputError, match=message):
        eval_script.main([str(folder)])
    if name == "environment.json":
        with pytest.raises(InputError, match=message):
            train_script.main([*smoke_arguments, "log.tensorboard=true", f"out={folder}", "resume=auto"])


def test_a_run_of_other_classes_is_not_resumed(trained, smoke_arguments, scenes_root, tmp_path):
    root, folder = tmp_path / "set", tmp_path / "run"
    shutil.copytree(scenes_root, root)
    shutil.copytree(trained[0], folder)
    for path in (root / "annotations").iterdir():
        document = json.loads(path.read_text())
        document["categories"][2]["name"] = "zebra"
        path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="class 2 is .* in the checkpoint, 'zebra' in the data"):
        train_script.main(
            [*smoke_arguments, "log.tensorboard=true", f"data.root={root}", f"out={folder}", "resume=auto"]
        )


def test_a_run_is_not_resumed_on_changed_files(trained, smoke_arguments, scenes_root, tmp_path):
    root, folder = tmp_path / "set", tmp_path / "run"
    shutil.copytree(scenes_root, root)
    shutil.copytree(trained[0], folder)
    rows = list(csv.reader(open(folder / "images.csv", newline="")))
    assert rows[0] == ["split", "key", "bytes"]
    assert all(int(size) == (scenes_root / key).stat().st_size for _, key, size in rows[1:])
    resumed = [*smoke_arguments, "log.tensorboard=true", f"data.root={root}", f"out={folder}", "resume=auto"]
    train_script.main(resumed)  # a copy of the images, with other dates
    before = (folder / "environment.json").read_bytes()
    key = rows[-1][1]
    with open(root / key, "ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match=f"1 image files have other sizes than when the run began, the first is {key}"):
        train_script.main(resumed)
    assert (folder / "environment.json").read_bytes() == before
    with open(folder / "images.csv", "w", newline="") as file:  # as runs of earlier versions have it
        csv.writer(file).writerows(row[:2] for row in rows)
    train_script.main(resumed)


def test_a_run_is_not_resumed_on_other_images(trained, smoke_arguments, scenes_root, tmp_path):
    root, folder = tmp_path / "set", tmp_path / "run"
    shutil.copytree(scenes_root, root)
    shutil.copytree(trained[0], folder)
    path = root / "annotations/instances_train.json"
    document = json.loads(path.read_text())
    dropped = document["images"].pop()["id"]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != dropped]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="the training records have changed since it was saved"):
        train_script.main(
            [*smoke_arguments, "log.tensorboard=true", f"data.root={root}", f"out={folder}", "resume=auto"]
        )


def test_an_unfinished_run_leaves_no_record(smoke_arguments, tmp_path, monkeypatch, capsys):
    from mlvision.engine.callbacks import ProgressBar

    class StopsAtStep7(ProgressBar):
        def on_step_end(self, trainer):
            super().on_step_end(trainer)
            if trainer.steps_done == 7:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_script, "ProgressBar", StopsAtStep7)
    train_script.main([*smoke_arguments, f"out={tmp_path}/r"])
    output = capsys.readouterr().out
    assert "stopped by SIGTERM at step 7" in output
    assert "done;" not in output
    assert load_checkpoint(tmp_path / "r/checkpoints/last.pt")["step"] == 7
    eval_script.main([str(tmp_path / "r")])
    assert (tmp_path / "r/metrics.json").is_file()
    assert not (tmp_path / "r/record.json").exists()


def test_a_run_handed_on_without_its_last_checkpoint_is_evaluated(trained, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(trained[0], folder)
    for name in ("checkpoints/last.pt", "record.json"):
        (folder / name).unlink()
    assert eval_script.main([str(folder)])["ema"] == trained[1]["ema"]
    assert "no record.json is written" in capsys.readouterr().out
    assert not (folder / "record.json").exists()


def test_options_of_evaluation_are_checked_before_it_begins(trained, monkeypatch):
    monkeypatch.setattr(eval_script, "predict", lambda *_: pytest.fail("evaluation has begun"))
    for option, message in (
        ("evaluators=[calibration]", "evaluators: expected multilabel among them"),
        ("evaluators=[multilabel,real,real]", "evaluators: expected each one once, got real twice"),
        ("evaluators=[multilabel,callibration]", "evaluators.1.name: expected one of .* did you mean calibration?"),
        ("evaluators.1.num_samples=9", "evaluators.1.num_samples: no such option of 'calibration'.*'bootstrap'"),
        ("split=tset", "split: expected one of train, val, test, got 'tset'"),
        (
            "optim.lr=1",
            "optim.lr: evaluation does not use this option; expected some of split, evaluators, posthoc, device",
        ),
        ("data.split=val", "data.split: no such option"),
        ("threads=-1", "threads: expected 0"),
        ("optim.lr=1e-3", "optim.lr: evaluation does not use this option"),
    ):
        with pytest.raises(InputError, match=message):
            eval_script.main([str(trained[0]), option])


def test_a_folder_of_other_things_is_not_written_to(smoke_arguments, tmp_path):
    (tmp_path / "metrics.csv").write_text("mine")
    with pytest.raises(InputError, match="holds no run but other files"):
        train_script.main([*smoke_arguments, f"out={tmp_path}"])
    assert (tmp_path / "metrics.csv").read_text() == "mine"


def test_a_run_that_was_killed_before_its_config_was_written_begins_anew(smoke_arguments, tmp_path):
    for name in ("images.csv.partial", "config.yaml.partial", "environment.json"):
        (tmp_path / name).touch()
    config = parse_options(Config, [*smoke_arguments, f"out={tmp_path}", "resume=auto"], prog="", description="")
    assert choose_folder(config) == (tmp_path, False)


def test_a_diverging_run_stops_with_step_and_images_and_keeps_its_checkpoint(smoke_arguments, tmp_path, monkeypatch):
    from mlvision.methods import Baseline
    from mlvision.types import StepOutput

    forward, calls = Baseline.forward, []

    def breaks_at_step_8(self, batch):
        output = forward(self, batch)
        calls.append(batch.index.tolist())
        return StepOutput(output.loss * (math.nan if len(calls) == 8 else 1.0), output.logs)

    monkeypatch.setattr(Baseline, "forward", breaks_at_step_8)
    with pytest.raises(NonFiniteError) as raised:
        train_script.main([*smoke_arguments, "log.every_steps=5", f"out={tmp_path}/r"])
    assert "step 8:" in str(raised.value)
    assert len(calls) <= 10  # noticed at the next log step or save
    keys = [r["key"] for r in csv.DictReader(open(tmp_path / "r/images.csv", newline="")) if r["split"] == "train"]
    assert keys[calls[7][0]] in str(raised.value)
    last = torch.load(tmp_path / "r/checkpoints/last.pt", weights_only=True)
    assert last["step"] == 6
    assert all(v.isfinite().all() for v in last["method"].values() if v.is_floating_point())


def test_fp16_and_bf16_train_on_a_cpu(smoke_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("mlvision.engine.precision.cpu_has_bf16", lambda: True)
    for precision in ("bf16", "fp16"):
        folder = tmp_path / precision
        train_script.main(
            [*smoke_arguments, "optim.epochs=1", "view.size=32", f"precision={precision}", f"out={folder}"]
        )
        losses = [value for (_, name), value in sorted(metric_rows(folder).items()) if name == "train/loss"]
        assert all(math.isfinite(value) for value in losses)
        assert load_run(folder, device="cpu").precision.name == precision


def test_a_run_in_use_is_refused_in_one_line_and_left_as_it_is(smoke_arguments, tmp_path):
    folder = tmp_path / "run"
    ready, release = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with locked(folder):
            os.write(ready[1], b"x")
            os.read(release[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    for resume in ("", "auto"):
        with pytest.raises(InputError, match=f"run: in use by process {child} on"):
            train_script.main([*smoke_arguments, f"out={folder}", f"resume={resume}"])
    assert [path.name for path in folder.iterdir()] == ["in_use"]
    os.write(release[1], b"x")
    os.waitpid(child, 0)


def test_ctrl_c_saves_and_says_how_to_go_on(smoke_arguments, tmp_path, monkeypatch, capsys):
    class CtrlC(ProgressBar):
        def on_step_end(self, trainer):
            if trainer.steps_done == 7:  # in the second epoch
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_script, "ProgressBar", CtrlC)
    folder = tmp_path / "run"
    assert train_script.main([*smoke_arguments, f"out={folder}"]) == 130
    assert load_checkpoint(folder / LAST)["step"] == 7
    *_, epoch, last = capsys.readouterr().out.splitlines()
    assert last == f"stopped by SIGINT at step 7; saved; to go on, give the same command with out={folder} resume=auto"
    assert re.fullmatch(r"epoch 1/3  step 5  loss \d\.\d+  val mAP .*\d+ images/s  \d+ \w+ left  best", epoch)


def test_a_run_stopped_before_a_validation_goes_on_with_it_and_claims_no_speed(
    smoke_arguments, tmp_path, monkeypatch, capsys
):
    class CtrlC(ProgressBar):
        def on_step_end(self, trainer):
            if trainer.steps_done == 10:  # the last step of the second epoch
                os.kill(os.getpid(), signal.SIGINT)

    arguments = [*smoke_arguments, f"out={tmp_path}/run"]
    with monkeypatch.context() as patch:
        patch.setattr(train_script, "ProgressBar", CtrlC)
        assert train_script.main(arguments) == 130
    capsys.readouterr()
    train_script.main([*arguments, "resume=auto"])
    second, third = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert re.fullmatch(r"epoch 2/3  step 10  val mAP \(plain\): raw \d\.\d+  ema \d\.\d+(  best)?", second)
    assert "images/s" in third
