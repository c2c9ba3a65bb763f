"""The HTML report: its files, and what is visible of it in a real browser."""

import base64
import io
import json
import re
import shutil
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mlvision.errors import InputError
from mlvision.study.render import ExplainedImage, ShownMethod, colourise, number, shared_limit, upsample
from mlvision.study.report import ReportData, write_report

NAN = float("nan")
NASTY = '<img src=x onerror="alert(1)">&amp;</script>\u2028'
CLASSES = ["cat", "dog", NASTY, "sun", "moon"]
METHODS = [
    ShownMethod("cam", description="the first"),
    ShownMethod("occlusion", signed=True, description="the second"),
    ShownMethod("rollout", label_specific=False, description="the third"),
]
NUM_IMAGES = 30
SQUARE = np.array([[0.5, 0.25], [1.0, 0.25], [1.0, 0.75], [0.5, 0.75]])
SCORES = np.array([0.9, 0.8, 0.1, 0.2, 0.6], np.float32)
TARGETS = np.array([1, 0, 1, 0, NAN], np.float32)  # TP, FP, FN, TN, unknown


def explained(number, shape=(60, 80)):
    """An image whose first label's map has one hot cell, at the right end of the first row of 3 x 5."""
    rng = np.random.default_rng(number)
    scores = SCORES.copy()
    scores[0] = 0.6 + 0.01 * ((7 * number) % NUM_IMAGES)  # another order than by key and by loss
    labels = np.array([0, 1, 2, 3, 4, -1, 0])
    maps = {
        "cam": rng.random((7, 3, 5)).astype(np.float32) * (1 + number),
        "occlusion": rng.normal(size=(7, 4, 6)).astype(np.float32),
        "rollout": np.repeat(rng.random((1, 1, 7)).astype(np.float32), 7, axis=0),
    }
    maps["cam"][0] = 0
    maps["cam"][0, 0, 4] = 2 * (1 + number)
    maps["cam"][1] = 0.25  # flat
    maps["cam"][2] = -maps["cam"][2] - 0.1
    maps["cam"][6] -= 1 + number
    pointing = np.array([1, 0, 1, 0, NAN, 0, 0], np.float32)
    return ExplainedImage(
        key=f"set/{number:02}.jpg",
        photo=rng.integers(60, 200, (4, 6, 3), dtype=np.uint8)
        .repeat(20, axis=0)
        .repeat(20, axis=1)[: shape[0], : shape[1]],
        scores=scores,
        targets=np.zeros(5, np.float32) if number == 29 else TARGETS,
        labels=labels,
        maps=maps if number != 3 else {"cam": maps["cam"]},
        logits=np.log(scores / (1 - scores)),
        loss=float((11 * number) % NUM_IMAGES),
        against=np.array([-1, -1, -1, -1, -1, -1, 1]),
        measures={"cam": {"pointing": pointing}},
        areas={} if number else {0: [SQUARE], 2: [SQUARE / 2], 3: [SQUARE]},
    )


def data(images=None, **changes):
    images = (explained(n) for n in range(NUM_IMAGES)) if images is None else images
    return replace(ReportData(f"report {NASTY}", CLASSES, METHODS, images, 0.5, {"run": f"runs/{NASTY}"}), **changes)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    assert write_report(folder, data()) == folder / "index.html"
    return folder


def read(path):
    """The data that a script of a report hands over."""
    return json.loads(re.fullmatch(r"mlvisionReport\.\w+\((?:\d+,)?(.*)\);\n", path.read_text(), re.DOTALL)[1])


# ---- files


def test_the_same_data_give_the_same_bytes_over_an_earlier_report(report, tmp_path):
    again = tmp_path / "again"
    write_report(again, data([explained(0)]))
    write_report(again, data())
    files = sorted(path.relative_to(report) for path in report.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert len(files) == 2 * NUM_IMAGES + 4
    for name in files:
        assert (report / name).read_bytes() == (again / name).read_bytes(), name
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_no_name_becomes_markup(report):
    page = (report / "index.html").read_text()
    assert "<img" not in page
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;amp;" in page
    for script in (report / "data").iterdir():
        assert not set("<>&\u2028") & set(script.read_text()), script
    assert read(report / "data" / "index.js")["classes"] == CLASSES


def test_stored_maps_are_the_maps(report):
    image = explained(7)
    parts = read(report / "data" / "00007.js")["methods"]
    for method, part in zip(METHODS, parts, strict=True):
        maps = image.maps[method.name][image.places]
        raw = np.frombuffer(base64.b64decode(part["cells"]), np.int8).reshape(maps.shape)
        for values, stored, (up, down) in zip(maps, raw, part["steps"], strict=True):
            # Both signs of every map, each as fine as it is strong.
            np.testing.assert_allclose(stored.clip(0) * up, values.clip(min=0), atol=values.max().clip(0) / 127)
            np.testing.assert_allclose(
                stored.clip(max=0) * down, values.clip(max=0), atol=-values.min().clip(max=0) / 127
            )
    cam = parts[0]
    assert cam["flat"] == [False, True, False, False, False, False]
    assert cam["peaks"][2][2] < 0  # nothing positive
    assert cam["peaks"][0] == [0.9, 0.167, 16]
    drawn = image.maps["cam"][[0, 3, 4, 6]]
    drawn[:3] = drawn[:3].clip(min=0)
    assert cam["limits"]["method"] == pytest.approx(shared_limit(drawn), rel=1e-5)
    assert cam["own"][0] == pytest.approx([shared_limit(drawn[:1])] * 2, rel=1e-5)
    native = image.maps["cam"][image.places]
    positive = native[[0, 3, 4, 5]].clip(min=0)
    positive = positive[positive.max(axis=(1, 2)) > 0]
    assert cam["limits"]["for"] == pytest.approx(shared_limit(positive), rel=1e-5)
    assert cam["limits"]["both"] == pytest.approx(shared_limit(native[[0, 2, 3, 4, 5]]), rel=1e-5)
    assert cam["own"][2] == pytest.approx([0, shared_limit(native[2:3])], rel=1e-5)
    assert read(report / "data" / "00003.js")["methods"][1] is None


def test_the_index_names_what_it_holds_and_counts_every_class(report):
    index = read(report / "data" / "index.js")
    first = index["images"][0]
    assert first["labels"][5] == {"label": 0, "outcome": 2, "score": 0.6, "against": 1, "rivalScore": 0.8}
    assert (first["key"], first["height"], first["width"], first["truth"]) == ("set/00.jpg", 60, 80, [0, 2])
    assert index["methods"][1]["name"] == "occlusion"
    # By hand: TP, FP, FN, TN, unknown in 29 images; in the last nothing is there: FP, FP, TN, TN and a predicted moon.
    counts = {
        row["class"]: [row[kind] for kind in ("TP", "FP", "FN", "unknown", "explained")] for row in index["table"]
    }
    assert counts == {
        0: [29, 1, 0, 0, 30],
        1: [0, 30, 0, 0, 30],
        2: [0, 0, 29, 0, 30],
        3: [0, 0, 0, 0, 30],
        4: [0, 1, 0, 29, 30],
    }


def test_outlines_are_stored_of_what_is_explained_or_there(report):
    assert read(report / "data" / "index.js")["hasAreas"]
    areas = read(report / "data" / "00000.js")["areas"]
    assert areas == {"0": [SQUARE.tolist()], "2": [(SQUARE / 2).tolist()], "3": [SQUARE.tolist()]}
    assert read(report / "data" / "00001.js")["areas"] == {}


def test_maps_that_are_too_fine_are_averaged_and_the_page_says_so(tmp_path):
    values = np.zeros((7, 30, 60), np.float32)
    values[0, 28:, 2:4] = [[4, 8], [0, 0]]
    image = replace(explained(1), maps={"cam": values})
    write_report(tmp_path / "out", data([image]), max_side=30)
    assert read(tmp_path / "out" / "data" / "index.js")["methods"][0]["averaged"] == "30 x 60 to 15 x 30"
    part = read(tmp_path / "out" / "data" / "00000.js")["methods"][0]
    stored = np.frombuffer(base64.b64decode(part["cells"]), np.int8).reshape(6, 15, 30)[0] * part["steps"][0][0]
    assert np.flatnonzero(stored).tolist() == [14 * 30 + 1]
    assert stored[14, 1] == pytest.approx(3, rel=1e-5)
    assert part["peaks"][0] == [round(3.5 / 60, 3), round(28.5 / 30, 3), 8]  # of the map as it was made


def test_memory_at_the_size_of_the_photos_does_not_grow_with_the_labels(tmp_path):
    """Maps are drawn by the browser: 64 labels take less than one map of a photo's size more than 2."""
    side, names = 512, [f"class {n}" for n in range(64)]

    def peak(num_labels):
        image = ExplainedImage(
            "a.jpg",
            photo=np.zeros((side, side, 3), np.uint8),
            scores=np.full(64, 0.9, np.float32),
            targets=np.ones(64, np.float32),
            labels=np.arange(num_labels),
            maps={"cam": np.random.default_rng(0).random((num_labels, 7, 7), np.float32)},
        )
        tracemalloc.start()
        write_report(tmp_path / "out", ReportData("memory", names, METHODS[:1], [image]))
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)  # what is only made once
    assert peak(64) - peak(2) < side * side * 4


def test_only_a_report_is_replaced(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "index.html").write_text("<p>mine")
    (tmp_path / "file").write_text("x")
    write_report(tmp_path / "mixed", data([explained(0)]))
    (tmp_path / "mixed" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    write_report(tmp_path / "empty", data([explained(0)]))
    before = sorted(tmp_path.rglob("*"))
    for name, message in (
        ("foreign", "exists and is no report"),
        ("file", "a file is in the way"),
        ("mixed", "holds notes.txt beside an earlier report"),
    ):
        with pytest.raises(InputError, match=f"{name}: {message}"):
            write_report(tmp_path / name, data([explained(0)]))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_that_fails_leaves_nothing_and_keeps_the_earlier_one(tmp_path):
    def broken():
        yield explained(0)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_report(tmp_path / "new", data(broken()))
    assert not list(tmp_path.iterdir())
    write_report(tmp_path / "old", data([explained(0)]))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RuntimeError, match="no more"):
        write_report(tmp_path / "old", data(broken()))
    assert sorted(tmp_path.rglob("*")) == before


def test_data_that_make_no_report_are_refused(tmp_path):
    for changes, message in (
        ({"images": []}, "there are no images"),
        ({"methods": []}, "expected methods of different names"),
        ({"methods": METHODS[:1] * 2}, "expected methods of different names"),
        ({"classes": CLASSES[:4]}, "set/00.jpg: 5 scores for 4 classes"),
        (
            {"images": [replace(explained(0), maps={"other": np.ones((7, 2, 2), np.float32)})]},
            "set/00.jpg: no map of cam",
        ),
    ):
        with pytest.raises(InputError, match=message):
            write_report(tmp_path / "out", data(**{"images": [explained(0)]} | changes))
    assert not list(tmp_path.iterdir())


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-dev.txt)")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no chromium on the PATH (Debian: apt-get install chromium): the report is not looked at")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found[0])
        yield browser
        browser.close()


class Reader:
    """Somebody who looks at a report: what they do, and what is before their eyes."""

    def __init__(self, page, folder):
        self.page, self.folder = page, folder

    def open(self, address=""):
        self.page.goto("about:blank")  # else another address of the same page only moves its hash
        self.page.goto((self.folder / "index.html").as_uri() + address)
        return self.settle()

    def settle(self):
        self.page.wait_for_selector("#cards[aria-busy=false]", state="attached")
        return self

    def wait(self, condition):
        """Until a condition holds on the page; playwright's own waiting evaluates text there, which the page forbids."""
        end = time.monotonic() + 60  # a browser draws, and so scrolls, seconds late when all cores are busy
        while time.monotonic() < end:
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never on the page: {condition}")

    def choose(self, what, value):
        self.page.locator(f"#{what}").select_option(value)
        return self.settle()

    def press(self, key):
        self.page.keyboard.press(key)
        return self.settle()

    def tick(self, *outcomes):
        for box in self.page.locator("#outcomes input").all():
            box.set_checked(box.input_value() in outcomes)
        return self.settle()

    def keys(self):
        return self.page.locator("article h2:visible").all_inner_texts()

    def tiles(self):
        """Name and caption of each visible tile."""
        names = self.page.locator(".tile .name:visible").all_inner_texts()
        facts = self.page.locator(".tile .name + .facts:visible").all_inner_texts()
        return list(zip(names, [" ".join(text.split()) for text in facts], strict=True))

    def text(self, selector):
        return " ".join(self.page.locator(selector).first.inner_text().split())

    def pixels(self, tile):
        """RGBA of a tile's canvas, as the browser holds it."""
        url = tile.locator("canvas").first.evaluate("canvas => canvas.toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))

    def seen(self, selector):
        """RGB on screen within an element's border, without the rounded corners."""
        shot = Image.open(io.BytesIO(self.page.locator(selector).first.screenshot()))
        return np.asarray(shot.convert("RGB"))[8:-8, 8:-8].astype(int)


@pytest.fixture
def reader(browser, report):
    page = browser.new_page(viewport={"width": 1366, "height": 768})
    troubles, requests = [], []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
    page.on("requestfailed", lambda request: troubles.append(request.url))
    page.on("request", lambda request: requests.append(request.url))
    page.set_default_timeout(60_000)
    yield Reader(page, report)
    page.close()
    assert troubles == []
    assert all(url.startswith((report.as_uri(), "data:", "about:")) for url in requests), requests


def key_of(number):
    return f"set/{number:02}.jpg"


BY_LOSS = [key_of(n) for n in sorted(range(NUM_IMAGES), key=lambda n: -((11 * n) % NUM_IMAGES))]


def test_first_page(reader):
    reader.open()
    assert reader.keys() == BY_LOSS[:12]
    assert reader.text("#page") == "Page 1 of 3"
    assert reader.text("#counts") == "30 images, 180 explained labels"
    assert reader.text("h1") == " ".join(f"report {NASTY}".split())  # as text, not as an image
    assert reader.page.locator("article img").count() == 12 * 7
    assert "runs/" not in reader.page.locator("body").inner_text()  # folded away
    reader.page.locator("#about summary").click()
    assert "runs/" in reader.page.locator("body").inner_text()


def test_a_card_names_its_labels_mistakes_first(reader):
    reader.open("#sort=key")
    assert reader.tiles()[:6] == [
        (NASTY, "p=0.10 GT=1 FN"),
        ("dog", "p=0.80 GT=0 FP"),
        ("cat", "p=0.60 GT=1 TP"),
        ("cat \u2212 dog", "p=0.60 GT=1 TP"),
        ("sun", "p=0.20 GT=0 TN"),
        ("moon", "p=0.60 GT=? ?"),
    ]
    first = reader.page.locator("article").first
    assert first.locator(".photo img").get_attribute("alt") == (
        f"Photo set/00.jpg. Ground truth: cat, {NASTY}. Predicted: dog, cat, moon."
    )
    assert "pointing 1" in first.locator(".tile.TP").first.inner_text()
    cat = first.locator(".tile.TP button.frame").first
    assert cat.get_attribute("aria-label") == (
        "cat: score 0.60, true positive. "
        "cam: strongest evidence upper right (90 % from the left, 17 % from the top), value 2."
    )
    assert "contrast with dog, p=0.80" in first.inner_text()
    assert "logit 0.405 · threshold 0.5" in first.inner_text()
    borders = first.locator(".tile .frame").evaluate_all("all => all.map(e => getComputedStyle(e).borderTopColor)")
    assert len(set(borders[:3])) == 3  # FN, FP, TP
    assert borders[4] == borders[5]  # TN and unknown


def test_filters_leave_only_what_matches(reader):
    reader.open()
    reader.choose("label", "1")
    assert {name for name, _ in reader.tiles()} == {"dog"}
    assert len(reader.keys()) == 12
    reader.tick("TN")
    assert reader.keys() == []  # dog is never a true negative
    reader.choose("label", "")
    assert {facts.split()[-1] for _, facts in reader.tiles()} == {"TN"}
    reader.tick("FN", "FP")
    assert {facts.split()[-1] for _, facts in reader.tiles()} == {"FN", "FP"}
    reader.choose("label", "0-1")
    assert (reader.keys(), [name for name, _ in reader.tiles()]) == (["set/29.jpg"], ["cat \u2212 dog"])
    assert reader.text("#counts") == "1 image of 30, 1 explained label of 180"
    reader.tick("TP", "FP", "FN", "TN", "unknown")
    reader.choose("label", "")
    reader.page.locator("#find").fill("/2")
    assert sorted(reader.settle().keys()) == [key_of(n) for n in range(20, 30)]
    assert reader.text("#counts") == "10 images of 30, 60 explained labels of 180"


def test_counts_follow_the_other_filters(reader):
    reader.open()

    def outcomes():
        return [int(text) for text in reader.page.locator("#outcomes small").all_inner_texts()]

    def labels():
        return [
            text for text in reader.page.locator("#label option").all_inner_texts() if text.startswith(("cat (", "dog"))
        ]

    # FN, FP, TP (cat and its contrast), TN, unknown of 29 images; in the last one cat, its contrast, dog and moon are FPs.
    assert outcomes() == [29, 29 + 4, 2 * 29, 29 + 2, 29]
    assert labels() == ["cat (30)", "dog (30)"]
    reader.choose("label", "0")
    assert outcomes() == [0, 1, 29, 0, 0]
    reader.tick("FP")
    assert labels() == ["cat (1)", "dog (30)"]
    reader.page.locator("#find").fill("/0")
    reader.settle()
    assert outcomes() == [0, 0, 10, 0, 0]
    assert labels() == ["cat (0)", "dog (10)"]


def test_the_table_of_classes_comes_first_and_leads_to_a_class(reader):
    reader.open()
    rows = reader.page.locator("#classes-body tr").all_inner_texts()
    assert len(rows) == 5
    assert rows[0].startswith("dog")  # the most mistakes first
    assert [row.split("\t")[1:] for row in rows if row.startswith("cat")] == [
        ["29", "29", "0", "1", "1", "0", "0.97", "1.00", "30"]
    ]
    head = reader.page.locator("#classes-head th")
    assert head.nth(5).get_attribute("aria-sort") == "descending"
    head.nth(8).locator("button").click()  # recall: what has none comes last
    assert reader.page.locator("#classes-body tr").first.inner_text().startswith("cat")
    head.nth(8).locator("button").click()
    assert head.nth(8).get_attribute("aria-sort") == "ascending"
    assert reader.page.locator("#classes-body tr").last.inner_text().split("\t")[8] == "\u2013"
    reader.page.locator("#classes-body button", has_text="moon").click()
    assert {name for name, _ in reader.settle().tiles()} == {"moon"}
    assert reader.page.locator("#label").input_value() == "4"


def test_evidence_against_is_drawn_when_asked_for(reader):
    reader.open("#sort=key&size=256")
    nothing = reader.page.locator("article").first.locator(".tile").first  # NASTY: no positive evidence by cam
    assert nothing.locator(".silent").is_visible()
    assert not reader.page.locator("#against").is_checked()
    reader.page.locator("#against").check()
    assert not nothing.locator(".silent").is_visible()
    pixels = reader.pixels(nothing).astype(int)
    assert ((pixels[..., 2] > pixels[..., 0]) | (pixels[..., 3] == 0)).all()  # blue
    native = explained(0).maps["cam"][explained(0).places]
    limit = shared_limit(native[[0, 2, 3, 4, 5]])
    assert reader.text(".card .scale").startswith(f"{number(-limit)} 0 +{number(limit)}")
    assert "strongest against" in nothing.locator("button.frame").get_attribute("aria-label")
    expected = colourise(upsample(native[2], pixels.shape[:2]), limit, True).astype(float)
    assert np.abs(pixels[..., 3] - expected[..., 3]).max() <= 4
    # A method that is signed by itself: the switch is on until it is turned off.
    reader.open("#method=occlusion&sort=key")
    assert reader.page.locator("#against").is_checked()
    reader.page.locator("h1").click()
    reader.press("n")
    assert not reader.page.locator("#against").is_checked()
    assert "against=0" in reader.page.evaluate("location.hash")
    first = reader.pixels(reader.page.locator("article").first.locator(".tile").nth(2)).astype(int)
    drawn = first[first[..., 3] > 60]
    assert (drawn[:, 0] >= drawn[:, 2] - 90).all()  # violet to yellow, no blue of evidence against


def test_true_areas_are_drawn_when_asked_for(reader):
    reader.open("#sort=key&size=256")
    cat = reader.page.locator("article").first.locator(".tile").nth(2)
    assert cat.locator("polygon").count() == 0
    reader.page.locator("#areas").check()
    assert cat.locator("polygon.line").count() == 1
    box, outline = (cat.locator(selector).bounding_box() for selector in (".frame img", "polygon.line"))
    left, top = (outline[a] - box[a] for a in "xy")
    assert (left / box["width"], top / box["height"]) == pytest.approx((0.5, 0.25), abs=0.02)
    assert (outline["width"] / box["width"], outline["height"] / box["height"]) == pytest.approx((0.5, 0.5), abs=0.03)
    first = reader.page.locator("article").first
    assert first.locator(".photo polygon.line").count() == 2  # cat and NASTY are there, sun is not
    assert first.locator(".tile.TN polygon.line").count() == 1
    assert first.locator(".tile.FP polygon").count() == 0
    reader.page.locator("h1").click()
    reader.press("a")
    assert reader.page.locator("polygon").count() == 0


def test_a_click_enlarges_a_label_and_shows_the_methods_side_by_side(reader):
    reader.open("#sort=key&areas=1")
    cat = reader.page.locator("article").first.locator(".tile").nth(2)
    cat.locator("button.frame").click()
    dialog = reader.page.locator("#closer")
    assert reader.text("#closer-title") == "cat"
    assert "p=0.60 GT=1 TP" in reader.text("#closer-facts")
    assert dialog.locator("figure .name").all_inner_texts() == ["photo", "cam", "occlusion", "rollout"]
    assert dialog.locator("polygon.line").count() == 4
    assert "pointing 1" in dialog.inner_text()
    maps = explained(0).maps["occlusion"]
    large = reader.pixels(dialog.locator("figure").nth(2)).astype(float)
    expected = colourise(upsample(maps[0], large.shape[:2]), shared_limit(maps[explained(0).places]), True).astype(
        float
    )
    assert np.abs(large[..., 3] - expected[..., 3]).max() <= 4
    sides = [dialog.locator("figure .frame").nth(n).bounding_box() for n in range(2)]
    assert sides[0]["y"] == sides[1]["y"]
    assert sides[1]["width"] > cat.locator(".frame").bounding_box()["width"]
    reader.page.keyboard.press("ArrowRight")
    assert reader.text("#closer-title") == "cat \u2212 dog"
    reader.page.keyboard.press("ArrowLeft")
    reader.page.keyboard.press("ArrowLeft")
    assert reader.text("#closer-title") == "dog"
    assert "flat: the same everywhere" in dialog.inner_text()
    assert reader.text("#page") == "Page 1 of 3"  # the arrows turned no page behind it
    reader.page.keyboard.press("Escape")
    assert not dialog.is_visible()
    reader.press("ArrowRight")
    assert reader.text("#page") == "Page 2 of 3"
    reader.page.locator(".photo button.frame").first.click()
    assert dialog.locator("figure").count() == 1
    reader.page.locator("#closer-close").click()
    assert not dialog.is_visible()
    # By the keyboard too.
    reader.page.locator(".tile button.frame").first.focus()
    reader.page.keyboard.press("Enter")
    assert dialog.is_visible()


def test_photos_are_in_their_own_shape(reader):
    reader.open("#sort=key&size=256")
    for selector in (".photo .frame img", ".tile.TP .frame canvas"):
        box = reader.page.locator(selector).first.bounding_box()
        assert box["width"] / box["height"] == pytest.approx(80 / 60, rel=0.02)


def test_an_empty_filter_says_so_and_offers_a_way_back(reader):
    reader.open("#label=1&outcomes=FN")
    assert reader.keys() == []
    assert reader.page.locator("#empty").is_visible()
    assert reader.text("#empty p") == "Nothing matches. Filters: label dog, outcome FN."
    reader.page.locator("#reset").click()
    reader.settle()
    assert len(reader.keys()) == 12
    assert not reader.page.locator("#empty").is_visible()
    reader.tick()
    assert reader.text("#empty p") == "Nothing matches. Filters: no outcome is chosen."


def test_sorting_changes_the_order_on_screen(reader):
    reader.open()
    reader.choose("sort", "-loss")
    assert reader.keys() == BY_LOSS[::-1][:12]
    reader.choose("sort", "key")
    assert reader.keys() == [key_of(n) for n in range(12)]
    reader.choose("sort", "-key")
    assert reader.keys() == [key_of(n) for n in range(29, 17, -1)]
    reader.choose("label", "0")
    reader.choose("sort", "score")
    shown = [float(facts.split()[0][2:]) for _, facts in reader.tiles()]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == 0.89
    reader.choose("sort", "-score")
    assert [float(facts.split()[0][2:]) for _, facts in reader.tiles()][:3] == [0.6, 0.61, 0.62]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_canvases_hold_the_colours_of_the_renderer(reader, method):
    reader.open(f"#sort=key&method={method.name}")
    image, place = explained(0), 0
    drawn = [p for p in image.places if method.name != "cam" or p not in (1, 2)]
    maps = image.maps[method.name]
    parts = {p: maps[p] if method.signed or p == 6 else maps[p].clip(min=0) for p in drawn}
    limit = shared_limit(np.stack(list(parts.values())))
    found = reader.pixels(reader.page.locator("article").first.locator(".tile").nth(2)).astype(float)
    expected = colourise(upsample(parts[place], found.shape[:2]), limit, method.signed).astype(float)
    assert np.abs(found[..., 3] - expected[..., 3]).max() <= 3  # a byte a cell
    seen, meant = (c[..., :3] * c[..., 3:] / 255 for c in (found, expected))  # a canvas keeps colours times alpha
    assert np.abs(seen - meant).max() <= 4
    ends = reader.page.locator(".card .scale").first.locator("b").all_inner_texts()
    assert ends == ([number(-limit), "0", "+" + number(limit)] if method.signed else ["0", number(limit)])
    if method.name == "cam":  # the hot cell is the last of the first row
        rows, columns = np.nonzero(found[..., 3] > 200)
        assert rows.max() < found.shape[0] / 3
        assert columns.min() > found.shape[1] * 0.75


def test_switching_methods_changes_colours_and_words(reader):
    reader.open("#sort=key")
    tile = reader.page.locator("article").first.locator(".tile").nth(2)
    cam, keys = reader.pixels(tile), reader.keys()
    reader.choose("method", "1")
    occlusion = reader.pixels(tile)
    assert (cam != occlusion).mean() > 0.3
    assert reader.text("#method-note").startswith("occlusion the second Blue: evidence against")
    reader.page.locator("h1").click()
    reader.press("3")
    assert (reader.pixels(tile) != occlusion).mean() > 0.3
    assert reader.page.locator("#method").input_value() == "2"
    assert "not label-specific" in reader.text("#method-note")
    reader.press("1")
    assert (reader.pixels(tile) == cam).all()
    assert reader.keys() == keys  # the same cards
    assert reader.page.locator("#method-note .note:visible").count() == 0


def test_what_cannot_be_drawn_is_said(reader):
    reader.open("#sort=key")
    dog = reader.page.locator("article").first.locator(".tile").nth(1)
    assert dog.locator(".silent").inner_text() == "flat: the same everywhere"
    assert not dog.locator("canvas").first.is_visible()
    assert (reader.seen(".tile:nth-child(2) .frame img") == reader.seen(".photo .frame img")).mean() > 0.6
    nothing = reader.page.locator("article").first.locator(".tile").first
    assert nothing.locator(".silent").inner_text() == "no positive evidence"
    reader.press("2")
    assert dog.locator("canvas").first.is_visible()
    assert not dog.locator(".silent").is_visible()
    missing = reader.page.locator("article").nth(3).locator(".silent").first  # image 3 has no map of occlusion
    assert missing.inner_text() == "no occlusion map of this image"


def test_opacity_0_shows_the_photo(reader):
    reader.open("#sort=key&size=256")
    photo, tile = ".photo .frame", ".tile.TP .frame"
    at_first = reader.seen(tile)
    reader.page.locator("#opacity").fill("0")
    assert reader.text("#opacity-now") == "0 %"
    bare = reader.seen(tile)
    assert np.abs(bare - reader.seen(photo)).max() <= 2
    assert np.abs(at_first - bare).max() > 60
    stored = Image.open(reader.folder / "photos" / "00000.jpg")
    enlarged = np.asarray(stored.resize((256, 192), Image.Resampling.BILINEAR))[4:-4, 4:-4].astype(int)
    assert np.abs(enlarged - bare[: len(enlarged)]).mean() < 6
    reader.page.locator("#opacity").fill("100")
    assert np.abs(reader.seen(tile) - bare).max() > np.abs(at_first - bare).max()


def test_own_scales_are_marked_and_have_their_numbers(reader):
    reader.open("#sort=key")
    shared = reader.text(".card .scale")
    assert shared.endswith("6 labels, one scale")
    assert not reader.page.locator("#alone-warning").is_visible()
    reader.page.locator("#alone").check()
    assert reader.page.locator("#alone-warning").is_visible()
    assert "cannot be compared" in reader.text("#alone-warning")
    assert not reader.page.locator(".card .scale").first.is_visible()
    own = shared_limit(explained(0).maps["cam"][:1])
    assert reader.text(".tile.TP .key") == f"0 {number(own)}"
    assert reader.press("s").text(".card .scale") == shared


def test_the_keyboard_turns_pages(reader):
    reader.open()
    reader.press("ArrowRight")
    assert reader.keys() == BY_LOSS[12:24]
    assert reader.text("#page") == "Page 2 of 3"
    assert reader.page.locator("#status").inner_text() == "Page 2 of 3: images 13 to 24 of 30"
    reader.press("ArrowRight").press("ArrowRight")
    assert reader.keys() == BY_LOSS[24:]
    assert reader.page.locator("#next").is_disabled()
    reader.press("ArrowLeft")
    assert reader.keys() == BY_LOSS[12:24]
    # Page Down scrolls as ever, and turns the page at the end of it.
    reader.page.evaluate("scrollTo(0, 0)")
    # Whether the browser then scrolls is its own affair, and late or lost when all cores are busy: it is not kept from it.
    down = "new KeyboardEvent('keydown', {key: 'PageDown', bubbles: true, cancelable: true})"
    assert reader.page.evaluate(f"document.body.dispatchEvent({down})")
    assert reader.keys() == BY_LOSS[12:24]
    reader.page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    reader.press("PageDown")
    assert reader.keys() == BY_LOSS[24:]
    reader.page.evaluate("scrollTo(0, 0)")
    reader.press("PageUp")
    assert reader.keys() == BY_LOSS[12:24]
    assert reader.page.locator("#help").is_visible()
    assert "Page Down" in reader.text("#help")


def test_everything_works_without_a_mouse(reader):
    reader.open()
    reached = []
    for _ in range(60):
        reader.page.keyboard.press("Tab")
        reached.append(reader.page.evaluate("document.activeElement.id || document.activeElement.value"))
        outline = reader.page.evaluate(
            "[document.activeElement, document.activeElement.parentElement].map(e => getComputedStyle(e).outlineStyle)"
        )
        assert "solid" in outline, reached
        if reached[-1] == "next":
            break
    wanted = [
        "method",
        "label",
        "FN",
        "FP",
        "TP",
        "TN",
        "unknown",
        "sort",
        "opacity",
        "alone",
        "against",
        "areas",
        "size",
        "many",
        "find",
        "next",
    ]
    assert [name for name in reached if name] == wanted
    reader.press("Enter")
    assert reader.text("#page") == "Page 2 of 3"
    reader.page.locator("#opacity").focus()
    reader.press("ArrowLeft")  # moves the slider, not the page
    assert reader.text("#opacity-now") == "75 %"
    assert reader.text("#page") == "Page 2 of 3"
    reader.page.locator("#find").focus()
    reader.press("2")
    assert reader.page.locator("#method").input_value() == "0"  # a letter of the key, not a method
    assert reader.page.locator("#find").input_value() == "2"


def test_the_address_holds_the_view_and_back_goes_back(reader):
    reader.open()
    reader.choose("label", "0").choose("sort", "-score").choose("method", "1").choose("many", "6")
    reader.tick("TP").press("]")
    reader.page.locator("#alone").check()
    reader.page.locator("h1").click()
    reader.press("ArrowRight")
    address, keys, tiles = reader.page.evaluate("location.hash"), reader.keys(), reader.tiles()
    reader.open(address)
    assert (reader.keys(), reader.tiles()) == (keys, tiles)
    assert reader.page.locator("#method").input_value() == "1"
    assert reader.page.locator("#alone").is_checked()
    assert reader.text("#opacity-now") == "90 %"
    assert reader.text("#page").startswith("Page 2 of")
    reader.press("ArrowRight")
    assert reader.text("#page").startswith("Page 3 of")
    reader.page.go_back()
    reader.wait("document.querySelector('#page').textContent.startsWith('Page 2')")
    assert reader.settle().keys() == keys
    reader.open("#method=nonsense&label=99&page=-4&opacity=x&outcomes=&size=1&page=1e9")
    assert reader.page.locator("#method").input_value() == "0"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1366, 2200])
def test_no_width_needs_sideways_scrolling_and_words_stay_readable(reader, width, scheme):
    reader.page.emulate_media(color_scheme=scheme)
    reader.page.set_viewport_size({"width": width, "height": 768})
    reader.open()
    assert reader.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    colours = "e => [getComputedStyle(e).color, getComputedStyle(e.closest('.card')).backgroundColor]"
    for selector in (".name", ".more", "h2", ".loss"):
        ink, paper = reader.page.locator(f".card {selector}").first.evaluate(colours)
        assert contrast(ink, paper) >= 4.5, selector
    for outcome in ("TP", "FP", "FN", "TN"):
        badge = "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
        assert contrast(*reader.page.locator(f".{outcome} .badge").first.evaluate(badge)) >= 4.5, outcome


def contrast(first, second):
    """WCAG's contrast ratio of two CSS colours."""

    def luminance(colour):
        parts = np.array([int(value) for value in re.findall(r"\d+", colour)[:3]]) / 255
        parts = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return parts @ np.array([0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_images_without_ground_truth_are_sorted_by_score_and_count_no_outcomes(reader, tmp_path):
    unjudged = [replace(explained(n), targets=np.full(5, NAN, np.float32), loss=NAN) for n in range(3)]
    write_report(tmp_path / "out", data(unjudged))
    page = reader.page.context.browser.new_page()
    folder = Reader(page, tmp_path / "out").open()
    assert page.locator("#classes-head th").all_text_contents() == ["class", "explained"]
    assert [row[0] for row in page.locator("#classes-body tr").all_text_contents()]  # the classes are still there
    assert page.locator("#sort option").first.get_attribute("value") == "score"
    assert not page.locator("#outcomes").is_visible()
    first_scores = [0.6 + 0.01 * ((7 * n) % NUM_IMAGES) for n in range(3)]
    by_score = sorted(range(3), key=lambda n: -first_scores[n])
    assert folder.choose("label", "0").keys() == [key_of(n) for n in by_score] != [key_of(n) for n in range(3)]
    page.close()


def test_a_missing_file_is_said_and_the_rest_stays(reader, tmp_path):
    write_report(tmp_path / "out", data([explained(n) for n in range(3)]))
    (tmp_path / "out" / "data" / "00001.js").unlink()
    page = reader.page.context.browser.new_page()
    Reader(page, tmp_path / "out").open("#sort=key")
    assert "data/00001.js is missing or damaged" in page.locator("article").nth(1).inner_text()
    assert page.locator("article").nth(2).locator("canvas:visible").count() > 1
    page.close()
