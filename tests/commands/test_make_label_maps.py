import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlvision import load_run
from mlvision.commands import eval as eval_script
from mlvision.commands import make_label_maps
from mlvision.commands import train as train_script
from mlvision.data import build_manifest
from mlvision.data.images import read_record
from mlvision.data.manifest import carve_validation
from mlvision.errors import InputError
from mlvision.label_maps.store import LabelMapStore
from mlvision.models.dense import build_teacher

SMOKE = "configs/smoke/scenes_test_resnet_baseline.yaml"
SCRIPT = "tools/make_label_maps.py"


@pytest.fixture(scope="module")
def arguments(scenes_root) -> list[str]:
    return [SMOKE, f"data.root={scenes_root}", "data.train=train_single", "device=cpu", "threads=1"]


@pytest.fixture(scope="module")
def train_manifest(scenes_root):
    """The records of a student: those that remain when validation is carved out."""
    whole = build_manifest("coco", root=str(scenes_root), images="images", split="train_single")
    return carve_validation(whole, 0.1, 0)[0]


@pytest.fixture(scope="module")
def teacher(arguments, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    options = ["method.loss=softmax", "optim.epochs=1", "log.tensorboard=false", f"out={folder}"]
    train_script.main([*arguments, *options])
    return str(folder)


@pytest.fixture(scope="module")
def store(arguments, teacher, tmp_path_factory) -> LabelMapStore:
    folder = tmp_path_factory.mktemp("maps") / "store"
    make_label_maps.main([*arguments, f"teacher=[{teacher}]", "scales=[2.0]", "top_k=4", f"out={folder}", "verify=20"])
    return LabelMapStore.open(folder)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_store_holds_what_the_teacher_says_of_each_cell(store, teacher, train_manifest):
    store.check(record_hash=train_manifest.hash, class_hash=train_manifest.class_hash, num_records=len(train_manifest))
    assert (store.meta.groups, store.meta.kind, store.meta.approximate) == ((store.meta.num_classes,), "logit", None)
    run = load_run(teacher, device="cpu")
    dense = build_teacher(run.method)
    size = [2 * side for side in dense.image_size]
    for row in (3, 40):
        image = torch.from_numpy(read_record(train_manifest.records[row])).permute(2, 0, 1)
        resized = torch.nn.functional.interpolate(
            image[None].float(), size, mode=dense.preprocessing.interpolation, antialias=True
        )
        with torch.no_grad():
            maps = dense.maps(resized.round().clamp(0, 255).to(torch.uint8))[0]
        stored = store.read([row])
        assert stored.values.shape[2:] == maps.shape[1:]
        best = maps.topk(4, dim=0)
        # The teacher's eval view rounds to bytes after its own resize: a grey level of difference.
        np.testing.assert_allclose(stored.values[0].float(), best.values, atol=0.05 * best.values.abs().max().item())
        assert (stored.ids[0] == best.indices).float().mean() > 0.9


def test_a_student_is_trained_and_evaluated_on_them(arguments, store, tmp_path):
    folder = tmp_path / "student"
    options = ["method.name=relabel", f"label_maps={store.path}", "optim.epochs=2", "log.tensorboard=false"]
    train_script.main([*arguments, *options, f"out={folder}"])
    assert 0 < eval_script.main([str(folder)])["raw"]["mAP"] < 1
    record = json.loads((folder / "record.json").read_text())
    assert record["environment"]["label_maps"] == store.meta.to_json()  # which teacher, which maps
    with pytest.raises(InputError, match="no label-map store"):  # training needs them, evaluation does not
        train_script.main([*arguments, *options[:1], f"label_maps={tmp_path}/nowhere", f"out={tmp_path}/other"])


@pytest.mark.parametrize("options", [["flip=true"], ["top_k=0", "dtype=uint8"]])
def test_an_unfinished_store_is_continued(arguments, teacher, tmp_path, options):
    make = [*arguments, f"teacher=[{teacher}]", "batch_size=8", *options]
    make_label_maps.main([*make, f"out={tmp_path}/whole"])
    make_label_maps.main([*make, f"out={tmp_path}/cut"])
    done = np.load(tmp_path / "cut/done.npy")
    done[17], done[60:] = 0, 0
    np.save(tmp_path / "cut/done.npy", done)
    values = np.load(tmp_path / "cut/values.npy")
    values[16:24] = 0
    np.save(tmp_path / "cut/values.npy", values)
    make_label_maps.main([*make, f"out={tmp_path}/cut"])
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_two_ranks_make_the_same_store_as_one(arguments, teacher, tmp_path, monkeypatch):
    make = [*arguments, f"teacher=[{teacher}]", "batch_size=8"]
    make_label_maps.main([*make, f"out={tmp_path}/one"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        make_label_maps.main([*make, f"out={tmp_path}/two"])
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_oracle_maps_know_the_objects_that_the_annotation_leaves_out(arguments, train_manifest, scenes_root, tmp_path):
    make_label_maps.main([*arguments, "teacher=[oracle]", "oracle_split=train", "grid=[5,7]", f"out={tmp_path}/maps"])
    store = LabelMapStore.open(tmp_path / "maps")
    full = {r.key: r for r in build_manifest("coco", root=str(scenes_root), images="images", split="train").records}
    maps = store.read(range(len(store)))
    num_classes = len(train_manifest.classes)
    for row, record in enumerate(train_manifest.records):
        assert (
            tuple(maps.values[row, :num_classes].flatten(1).any(1).nonzero().flatten().tolist())
            == full[record.key].labels
        )
    assert not maps.values[:, num_classes:].any()  # no crowds in scenes
    options = ["method.name=relabel", "method.target=oracle", f"label_maps={tmp_path}/maps", "optim.epochs=1"]
    train_script.main([*arguments, *options, "log.tensorboard=false", f"out={tmp_path}/student"])


def test_what_does_not_fit_is_refused(arguments, teacher, store, scenes_root, tmp_path):
    def make(*options):
        make_label_maps.main([*arguments, *options, f"out={tmp_path}/maps"])

    with pytest.raises(InputError, match="teacher: resnet18 has random weights; set its checkpoint to the path of"):
        make("teacher=[timm]", "model.name=resnet18")
    with pytest.raises(InputError, match="expected teacher= and out="):
        make()
    for option, message in (
        ("optim.lr=1", "^optim: no such option; expected one of teacher, out, split, "),
        ("activation=relu", "^activation: expected one of softmax, sigmoid, or nothing, got 'relu'"),
        ("combination=mean", "^combination: expected one of mean_logit, mean_probability, got 'mean'"),
        ("dtype=int8", "^dtype: expected one of float16, uint8, got 'int8'"),
        ("scales=[1.0,-1.0]", "^scales: expected numbers above 0, up to 16"),
        ("top_k=-1", r"^top_k: expected 0 \(all classes\) or more, got -1"),
    ):
        with pytest.raises(InputError, match=message):
            make(f"teacher=[{teacher}]", option)
    other = tmp_path / "other"
    options = ["method.name=relabel", f"label_maps={store.path}", f"out={other}"]
    with pytest.raises(InputError, match=r"made for the record list \w+ of 86 images, but the data has \w+ of 86"):
        train_script.main([*arguments, *options, "data.train=train"])
    with pytest.raises(InputError, match="label_maps: method relabel needs the folder of a store"):
        train_script.main([*arguments, options[0], options[2]])
    with pytest.raises(InputError, match="label_maps: method baseline uses none"):
        train_script.main([*arguments, *options[1:]])
    assert not other.exists()
    with pytest.raises(InputError, match="top_k is 4 in the store that is there, but 3 was asked for"):
        make_label_maps.main([*arguments, f"teacher=[{teacher}]", "scales=[2.0]", "top_k=3", f"out={store.path}"])


def test_a_changed_store_is_noticed_on_resume(arguments, store, teacher, tmp_path):
    folder = tmp_path / "student"
    options = ["method.name=relabel", "optim.epochs=1", "log.tensorboard=false", f"out={folder}"]
    maps = tmp_path / "maps"
    make_label_maps.main([*arguments, f"teacher=[{teacher}]", f"out={maps}"])
    train_script.main([*arguments, *options, f"label_maps={maps}"])
    meta = json.loads((maps / "meta.json").read_text())
    (maps / "meta.json").write_text(json.dumps(meta | {"teacher_hash": "another"}))
    with pytest.raises(InputError, match="the label maps have changed since it was saved"):
        train_script.main([*arguments, *options, f"label_maps={maps}", "resume=auto"])


# The report


def report(store, arguments, *options):
    """Runs the command; gives the JSON, read strictly: NaN and infinity are errors."""
    make_label_maps.main(["report", str(store.path), *arguments, "num_workers=0", *options])
    folder = next((option.removeprefix("out=") for option in options if option.startswith("out=")), store.path)
    return json.loads((Path(folder) / "quality.json").read_text(), parse_constant=pytest.fail)


def run_script(*arguments) -> subprocess.CompletedProcess:
    """As a user starts it: the folder of the script, not the root, is on Python's path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )


def test_the_script_explains_each_of_its_commands(capsys):
    own = {"": "top_k", "import": "axes", "report": "labels_split"}
    for mode, known in own.items():
        with pytest.raises(SystemExit):
            make_label_maps.main([mode, "--help"] if mode else ["--help"])
        text = capsys.readouterr().out
        assert f"make_label_maps.py {mode}" in text.splitlines()[0]
        assert {option for option in own.values() if f"  {option} (" in text} == {known}
        assert "data.root (text" in text
    assert "view.scale ([number, number]" in text


def test_the_script_reports(arguments, store, teacher, tmp_path):
    options = [*arguments, "labels_split=train", f"teacher=[{teacher}]", "exact_images=8", "num_workers=0"]
    done = run_script("report", str(store.path), *options, f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    quality = json.loads((tmp_path / "quality.json").read_text(), parse_constant=pytest.fail)
    assert (quality["split"], quality["labels_split"], quality["num_images"]) == ("train_single", "train", 86)
    assert f"pointing game {quality['localisation']['pointing_game']:.4f}" in done.stdout
    # The teacher was averaged as for the store (scales=[2.0]); another would have been refused.
    assert quality["exact"]["all"]["crops"] == 8 * 4
    assert f"KL(exact || pooled), 32 crops at 48 px, nats: {quality['exact']['all']['kl_pooled']:.4f}" in done.stdout
    with Image.open(tmp_path / "quality.png") as page:
        assert page.format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quality.json", "quality.png"]


def test_another_splits_labels_judge_the_same_images(arguments, tmp_path):
    make = [*arguments, "teacher=[oracle]", "oracle_split=train", "num_workers=0", f"out={tmp_path}/maps"]
    make_label_maps.main(make)
    store = LabelMapStore.open(tmp_path / "maps")
    by_single = report(store, arguments)
    by_full = report(store, arguments, "labels_split=train", f"out={tmp_path}")
    assert by_full["agreement"]["max"]["mAP"] == 1 > by_single["agreement"]["max"]["mAP"]
    assert by_full["localisation"]["pairs"] > by_single["localisation"]["pairs"]
    assert (by_single["labels_split"], by_full["labels_split"]) == ("train_single", "train")
    # One image leaves most classes undefined, which strict JSON says as null.
    row = next(row for row in report(store, arguments, "images=1")["classes"] if not row["images_with"])
    assert row["highest_with"] is row["pointing_game"] is None


def test_a_report_that_cannot_be_made_is_refused(arguments, store, tmp_path):
    for options, message in (
        (
            ["labels_split=test"],
            "labels_split: 'test' lacks 86 of the 86 images of 'train_single', the first is images/",
        ),
        ([f"out={tmp_path}/nowhere"], "out: the folder .*nowhere does not exist"),
        (["split=val"], "made for the record list .* of 86 images, but the data has .* of 10"),
        (["teacher=[timm]"], "teacher: the report compares with run folders, got timm"),
        (["crops=0"], "crops: expected 1 to 1000, got 0"),
        (["threads=-1"], "threads: expected 0 to 1024, got -1"),
    ):
        with pytest.raises(InputError, match=message):
            report(store, arguments, *options)
    with pytest.raises(InputError, match="expected the folder of a store first"):
        make_label_maps.main(["report", "crops=2"])
    assert not list(tmp_path.rglob("quality*"))
    assert not list(store.path.glob("quality*"))


def publish(store, manifest, root, swapped=False):
    """The maps of a store as a published tree: `[2, K, h, w]`, values and ids as float32, in folders by class."""
    for row, record in enumerate(manifest.records):
        maps = store.read([row])
        both = torch.stack([maps.values[0].float(), maps.ids[0].float()])
        file = root / Path(record.key).parent.name / f"{Path(record.key).name.split('.')[0]}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(both.mT.contiguous() if swapped else both, file)


@pytest.mark.parametrize("axes", ["hw", "wh"])
def test_a_published_tree_becomes_a_store(arguments, store, train_manifest, tmp_path, axes):
    publish(store, train_manifest, tmp_path / "tree", swapped=axes == "wh")
    script = ["import", str(tmp_path / "tree"), *arguments[:3]]
    make_label_maps.main([*script, f"axes={axes}", "fill=floor", f"out={tmp_path}/maps"])
    imported = LabelMapStore.open(tmp_path / "maps")
    assert (imported.meta.grid, imported.meta.top_k, imported.meta.groups) == (store.meta.grid, 4, store.meta.groups)
    rows = range(len(store))
    for name in ("values", "ids"):
        np.testing.assert_array_equal(getattr(imported.read(rows), name), getattr(store.read(rows), name))
    make_label_maps.main([*script, f"reference={store.path}", f"out={tmp_path}/told"])
    assert LabelMapStore.open(tmp_path / "told").meta.preprocessing["axes"] == axes


def test_an_import_that_nothing_tells_how_to_read_is_refused(arguments, store, train_manifest, tmp_path):
    publish(store, train_manifest, tmp_path / "tree")
    script = ["import", str(tmp_path / "tree"), *arguments[:3]]
    with pytest.raises(InputError, match="one of axes= and reference="):
        make_label_maps.main([*script, f"out={tmp_path}/maps"])
    next((tmp_path / "tree").rglob("*.pt")).unlink()
    with pytest.raises(InputError, match=r"\.pt"):
        make_label_maps.main([*script, "axes=hw", f"out={tmp_path}/maps"])
    with pytest.raises(InputError, match="published maps"):
        make_label_maps.main(["import", "axes=hw"])


def test_another_tree_is_another_store(arguments, store, train_manifest, tmp_path):
    for name in ("a", "b"):
        publish(store, train_manifest, tmp_path / name / "tree")
    first = tmp_path / "b/tree" / Path(train_manifest.records[0].key).parent.name
    file = first / f"{Path(train_manifest.records[0].key).stem}.pt"
    torch.save(torch.load(file, weights_only=True) * torch.tensor([2.0, 1]).view(2, 1, 1, 1), file)
    script = [*arguments[:3], "axes=hw", f"out={tmp_path}/maps"]
    make_label_maps.main(["import", str(tmp_path / "a/tree"), *script])
    with pytest.raises(InputError, match="teacher_hash is"):
        make_label_maps.main(["import", str(tmp_path / "b/tree"), *script])


def test_the_oracle_is_known_by_its_objects(scenes_root):
    manifest = build_manifest("coco", root=str(scenes_root), images="images", split="train")
    objects = [record.boxes for record in manifest.records[:5]]
    known = make_label_maps.objects_hash(objects)
    assert make_label_maps.objects_hash(objects) == known
    moved = replace(objects[3], xyxy=objects[3].xyxy + np.float32(0.01))
    assert make_label_maps.objects_hash([*objects[:3], moved, objects[4]]) != known
    outline = [np.array(polygons) + 0.01 for polygons in objects[2].segmentation[0]]
    redrawn = replace(objects[2], segmentation=(outline, *objects[2].segmentation[1:]))
    assert make_label_maps.objects_hash([*objects[:2], redrawn, *objects[3:]]) != known


def test_each_rank_verifies_its_own_blocks(arguments, teacher, tmp_path, monkeypatch, capsys):
    make = [*arguments, f"teacher=[{teacher}]", "batch_size=8", "verify=16", f"out={tmp_path}/maps"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        make_label_maps.main(make)
        assert "verified 16 maps" in capsys.readouterr().out
