import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mlvision import load_run
from mlvision.commands import eval as eval_script
from mlvision.commands import predict
from mlvision.commands import train as train_script
from mlvision.data import build_manifest
from mlvision.engine.checkpoint import load_checkpoint, save_checkpoint
from mlvision.errors import InputError
from mlvision.runs.load import add_classes, read_for


@pytest.fixture(scope="module")
def run_folder(scenes_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict") / "run"
    train_script.main(
        ["configs/smoke/scenes_test_resnet_baseline.yaml", f"data.root={scenes_root}", "device=cpu", "threads=1",
         "optim.epochs=1", "log.tensorboard=false", f"out={folder}"]
    )  # fmt: skip
    return folder


def test_every_image_of_a_folder_gets_its_scores(run_folder, scenes_root, tmp_path):
    images = tmp_path / "photos"
    (images / "deep").mkdir(parents=True)
    sources = sorted((scenes_root / "images/test").iterdir())[:5]
    for source in sources[:3]:
        shutil.copy(source, images / source.name)
    for source in sources[3:]:
        Image.open(source).save(images / "deep" / f"{source.stem}.PNG")
    (images / "notes.txt").write_text("no image")
    out = tmp_path / "predictions.csv"
    predict.main([str(run_folder), f"images={images}", f"out={out}", "batch_size=2", "num_workers=0", "threshold=0.3"])
    rows = {row["image"]: row for row in csv.DictReader(open(out, newline=""))}
    assert sorted(rows) == ["000000.jpg", "000001.jpg", "000002.jpg", "deep/000003.PNG", "deep/000004.PNG"]
    run = load_run(run_folder, device="cpu")
    for key, row in rows.items():
        with torch.no_grad():
            expected = run.method.predict(run.preprocess([Image.open(images / key)])).sigmoid()[0]
        assert [float(row[name]) for name in run.classes] == pytest.approx(expected.tolist(), abs=1e-4)
        assert row["labels"] == ";".join(name for name in run.classes if float(row[name]) >= 0.3)


def test_a_score_at_the_threshold_is_a_label(run_folder, scenes_root, tmp_path):
    """The shortest decimal of a float32 score may be above it as a double."""
    shutil.copytree(scenes_root / "images/test", tmp_path / "photos")
    run = load_run(run_folder, device="cpu")
    images = [Image.open(path) for path in sorted((tmp_path / "photos").iterdir())]
    with torch.inference_mode():
        scores = run.space.scores(run.method.predict(run.preprocess(images))).numpy()
    row, column = next(zip(*np.nonzero(scores.astype(str).astype(float) > scores), strict=True))
    out = tmp_path / "at.csv"
    predict.main(
        [str(run_folder), f"images={tmp_path / 'photos'}", f"out={out}", "num_workers=0", "device=cpu",
         f"threshold={scores[row, column]}"]
    )  # fmt: skip
    predicted = list(csv.DictReader(open(out, newline="")))[row]["labels"].split(";")
    assert run.classes[column] in predicted


def test_one_pil_image_or_several_are_preprocessed_and_nothing_else(run_folder, tmp_path):
    run = load_run(run_folder, device="cpu")
    picture = Image.linear_gradient("L").convert("RGB")
    assert torch.equal(run.preprocess(picture), run.preprocess([picture]))
    assert torch.equal(run.preprocess(image for image in [picture, picture])[1:], run.preprocess((picture,)))
    picture.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-200])
    for given, message in [
        (["a.jpg"], "expected PIL images .* got the str 'a.jpg'"),
        ("a.jpg", "got the str 'a.jpg'"),
        (tmp_path / "a.jpg", "got the PosixPath"),
        ([np.zeros((4, 4, 3), np.uint8)], "got ndarray"),
        (torch.zeros(2, 3, 4, 4), "got Tensor"),
        ([[picture]], "got list"),
        ([], "at least one PIL image"),
        (None, "got NoneType"),
        ([Image.new("F", (4, 4))], "a PIL image: cannot be read: pixels of mode F"),
        ([picture, Image.open(tmp_path / "cut.png")], "cut.png: cannot be read"),
    ]:
        with pytest.raises(InputError, match=message):
            run.preprocess(given)


def test_a_bad_image_stops_it_and_leaves_no_half_table(run_folder, scenes_root, tmp_path):
    images = tmp_path / "photos"
    images.mkdir()
    for source in sorted((scenes_root / "images/test").iterdir())[:4]:
        shutil.copy(source, images / source.name)
    (images / "000002.jpg").write_bytes(b"broken")
    out = tmp_path / "predictions.csv"
    with pytest.raises(InputError, match="000002.jpg"):
        predict.main([str(run_folder), f"images={images}", f"out={out}", "batch_size=1", "num_workers=0"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]
    predict.main([str(run_folder), f"images={images}", f"out={out}", "num_workers=0", "data.on_bad_image=skip"])
    assert len(out.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("images=/nowhere", "images: /nowhere: no such file or folder"),
        ("images=missing.jpg", "images: missing.jpg: no such file or folder"),
        ("images=", "images: expected a folder or image files, got nothing; split= names a split"),
        ("images=[/nowhere,/elsewhere]", "images: /nowhere: no such file or folder"),
        ("split=test", "images: expected nothing next to split="),
        ("threshold=50", "threshold: expected a score, from 0 to 1, got 50"),
        ("threshold=-0.1", "threshold: expected a score, from 0 to 1, got -0.1"),
        ("top_k=-1", "top_k: expected 0 or more, got -1"),
        ("data.max_pixels=-1", "^data.max_pixels: expected 1 to 1073741824, got -1"),
        ("data.on_bad_image=pass", "^data.on_bad_image: expected error or skip, got 'pass'"),
        ("out=x.json", "out: expected a name that ends in .csv or .jsonl, got 'x.json'"),
        ("out=predictions", "out: expected a name that ends in .csv or .jsonl, got 'predictions'"),
        ("out=/dev/null", "out: expected a name that ends in .csv or .jsonl, got '/dev/null'"),
        ("imges=x", "imges: no such option; did you mean images?"),
        ("batch_size=0", "^batch_size: expected at least 1, got 0"),
        ("threshold=nan", "threshold: expected finite numbers"),
        ("out=/nowhere/x.csv", "out: the folder /nowhere does not exist"),
    ],
)
def test_bad_options(run_folder, argument, message, tmp_path):
    with pytest.raises(InputError, match=message.replace("[", "\\[")):
        predict.main([str(run_folder), f"images={tmp_path}", argument])


@pytest.fixture(scope="module")
def text_run(scenes_root, tmp_path_factory):
    """PatchCT on the classes' names, by a file of word vectors that knows one word more."""
    folder = tmp_path_factory.mktemp("text")
    classes = build_manifest("coco", root=str(scenes_root), images="images", split="test").classes
    words = sorted({word for name in classes for word in name.replace("_", " ").split()} | {"lighthouse"})
    noise = torch.Generator().manual_seed(0)
    lines = [f"{word} {' '.join(f'{x:.4f}' for x in torch.randn(8, generator=noise))}" for word in words]
    (folder / "words.txt").write_text("\n".join(lines) + "\n")
    train_script.main(
        ["configs/scenes_efficientnet_lite0_patchct.yaml", f"data.root={scenes_root}", "device=cpu", "threads=1",
         "model={name: test_resnet, pretrained: none}", "view.size=48", "loader={batch_size: 16, num_workers: 0}",
         f"head.text={{encoder: vectors, model: {folder}/words.txt}}", "method={sink: 0.3, levels: 2}",
         "optim.epochs=1", "log.tensorboard=false", f"out={folder}/run"]
    )  # fmt: skip
    return folder


def test_a_class_is_added_by_its_name_to_a_model_that_reads_names(text_run, scenes_root, tmp_path):
    images = tmp_path / "photos"
    shutil.copytree(scenes_root / "images/test", images)
    arguments = [str(text_run / "run"), f"images={images}", "num_workers=0"]
    predict.main([*arguments, f"out={tmp_path}/known.csv"])
    predict.main([*arguments, f"out={tmp_path}/more.csv", "extra_labels=[lighthouse]"])
    known, more = (list(csv.reader(open(tmp_path / name, newline=""))) for name in ("known.csv", "more.csv"))
    assert more[0] == [*known[0], "lighthouse"]
    assert [row[2:-1] for row in more] == [row[2:] for row in known]
    run = load_run(text_run / "run", device="cpu")
    batch = run.preprocess([Image.open(images / more[1][0])])
    (line,) = [line for line in (text_run / "words.txt").read_text().splitlines() if line.startswith("lighthouse")]
    word = torch.tensor([float(x) for x in line.split()[1:]])
    with torch.no_grad():
        head, image = run.method.classifier.head, run.method.classify(batch).embedding
        logit = head.log_scale.exp() * torch.cosine_similarity(image, word[None]) + head.bias.mean()
    assert float(more[1][-1]) == pytest.approx(logit.sigmoid().item(), abs=1e-4)


def test_the_run_that_classes_are_added_to_stays_as_it_is(text_run):
    run = load_run(text_run / "run", device="cpu")
    num_classes, images = len(run.classes), torch.zeros(1, 3, 48, 48)
    state = {name: tensor.clone() for name, tensor in run.method.state_dict().items()}
    embeddings = run.method.classifier.head.label_embeddings.clone()
    with torch.no_grad():
        before = run.method.predict(images)
        more = add_classes(run, ["lighthouse"])
        twice = add_classes(run, ["lighthouse"])  # from the same run again, so the name is no class of it
        assert torch.equal(run.method.predict(images), before)
        assert torch.equal(more.method.predict(images), twice.method.predict(images))
        assert torch.equal(more.method.predict(images)[:, :-1], before)
    assert (len(run.classes), len(more.classes)) == (num_classes, num_classes + 1)
    assert run.method.classifier.num_classes == run.method.classifier.head.num_classes == num_classes
    assert torch.equal(run.method.classifier.head.label_embeddings, embeddings)
    with torch.no_grad():
        next(more.method.parameters()).add_(1)
    assert all(torch.equal(tensor, state[name]) for name, tensor in run.method.state_dict().items())


def test_a_trained_text_run_needs_no_encoder(text_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(text_run / "run", folder)
    words = text_run / "words.txt"
    hidden = words.rename(text_run / "elsewhere.txt")
    try:
        run = load_run(folder, device="cpu")
        maps = run.method.label_maps(torch.zeros(1, 3, 48, 48))
        assert maps.kind == "mass"
        (folder / "label_embeddings.safetensors").unlink()
        with pytest.raises(InputError, match="label_embeddings.safetensors: no such file"):
            load_run(folder, device="cpu")
    finally:
        hidden.rename(words)


def test_classes_cannot_be_added_to_a_head_that_reads_no_names(run_folder, tmp_path):
    with pytest.raises(InputError, match="extra_labels: LinearHead has its own 20 classes only"):
        predict.main([str(run_folder), f"images={tmp_path}", "extra_labels=[lighthouse]"])


@pytest.fixture
def photos(scenes_root, tmp_path):
    """Three photos, one of them in a sub-folder."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    sources = sorted((scenes_root / "images/test").iterdir())[:3]
    for source, name in zip(sources, ("a.jpg", "b.jpg", "deep/c.jpg"), strict=True):
        shutil.copy(source, folder / name)
    return folder


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_json_lines_hold_what_the_csv_holds(run_folder, photos, tmp_path):
    arguments = [str(run_folder), f"images={photos}", "num_workers=0", "threshold=0.3"]
    predict.main([*arguments, f"out={tmp_path}/p.csv"])
    predict.main([*arguments, f"out={tmp_path}/p.jsonl"])
    (_, _, *classes), *rows = read_csv(tmp_path / "p.csv")
    lines = read_jsonl(tmp_path / "p.jsonl")
    assert len(lines) == len(rows) == 3
    for line, (image, labels, *scores) in zip(lines, rows, strict=True):
        assert list(line) == ["image", "labels", "scores"]
        assert line["image"] == image
        assert ";".join(line["labels"]) == labels
        assert list(line["scores"]) == classes
        assert [f"{score:.6f}" for score in line["scores"].values()] == scores


def test_single_files_and_several_folders(run_folder, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(photos / "a.jpg", "odd [1], #2.jpg")
    out = tmp_path / "p.csv"
    for images, keys in (
        ("images=photos/a.jpg", ["photos/a.jpg"]),
        ("images=odd [1], #2.jpg", ["odd [1], #2.jpg"]),
        ("images=[photos/b.jpg,photos/a.jpg]", ["photos/b.jpg", "photos/a.jpg"]),
        ("images=[photos/a.jpg,photos/deep]", ["photos/a.jpg", "photos/deep/c.jpg"]),
        ("images=photos", ["a.jpg", "b.jpg", "deep/c.jpg"]),
    ):
        predict.main([str(run_folder), images, f"out={out}", "num_workers=0"])
        assert [row[0] for row in read_csv(out)[1:]] == keys
    (tmp_path / "linked").symlink_to("photos")
    for images in (
        "images=[photos/a.jpg,./photos/a.jpg]",
        "images=[photos,photos/deep/c.jpg]",
        f"images=[photos/a.jpg,{photos}/a.jpg]",
        "images=[photos,linked]",
    ):
        with pytest.raises(InputError, match=r"images: photos/(a|deep/c).jpg is given twice"):
            predict.main([str(run_folder), images, f"out={out}", "num_workers=0"])


def test_a_split_of_the_runs_own_data(run_folder, tmp_path):
    out = tmp_path / "p.jsonl"
    predict.main([str(run_folder), "split=test", f"out={out}", "num_workers=0"])
    run = load_run(run_folder, device="cpu")
    manifest, _ = read_for(run, "test")
    assert [line["image"] for line in read_jsonl(out)] == [record.key for record in manifest.records]
    kept = eval_script.main([str(run_folder), "device=cpu"])
    assert kept["protocol"]
    with np.load(run_folder / "predictions_test.npz") as arrays:  # as eval.py keeps them
        scores = torch.from_numpy(arrays["logits"]).sigmoid()
    lines = torch.tensor([list(line["scores"].values()) for line in read_jsonl(out)])
    torch.testing.assert_close(lines, scores, atol=2e-5, rtol=0)
    with pytest.raises(InputError, match="split: expected one of train, val, test, got 'tset'"):
        predict.main([str(run_folder), "split=tset", f"out={out}"])


@pytest.fixture
def torn_root(scenes_root, tmp_path):
    """The run's data with a test image that cannot be decoded."""
    shutil.copytree(scenes_root, tmp_path / "torn")
    (tmp_path / "torn/images/test/000002.jpg").write_bytes(b"broken")
    return tmp_path / "torn"


@pytest.mark.parametrize("which", ["split", "images"])
def test_bad_images_and_the_limit_of_pixels_are_the_runs_own_overridden(run_folder, torn_root, tmp_path, which):
    skipping = tmp_path / "skipping"
    shutil.copytree(run_folder, skipping)
    text = (skipping / "config.yaml").read_text()
    (skipping / "config.yaml").write_text(text.replace("on_bad_image: error", "on_bad_image: skip"))
    out = tmp_path / "p.jsonl"
    images = "split=test" if which == "split" else f"images={torn_root}/images/test"
    num_images = len(list((torn_root / "images/test").iterdir()))
    common = [images, f"data.root={torn_root}", f"out={out}", "num_workers=0", "threads=1"]

    for run, more in ((run_folder, "data.on_bad_image=skip"), (skipping, "threshold=0.5")):
        predict.main([str(run), *common, more])
        keys = [line["image"] for line in read_jsonl(out)]
        assert len(keys) == num_images - 1
        assert not any("000002" in key for key in keys)
        out.unlink()
    for run, more in ((run_folder, "threshold=0.5"), (skipping, "data.on_bad_image=error")):
        with pytest.raises(InputError, match="000002.jpg"):
            predict.main([str(run), *common, more])
    with pytest.raises(InputError, match=r"pixels are more than max_pixels allows \(5\)"):
        predict.main([str(run_folder), *common, "data.max_pixels=5"])


def test_the_classes_of_the_highest_scores(run_folder, photos, tmp_path):
    out = tmp_path / "p.jsonl"
    arguments = [str(run_folder), f"images={photos}", f"out={out}", "num_workers=0", "threads=1"]
    predict.main([*arguments, "top_k=3", "threshold=1"])
    for line in read_jsonl(out):
        assert line["labels"] == sorted(line["scores"], key=lambda name: -line["scores"][name])[:3]
    with pytest.raises(InputError, match="top_k: expected at most the 20 classes, got 21"):
        predict.main([*arguments, "top_k=21"])


@pytest.fixture
def renamed(run_folder, tmp_path):
    """The run, with other names for its first classes."""

    def rename(*names):
        folder = tmp_path / "renamed"
        shutil.copytree(run_folder, folder, dirs_exist_ok=True)
        for path in (folder / "checkpoints").iterdir():
            state = load_checkpoint(path)
            classes = [*names, *state["classes"][len(names) :]]
            save_checkpoint(path, state | {"classes": classes})
        return folder, classes

    return rename


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("labels", "out: class 'labels' is also the name of a column of a .csv; write a .jsonl instead"),
        ("image", "out: class 'image' is also the name of a column of a .csv; write a .jsonl instead"),
        ("x;y", "out: class 'x;y' holds the ';' that sets labels apart of a .csv; write a .jsonl instead"),
    ],
)
def test_class_names_that_a_csv_would_not_tell_apart(renamed, photos, tmp_path, name, message):
    folder, classes = renamed(name)
    arguments = [str(folder), f"images={photos}", "num_workers=0", "threshold=0"]
    with pytest.raises(InputError) as caught:
        predict.main([*arguments, f"out={tmp_path}/p.csv"])
    assert str(caught.value) == message
    assert not (tmp_path / "p.csv").exists()
    predict.main([*arguments, f"out={tmp_path}/p.jsonl"])
    assert all(line["labels"] == list(line["scores"]) == classes for line in read_jsonl(tmp_path / "p.jsonl"))


def test_names_of_any_letters_survive(renamed, photos, tmp_path, capsys):
    """Quotes, commas, other scripts and the start of a formula; in file names line breaks and bytes that are no text."""
    names = ['a "quoted", one', "犬", "=1+1", "-cat", "'=x"]
    folder, classes = renamed(*names)
    shutil.move(photos / "a.jpg", photos / "=a.jpg")
    os.rename(photos / "b.jpg", os.fsencode(photos) + b"/b\xff\xfe.jpg")
    shutil.move(photos / "deep/c.jpg", photos / "deep/new\nline.jpg")
    arguments = [str(folder), f"images={photos}", "num_workers=0", "threshold=0"]
    predict.main([*arguments, f"out={tmp_path}/p.csv"])
    assert "4 names begin like a formula and have an apostrophe in front; .jsonl has them" in capsys.readouterr().out
    predict.main([*arguments, f"out={tmp_path}/p.jsonl"])
    (_, _, *columns), *rows = read_csv(tmp_path / "p.csv")
    assert columns == [{"=1+1": "'=1+1", "-cat": "'-cat", "'=x": "''=x"}.get(name, name) for name in classes]
    assert [row[0] for row in rows] == ["'=a.jpg", "b\\udcff\\udcfe.jpg", "deep/new\\nline.jpg"]
    lines = read_jsonl(tmp_path / "p.jsonl")
    assert [line["image"] for line in lines] == ["=a.jpg", "b\\udcff\\udcfe.jpg", "deep/new\\nline.jpg"]
    assert all(line["labels"] == classes for line in lines)
    assert rows[0][1] == ";".join(classes)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_only_a_file_is_ever_replaced(run_folder, photos, tmp_path, kind):
    out = tmp_path / "p.csv"
    (tmp_path / "precious").write_text("precious")
    {"link": lambda: out.symlink_to("precious"), "folder": out.mkdir, "pipe": lambda: os.mkfifo(out)}[kind]()
    with pytest.raises(
        InputError, match=f"out: {out} is a {kind}, which would be replaced; expected a file or a new name"
    ):
        predict.main([str(run_folder), f"images={photos}", f"out={out}", "num_workers=0"])
    assert (tmp_path / "precious").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.csv", "photos", "precious"]


def test_scores_that_are_no_numbers_are_refused(renamed, photos, tmp_path):
    folder, _ = renamed("a")
    for path in (folder / "checkpoints").iterdir():
        state = load_checkpoint(path)
        for weights in filter(None, (state["method"], state["ema"])):
            weights["classifier.head.linear.bias"] = torch.full_like(weights["classifier.head.linear.bias"], torch.nan)
        save_checkpoint(path, state)
    device = load_run(folder).precision.device
    with pytest.raises(
        InputError, match=f"a.jpg: the model gives NaN for it: its weights are damaged, or {device} is$"
    ):
        predict.main([str(folder), f"images={photos}", f"out={tmp_path}/p.csv", "num_workers=0"])
    assert not list(tmp_path.glob("p.csv*"))
