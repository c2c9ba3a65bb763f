"""importers.py on files written as the published code writes and reads them.

Token Labeling's `generate_label.py`: `value, indices = output.topk(5)` over the classes of a map `[h, w, C]`, then
`torch.save(torch.stack([value.half(), indices.half()]).permute(0, 3, 1, 2), <root>/<folder>/<name up to its first dot>.pt)`.
ReLabel's `get_labelmaps` scatters `[0]` to the classes `[1].long()` of a map of zeros, in float32, and its loader takes the
same path.
"""

from pathlib import PurePosixPath

import numpy as np
import pytest
import torch

from mlvision.errors import InputError
from mlvision.label_maps.importers import detect_axes, import_published, read_published
from mlvision.types import LabelMap

KEYS = ["train/n01440764/n01440764_10026.JPEG", "train/n01443537/n01443537_2.JPEG"]


def save_relabel(path, dense, k=5):
    """One file of ReLabel's tree from a map `[C, h, w]`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    order = np.argsort(-dense, axis=0, kind="stable")[:k]
    stored = np.stack([np.take_along_axis(dense, order, axis=0), order.astype(dense.dtype)])
    torch.save(torch.from_numpy(stored.astype(np.float32)), path)


def save_token_labels(path, dense, k=5):
    """One file of Token Labeling's tree from a map `[C, h, w]`, by the lines above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    value, indices = torch.from_numpy(dense).permute(1, 2, 0).topk(k)
    torch.save(torch.stack([value.half(), indices.half()]).permute(0, 3, 1, 2), path)


def dense_map(seed, num_classes=1000, grid=(15, 15)):
    """Distinct logits without symmetry, and one hot cell off the diagonal."""
    dense = np.random.default_rng(seed).normal(4, 2, (num_classes, *grid)).astype(np.float32)
    dense[207, 2, 11] = 30
    return dense


def file_of(root, key):
    folder, name = key.split("/")[-2:]
    return root / folder / f"{name.split('.')[0]}.pt"


def stored(num_cells=(3, 4), k=2, dtype=torch.float32):
    """A small tensor in the layout, to be spoilt."""
    values = torch.linspace(9.7, 1.3, k * num_cells[0] * num_cells[1]).reshape(k, *num_cells)
    ids = torch.arange(k, dtype=torch.float32)[:, None, None].expand(k, *num_cells) + 5
    return torch.stack([values, ids]).to(dtype)


@pytest.fixture
def relabel_root(tmp_path):
    for seed, key in enumerate(KEYS):
        save_relabel(file_of(tmp_path, key), dense_map(seed))
    return tmp_path


def test_relabel_files_by_hand(relabel_root):
    first, second = import_published(str(relabel_root), KEYS, 1000, axes="hw")

    assert (first.row, second.row) == (0, 1)
    assert (first.values.dtype, first.ids.dtype, first.fill.dtype) == (torch.float32, torch.int64, torch.float32)
    for seed, found in enumerate((first, second)):
        dense = torch.from_numpy(dense_map(seed))
        torch.testing.assert_close(found.values, dense.topk(5, dim=0).values, rtol=0, atol=0)
        torch.testing.assert_close(dense.gather(0, found.ids), found.values, rtol=0, atol=0)
        # The hot cell is in row 2, column 11; its mirror image is an ordinary one.
        assert (found.ids[0, 2, 11].item(), found.values[0, 2, 11].item()) == (207, 30)
        assert found.values[0, 11, 2] < 15
        assert not found.fill.any()


def test_the_other_axes_put_the_hot_cell_across_the_diagonal(relabel_root):
    hw = next(import_published(str(relabel_root), KEYS, 1000, axes="hw", fill="floor"))
    wh = next(import_published(str(relabel_root), KEYS, 1000, axes="wh", fill="floor"))

    assert (wh.ids[0, 11, 2].item(), wh.values[0, 11, 2].item()) == (207, 30)
    for a, b in zip(hw[1:], wh[1:], strict=True):
        torch.testing.assert_close(a, b.transpose(-1, -2), rtol=0, atol=0)
        assert b.is_contiguous()


def test_axes_of_a_grid_that_is_not_square(tmp_path):
    dense = dense_map(3, num_classes=300, grid=(4, 12))
    save_relabel(file_of(tmp_path, KEYS[0]), dense)

    hw = next(import_published(str(tmp_path), KEYS[:1], 300, axes="hw"))
    wh = next(import_published(str(tmp_path), KEYS[:1], 300, axes="wh"))

    assert (hw.values.shape, wh.values.shape) == ((5, 4, 12), (5, 12, 4))
    assert hw.ids[0, 2, 11] == wh.ids[0, 11, 2] == 207


def test_token_labeling_files_come_back_in_float32(tmp_path):
    dense = dense_map(4, grid=(18, 18))
    save_token_labels(file_of(tmp_path, KEYS[1]), dense)

    (found,) = import_published(str(tmp_path), KEYS[1:], 1000, axes="hw")

    assert found.values.shape == (5, 18, 18)
    assert found.values.dtype == torch.float32
    assert found.ids[0, 2, 11] == 207
    np.testing.assert_allclose(np.take_along_axis(dense, found.ids.numpy(), axis=0), found.values, rtol=1e-3)


def test_the_two_fills(tmp_path):
    dense = np.array([3.0, 2.0, -1.0, -2.0, -7.0], dtype=np.float32)[:, None, None] + np.zeros((5, 1, 2), np.float32)
    dense[:, 0, 1] += 1.5
    save_relabel(file_of(tmp_path, KEYS[0]), dense, k=3)

    zero, floor = (
        next(import_published(str(tmp_path), KEYS[:1], 5, axes="hw", fill=fill)).fill for fill in ("zero", "floor")
    )

    assert floor.tolist() == [[-1, 0.5]]
    # Where the least stored logit is negative, 0 would rank the classes that are not stored above it.
    assert zero.tolist() == [[-1, 0]]


def test_a_name_is_cut_at_its_first_dot_and_no_two_images_share_a_file(tmp_path):
    save_relabel(tmp_path / "cat" / "a.pt", dense_map(5))

    assert next(import_published(str(tmp_path), ["cat/a.b.jpg"], 1000, axes="hw")).row == 0
    with pytest.raises(InputError, match="cat/a.pt: is the file of two images, train/cat/a.jpg and val/cat/a.png"):
        import_published(str(tmp_path), ["train/cat/a.jpg", "val/cat/a.png"], 1000, axes="hw")


def test_missing_files_are_counted_before_any_is_read(relabel_root):
    file_of(relabel_root, KEYS[0]).write_bytes(b"never opened")
    file_of(relabel_root, KEYS[1]).unlink()

    message = f"{file_of(relabel_root, KEYS[1])}: no such file, expected one tensor .* image {KEYS[1]}; 2 of 3 files"
    with pytest.raises(InputError, match=message):
        import_published(str(relabel_root), [*KEYS, "n9/x.JPEG"], 1000, axes="hw")
    with pytest.raises(InputError, match="none: no such folder of published label maps"):
        import_published(str(relabel_root / "none"), KEYS, 1000, axes="hw")
    with pytest.raises(InputError, match="n9/x.pt: no such file, expected one tensor"):
        read_published(str(relabel_root / "n9" / "x.pt"), 1000)


def test_options_are_demanded(relabel_root):
    with pytest.raises(InputError, match="axes: expected hw .rows first. or wh, got 'auto'; .*reference="):
        import_published(str(relabel_root), KEYS, 1000, axes="auto")
    with pytest.raises(InputError, match="fill: expected one of zero, floor, got 'least'"):
        import_published(str(relabel_root), KEYS, 1000, axes="hw", fill="least")


def test_all_maps_of_a_tree_have_one_shape(relabel_root):
    save_relabel(file_of(relabel_root, KEYS[1]), dense_map(0, grid=(12, 14)))

    with pytest.raises(InputError, match="n01443537_2.pt: holds maps .5, 12, 14., .*10026.pt has .5, 15, 15."):
        list(import_published(str(relabel_root), KEYS, 1000, axes="hw"))


def change(index, value, dtype=torch.float32):
    tensor = stored(dtype=dtype)
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"map": stored()}, "holds a dict, expected one tensor .2, K, h, w. .logits at 0, class ids at 1."),
        ([stored()], "holds a list, expected one tensor"),
        (stored()[0], "holds .2, 3, 4., expected .2, K, h, w."),
        (stored()[None], "holds .1, 2, 2, 3, 4., expected .2, K, h, w."),
        (torch.cat([stored(), stored()[:1]]), "holds .3, 2, 3, 4., expected .* third slice .* crop's coordinates"),
        (stored()[:1], "holds .1, 2, 3, 4., expected .2, K, h, w."),
        (stored()[:, :, :0], "holds .2, 2, 0, 4., expected .2, K, h, w."),
        (stored().long(), "holds torch.int64, expected torch.float32 or torch.float16"),
        (stored().bfloat16(), "holds torch.bfloat16, expected"),
        (change((0, 1, 2, 3), torch.nan), "1 of its 48 numbers are NaN or infinite"),
        (change((0, 0, 1), torch.inf), "4 of its 48 numbers are NaN or infinite"),
        (change((1, 1, 2, 3), 6.5), "slice 1 cannot be the class ids, it has 6.5, which is not whole$"),
        (change((1, 1, 2, 3), 3000), "slice 1 cannot be the class ids, it has 3000, expected 0 to 2999$"),
        (change((1, 1, 2, 3), -1), "slice 1 cannot be the class ids, it has -1, expected 0 to 2999$"),
        (change((1, 1, 2, 3), 5), "slice 1 cannot be the class ids, class 5 occurs twice in one cell$"),
        (change((1, 1, 2, 3), 2050, torch.float16), "it has 2050 in float16, which is exact up to 2047 only$"),
        (change((1, 1, 2, 3), 2048, torch.float16), "it has 2048 in float16, which is exact up to 2047 only$"),
        (
            stored().flip(0),
            "slice 1 cannot be the class ids, it has 9.7, which is not whole; slice 0 can: ids at 0: class 5 has 9.7 "
            "in the first cell, the reverse of the published layout",
        ),
        (
            torch.stack([torch.full((1, 2, 3), 9.0), torch.full((1, 2, 3), 4.0)]),
            "ambiguous, either slice can be the class ids: ids at 1: class 4 has 9 in the first cell, or ids at 0: class 9 "
            "has 4 in the first cell",
        ),
    ],
)
def test_what_is_not_the_layout_is_refused(tmp_path, content, message):
    path = tmp_path / "n1" / "x.pt"
    path.parent.mkdir()
    torch.save(content, path)

    with pytest.raises(InputError, match=message) as caught:
        next(import_published(str(tmp_path), ["n1/x.JPEG"], 3000, axes="hw"))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_float16_ids_are_taken_as_far_as_they_are_exact(tmp_path):
    torch.save(change((1, 1, 2, 3), 2048, torch.float16), tmp_path / "exact.pt")
    torch.save(change((1, 1, 2, 3), 70_001), tmp_path / "wide.pt")

    # With 2,049 classes nothing else rounds to 2048.
    assert read_published(str(tmp_path / "exact.pt"), 2049)[1].max() == 2048
    assert read_published(str(tmp_path / "wide.pt"), 100_000)[1].max() == 70_001


def test_files_that_torch_cannot_read_safely_are_refused(tmp_path):
    torch.save(PurePosixPath("any class at all"), tmp_path / "object.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(stored(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:600])

    for name in ("object", "text", "empty", "cut"):
        with pytest.raises(InputError, match=f"{name}.pt: (holds an object of|.*was cut short)") as caught:
            read_published(str(tmp_path / f"{name}.pt"), 1000)
        assert "\n" not in str(caught.value)


# Which axis is which


def scenes_of_blobs(num_images, grid=(15, 15), num_classes=40):
    """Logits `[N, C, h, w]` of images in which three classes sit somewhere."""
    rng = np.random.default_rng(7)
    y, x = np.meshgrid((np.arange(grid[0]) + 0.5) / grid[0], (np.arange(grid[1]) + 0.5) / grid[1], indexing="ij")
    maps = rng.normal(0, 0.3, (num_images, num_classes, *grid)).astype(np.float32)
    for image in maps:
        for c in rng.choice(num_classes, 3, replace=False):
            cy, cx = rng.uniform(0, 1, 2)
            image[c] += 9 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 0.05)
    return maps


def maps_of(num_images, grid):
    return torch.from_numpy(scenes_of_blobs(num_images, grid))


def as_published(maps, k=5, fill=0.0):
    values, ids = torch.from_numpy(maps).topk(k, dim=1)
    return LabelMap(values, ids, kind="logit", fill=fill)


def transposed(maps):
    return LabelMap(maps.values.mT, maps.ids.mT, kind=maps.kind, fill=maps.fill)


@pytest.mark.parametrize("grid", [(15, 15), (9, 14)])
def test_the_axes_are_found_by_a_weaker_teacher_on_another_grid(grid):
    maps = as_published(scenes_of_blobs(24, grid))
    # The same places, coarser and noisier; as probabilities of all classes, and as the best of each cell.
    seen = torch.nn.functional.interpolate(maps_of(24, grid), size=(7, 10), mode="area")
    noise = torch.randn(seen.shape, generator=torch.Generator().manual_seed(0))
    dense = LabelMap(torch.softmax(seen + noise, dim=1), kind="probability")
    best = as_published((seen + noise).numpy(), k=3)

    for references in (dense, best):
        assert detect_axes(maps, references, 40) == "hw"
        assert detect_axes(transposed(maps), references, 40) == "wh"


def test_references_that_do_not_decide_are_refused_with_both_scores():
    maps = as_published(scenes_of_blobs(24))
    others = LabelMap(torch.from_numpy(scenes_of_blobs(24)).roll(5, dims=0), kind="logit")
    symmetric = LabelMap(maps_of(24, (15, 15)) + maps_of(24, (15, 15)).mT, kind="logit")

    for references in (others, symmetric):
        with pytest.raises(
            InputError, match="axes of the 24 .* ambiguous: hw agrees .* better in .*, wh agrees .*better"
        ):
            detect_axes(maps, references, 40)
    with pytest.raises(
        InputError, match="hw agrees 0.000 and better in 0 images, wh agrees 0.000 and better in 0 images"
    ):
        detect_axes(maps, LabelMap(torch.zeros(24, 40, 7, 7), kind="logit"), 40)


def test_few_references_never_decide():
    maps, references = as_published(scenes_of_blobs(11)), LabelMap(maps_of(11, (15, 15)), kind="logit")

    assert detect_axes(maps, references, 40) == "hw"
    few = LabelMap(maps.values[:10], maps.ids[:10], kind="logit")
    with pytest.raises(InputError, match="better in 10 images, wh .* better in 0 images; give more references"):
        detect_axes(few, LabelMap(references.values[:10], kind="logit"), 40)
    with pytest.raises(InputError, match="10 maps and 11 references: expected one for each"):
        detect_axes(few, references, 40)
