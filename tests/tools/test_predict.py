import csv
import shutil

import pytest
import torch
from PIL import Image

import train as train_script
from mlvision import load_run
from mlvision.errors import InputError
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
