"""tools/explain.py from the command line: what is written, and what is refused."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from mlvision.commands import explain as tool
from mlvision.commands import train
from mlvision.errors import InputError
from mlvision.explain import CONTROLS
from mlvision.runs.load import load_run, read_for
from mlvision.study.comparison import write_pairs
from mlvision.study.files import save_maps, save_pages
from mlvision.study.render import ExplainedImage, ShownMethod
from mlvision.study.report import ReportData, write_report


@pytest.fixture(scope="module")
def run_folder(scenes_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("explained") / "run"
    train.main(
        [
            "configs/smoke/scenes_test_resnet_baseline.yaml",
            f"data.root={scenes_root}",
            "device=cpu",
            "threads=1",
            "log.tensorboard=false",
            "loader.num_workers=0",
            f"out={out}",
        ]
    )
    return out


QUICK = ["num_workers=0", "device=cpu"]


def test_maps_pages_measures_and_report_are_written(run_folder, tmp_path):
    out = tmp_path / "explained"
    tool.main(
        [str(run_folder), "method=[grad_cam,occlusion]", "labels=ground_truth", "num_images=6", "measure=true",
         "measures.sensitivity_samples=0", "options={occlusion: {window_px: 16}}", "batch_size=4", f"out={out}", *QUICK]
    )  # fmt: skip
    assert {path.name for path in out.iterdir()} == {"maps", "grids", "report", "metrics.csv", "metrics.json"}
    assert (out / "report" / "index.html").is_file()
    assert {path.name for path in (out / "grids").iterdir()} == {"grad_cam_0.png", "occlusion_0.png"}
    files = sorted((out / "maps" / "occlusion").iterdir())
    assert [path.name for path in files] == [path.name for path in sorted((out / "maps" / "grad_cam").iterdir())]
    assert [path.stem for path in files] == [path.stem for path in sorted((out / "report" / "photos").iterdir())]
    num_pairs = 0
    for path in files:
        stored = np.load(path)
        about = json.loads(str(stored["about"]))
        assert about["options"]["window_px"] == 16
        assert len(about["model_hash"]) == 64
        assert stored["maps"].dtype == np.float16
        assert len(stored["maps"]) == len(stored["labels"]) > 0
        assert (stored["targets"][stored["labels"]] == 1).all()
        assert np.abs(stored["maps"]).max() == 1  # in units of the image's scale
        num_pairs += len(stored["labels"])
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert len(rows) == 2 * num_pairs
    assert {row["method"] for row in rows} == {"grad_cam", "occlusion"}
    stored = [np.load(path) for path in sorted((out / "maps" / "grad_cam").iterdir())]
    named = [(str(one["key"]), name) for one in stored for name in one["names"]]
    assert sorted((row["image"], row["label"]) for row in rows if row["method"] == "grad_cam") == sorted(named)
    assert {row["outcome"] for row in rows} <= {"TP", "FN"}
    assert {row["against"] for row in rows} == {""}
    means = json.loads((out / "metrics.json").read_text())["means"]
    assert set(means["occlusion"]) == {"clear", "competing", "FP", "FN"}


def test_a_folder_of_images_and_contrasts(run_folder, scenes_root, tmp_path):
    classes = tuple(
        json.loads(next((scenes_root / "annotations").glob("*test.json")).read_text())["categories"][i]["name"]
        for i in (0, 1)
    )
    out = tmp_path / "explained"
    labels = f"labels=[{classes[0]},{classes[0]} - {classes[1]}]"
    photos = f"images={scenes_root / 'images' / 'test'}"
    tool.main([str(run_folder), photos, labels, "num_images=3", "grids=0", f"out={out}", *QUICK])
    for number in range(3):
        stored = np.load(out / "maps" / "grad_cam" / f"{number:05}.npz")
        assert stored["against"].tolist() == [-1, 1]
        assert stored["labels"].tolist() == [0, 0]
        assert stored["names"].tolist() == [classes[0], f"{classes[0]} \u2212 {classes[1]}"]
        assert np.isnan(stored["targets"]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["labels=errors", "images={folder}"], "errors needs the images' labels"),
        (["pick=worst", "images={folder}"], "worst needs the images' labels"),
        (["measure=true", "images={folder}"], "measures need the images' labels"),
        (["images={empty}"], "no image below"),
        (["images={folder}/nowhere"], "not a folder"),
        (["labels=[airplan]"], "no class 'airplan'; nearest: airplane"),
        (["labels=[errors,airplane]"], "'errors' stands alone"),
        (["method=gradcam"], "expected one of grad_cam"),
        (["options={grad_cam: {layr: x}}"], "grad_cam.layr: no such option"),
        (["options={grad_cam: {layer: layer9}}", "labels=top1"], "no module 'layer9'; nearest"),
        (["method=attention_rollout", "labels=top1"], r"attention: test_resnet is no plain ViT"),
        (["num_images=-1"], "num_images: expected 0 or more"),
        (["method=[saliency,saliency]"], "method: expected each method once"),
        (["labels=[airplane,cup,airplane]"], "labels: expected each label once"),
        (["measures.seed=1"], "measures.seed"),
        (["stored={empty}"], r"empty: no label-map store \(meta.json is missing\)"),
    ],
)
def test_what_cannot_be_explained_is_refused_and_nothing_is_written(
    run_folder, scenes_root, tmp_path, arguments, message
):
    empty = tmp_path / "empty"
    empty.mkdir()
    filled = [
        a.replace("{folder}", str(scenes_root / "images" / "test")).replace("{empty}", str(empty)) for a in arguments
    ]
    out = tmp_path / "explained"
    with pytest.raises(InputError, match=message):
        tool.main([str(run_folder), f"out={out}", "num_images=2", *QUICK, *filled])
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_the_validation_split_is_read_and_named_everywhere(run_folder, tmp_path):
    run = load_run(run_folder, device="cpu")
    val = {record.key for record in read_for(run, "val")[0].records}
    named = tool.name_of("val", read_for(run, "val")[0])
    assert named.startswith("val")
    out = tmp_path / "explained"
    few = ["num_images=3", "measures.sensitivity_samples=0", "measures.steps=5", "measures.lattice=4"]
    tool.main([str(run_folder), "labels=ground_truth", "measure=true", "grids=1", f"out={out}", *few, *QUICK])
    for path in sorted((out / "maps" / "grad_cam").iterdir()):
        stored = np.load(path)
        assert str(stored["key"]) in val
        assert json.loads(str(stored["about"]))["split"] == named
    assert json.loads((out / "metrics.json").read_text())["split"] == named
    assert {row["split"] for row in csv.DictReader(open(out / "metrics.csv"))} == {named}
    assert f"split {named}" in (out / "report" / "index.html").read_text()
    assert f'["split","{named}"]' in (out / "report" / "data" / "index.js").read_text()
    out = tmp_path / "comparison"
    tool.main(["compare", str(run_folder), "methods=[grad_cam]", "sanity_images=0", f"out={out}", *few, *QUICK])
    assert json.loads((out / "comparison.json").read_text())["split"] == named
    assert {row["split"] for row in csv.DictReader(open(out / "pairs.csv"))} == {named}
    assert {row["image"] for row in csv.DictReader(open(out / "pairs.csv"))} <= val
    assert f"of split {read_for(run, 'val')[0].split}" in (out / "comparison.md").read_text()


def test_one_seed_draws_the_maps_and_what_they_are_measured_by(run_folder, tmp_path):
    """`measures.seed` was taken and then overwritten by `seed`; there is one now, for both commands."""

    def maps(seed, *arguments):
        out = tmp_path / f"{seed}{len(arguments)}"
        options = "options={rise: {num_samples: 20}}"
        tool.main(
            [str(run_folder), "method=rise", options, "labels=top1", "num_images=2", "grids=0", f"seed={seed}",
             f"out={out}", *arguments, *QUICK]
        )  # fmt: skip
        return np.load(out / "maps" / "rise" / "00000.npz")["maps"]

    measured = ["measure=true", "measures.sensitivity_samples=0", "measures.steps=5", "measures.lattice=4"]
    first = maps(3)
    assert (first == maps(3, *measured)).all()
    assert (first != maps(4)).any()
    with pytest.raises(InputError, match="methods: expected each method once"):
        tool.main(["compare", str(run_folder), "methods=[rise,rise]", f"out={tmp_path}/c", *QUICK])


def test_a_folder_with_an_equals_sign_is_a_run(run_folder, tmp_path):
    sweep = tmp_path / "optim.lr=0.1,seed=1"
    shutil.copytree(run_folder, sweep)
    tool.main([str(sweep), "labels=top1", "num_images=1", "grids=0", f"out={tmp_path}/out", *QUICK])
    assert (tmp_path / "out" / "report" / "index.html").is_file()


def test_names_of_any_text_survive_in_tables_and_pages(tmp_path):
    names = ["two\nlines", "=cmd", os.fsdecode(b"\xff"), 'a,b"c', "</script>", "\u732b", "w" * 10_000]
    keys = [f"{name}.jpg".replace("/", "") for name in names]
    columns = {"image": np.arange(7), "label": np.arange(7), "against": np.arange(7) - 1, "outcome": np.arange(7) % 4}
    write_pairs(tmp_path / "pairs.csv", {"cam": columns}, "val", keys, names)
    with open(tmp_path / "pairs.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # No formula for a spreadsheet, and a byte that is no UTF-8 as JSON escapes it; everything else is as it was.
    written = [names[0], "'=cmd", r"\udcff", *names[3:]]
    assert [row["label"] for row in rows] == written
    assert [row["image"] for row in rows] == [f"{name}.jpg".replace("/", "") for name in written]
    assert [row["against"] for row in rows] == ["", *written[:-1]]
    image = ExplainedImage(
        keys[2],
        photo=np.zeros((8, 9, 3), np.uint8),
        scores=np.full(7, 0.7, np.float32),
        targets=np.ones(7, np.float32),
        labels=np.arange(7),
        maps={"cam": np.random.default_rng(0).random((7, 2, 2), np.float32)},
    )
    shown = [ShownMethod("cam")]
    images = save_maps([image], tmp_path / "maps", names, {"cam": {"split": names[0]}})
    images = save_pages(images, tmp_path / "grids", names, shown, 0.5, num=1, title=names[2])
    write_report(tmp_path / "report", ReportData(names[2], names, shown, images, 0.5, {names[0]: names[2]}))
    stored = np.load(tmp_path / "maps" / "cam" / "00000.npz")
    assert stored["classes"].tolist() == names
    assert str(stored["key"]) == keys[2]
    assert (tmp_path / "grids" / "cam_0.png").stat().st_size > 100
    assert "</script>" not in (tmp_path / "report" / "data" / "index.js").read_text()


@pytest.mark.parametrize("name", ["a/b", "..", "", "a\nb", "\udcff", "x" * 300])
def test_a_method_whose_name_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="names a folder; expected letters, digits, _ - and . only"):
        list(save_maps([], tmp_path / "maps", ["cat"], {name: {}}))
    with pytest.raises(InputError, match="names a folder; expected letters, digits, _ - and . only"):
        list(save_pages([], tmp_path / "grids", ["cat"], [ShownMethod(name)], 0.5, num=1))
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_never_overwritten(run_folder, tmp_path):
    with pytest.raises(InputError, match="is there already"):
        tool.main([str(run_folder), f"out={tmp_path}", *QUICK])
    with pytest.raises(InputError, match="nowhere does not exist"):
        tool.main(["compare", str(run_folder), f"out={tmp_path}/nowhere/out", *QUICK])
    with pytest.raises(InputError, match="expected a run folder"):
        tool.main(["compare", f"out={tmp_path}"])


def test_the_comparison_has_controls_and_keeps_cases_apart(run_folder, tmp_path, capsys):
    out = tmp_path / "comparison"
    tool.main(
        ["compare", str(run_folder), "methods=[grad_cam,saliency]", "num_images=8", "sensitivity_images=4",
         "sanity_images=2", "measures.steps=5", "measures.lattice=6",
         "measures.sensitivity_samples=2", "measures.baselines=[black,mean]",
         "threshold=0.3", "batch_size=4", f"out={out}", *QUICK]
    )  # fmt: skip
    result = json.loads((out / "comparison.json").read_text())
    assert set(result["methods"]) == {"grad_cam", "saliency", *CONTROLS}
    rows = list(csv.DictReader(open(out / "pairs.csv")))
    counts = {name: sum(row["method"] == name for row in rows) for name in result["methods"]}
    assert len(set(counts.values())) == 1  # every method on the same pairs
    one = result["methods"]["grad_cam"]
    assert sum(case["pairs"] for case in one["cases"].values()) == counts["grad_cam"]
    assert one["randomised"][0]["spearman"] == 1
    with np.load(out / "cross_label.npz") as matrices:
        drops, counts = matrices["grad_cam_drops"], matrices["grad_cam_counts"]
    found = sum(one["cases"][case]["pairs"] - one["cases"][case]["flat"] for case in ("clear", "competing"))
    assert drops.shape == (len(result["classes"]),) * 2
    assert counts.sum() == found
    assert (one["cross_label"]["own"] is None) == (found == 0)
    measured = {key for case in one["cases"].values() for key in case["means"]}
    assert {"srg_black", "srg_mean", "specificity_black", "pointing", "max_sensitivity_0.02", "forwards"} <= measured
    table = (out / "comparison.md").read_text()
    assert "*random*" in table
    assert "| grad_cam |" in table
    with_copies = [row for row in rows if row["max_sensitivity_0.02"] not in ("", "nan")]
    assert 0 < len(with_copies) < len(rows)  # of the first images alone


def test_help_lists_methods_and_options(capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    shown = capsys.readouterr().out
    for word in ("occlusion", "random", "measures.lattice", "sensitivity_images", "pick", "window_px", "num_steps"):
        assert word in shown


def test_prototypes_are_patches_of_the_split_and_say_what_is_annotated(run_folder, tmp_path):
    out = tmp_path / "prototypes"
    run = load_run(run_folder, device="cpu")
    chosen = [run.classes[4], run.classes[1]]
    tool.main(["prototypes", str(run_folder), "split=test", f"labels={chosen}", "num=3", f"out={out}", *QUICK])
    rows = list(csv.DictReader(open(out / "prototypes.csv")))
    assert [(row["class"], row["rank"]) for row in rows] == [(name, str(rank)) for name in chosen for rank in range(3)]
    manifest, _ = read_for(run, "test")
    targets = {record.key: manifest.target(index) for index, record in enumerate(manifest.records)}
    for row in rows:
        assert float(row["target"]) == targets[row["image"]][run.classes.index(row["class"])]
        assert 0 <= int(row["row"]) < int(row["rows"])
    assert float(rows[0]["nearness"]) > float(rows[1]["nearness"])
    assert Image.open(out / "prototypes.png").size[0] > 300
    with pytest.raises(InputError, match="is there already"):
        tool.main(["prototypes", str(run_folder), f"out={out}", *QUICK])
    with pytest.raises(InputError, match="num: expected 1 to 1000, got 0"):
        tool.main(["prototypes", str(run_folder), "num=0", f"out={out}2", *QUICK])
