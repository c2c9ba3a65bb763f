import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import train as train_script
from mlvision import load_run
from mlvision.data import build_manifest
from mlvision.errors import InputError
from mlvision.run import add_classes
from tools import predict


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
        scores = run.method.scores(run.method.predict(run.preprocess(images))).numpy()
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
    predict.main([str(run_folder), f"images={images}", f"out={out}", "num_workers=0", "on_bad_image=skip"])
    assert len(out.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("images=/nowhere", "images: /nowhere is not a folder"),
        ("imges=x", "imges: no such option; did you mean images?"),
        ("out=/nowhere/x.csv", "out: the folder /nowhere does not exist"),
    ],
)
def test_bad_options(run_folder, argument, message, tmp_path):
    with pytest.raises(InputError, match=message):
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
    with pytest.raises(InputError, match="extra_labels: head linear knows its own"):
        predict.main([str(run_folder), f"images={tmp_path}", "extra_labels=[lighthouse]"])
