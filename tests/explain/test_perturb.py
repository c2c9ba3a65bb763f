"""Occlusion, LIME and RISE against captum, scikit-learn and linear models whose answer is known."""

import itertools
import math

import numpy as np
import pytest
import timm
import torch
from captum.attr import Occlusion as PeerOcclusion
from sklearn.linear_model import Ridge
from torch import nn

from mlvision.errors import InputError
from mlvision.explain import Subject, explain
from mlvision.explain.impute import _solve, fill_in
from mlvision.explain.perturb import (
    Segments,
    SmoothGrids,
    Windows,
    coalitions,
    coin_flips,
    perturbed_logits,
    weighted_ridge,
)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (20, 7), (17, 12), (48, 48)])
def test_occlusion_equals_captums_for_all_labels(window, stride, resnet, images):
    subject = Subject(resnet)
    ours = explain(resnet, images, "occlusion", window_px=window, stride_px=stride, baseline="black").maps
    ours = nn.functional.interpolate(ours, images.shape[2:])  # the same value all over a cell
    peer, same = (
        PeerOcclusion(subject.logits),
        subject.pixels(images),
    )  # in one memory format: kernels round differently
    for label in range(5):
        theirs = peer.attribute(same, (3, window, window), (3, stride, stride), target=label, baselines=0)[:, 0]
        assert (ours[:, label] - theirs.detach()).abs().max() <= 1e-5 * theirs.abs().max()


def test_occlusion_of_a_linear_model_is_exact(linear_model):
    """Window = stride: each region's sum of w (x - b)."""
    images = torch.rand(2, 3, 12, 18)
    found = explain(linear_model, images, "occlusion", window_px=6, stride_px=6, baseline="mean")
    base = images.mean((2, 3), keepdim=True)
    parts = torch.einsum("bchw,kchw->bkhw", images - base, linear_model.weight)
    expected = nn.functional.avg_pool2d(parts, 6) * 36
    assert (found.maps - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [(12, 18), (10, 15)])  # borders that cut windows, too
def test_coarse_to_fine_of_a_linear_model_is_exact(size):
    """Each smallest window has its own sum of w (x - b), and a large one that is not split yet its mean."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3, *size)

    class Linear(nn.Module):
        def forward(self, images):
            return torch.einsum("bchw,kchw->bk", images, weight)

    images = torch.rand(2, 3, *size)
    density = torch.einsum("bchw,kchw->bkhw", images, weight)

    def cell_means(side):
        rows, columns = (torch.arange(length) // side for length in size)
        number = rows[:, None] * 100 + columns
        means = torch.empty_like(density)
        for one in number.unique():
            means[..., number == one] = density[..., number == one].mean(-1, keepdim=True)
        return means

    options = {"window_px": 8, "finest_px": 2, "baseline": "black"}
    fine = explain(Linear(), images, "coarse_to_fine", num_samples=10_000, **options).maps
    expected = cell_means(2) * 64
    assert (nn.functional.interpolate(fine, size) - expected).abs().max() <= 1e-5 * expected.abs().max()
    coarse = explain(Linear(), images, "coarse_to_fine", num_samples=1, **options).maps
    expected = cell_means(8) * 64
    assert (nn.functional.interpolate(coarse, size) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_coarse_to_fine_asks_where_the_evidence_is():
    """Large windows, then the halves of the two that matter, and nothing beyond the number of copies."""
    asked = []

    class Spots(nn.Module):
        def forward(self, images):
            asked.append(len(images))
            return torch.stack([images[:, 0, 13, 50], images[:, 1, 40, 21]], 1)

    images = torch.full((1, 3, 48, 64), 0.5)
    images[0, 0, 13, 50] = images[0, 1, 40, 21] = 1
    found = explain(Spots(), images, "coarse_to_fine", num_samples=12 + 2 * 8, window_px=16, finest_px=4, num_splits=2)
    assert sum(asked) <= 12 + 2 * 8 + 2  # and the image itself
    maps = nn.functional.interpolate(found.maps, (48, 64))[0]
    for label, spot in enumerate(((13, 50), (40, 21))):
        peak = (maps[label] == maps[label].max()).nonzero()
        top, left = spot[0] // 4 * 4, spot[1] // 4 * 4
        assert peak.amin(0).tolist() == [top, left]
        assert peak.amax(0).tolist() == [top + 3, left + 3]


def brute_force_shapley(worth, count):
    """By the definition, over all sub-sets, in float64: worth is of a list of 0 and 1."""
    values = torch.zeros(count, dtype=torch.float64)
    for player in range(count):
        others = [other for other in range(count) if other != player]
        for size in range(count):
            share = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for chosen in itertools.combinations(others, size):
                without = [1 if one in chosen else 0 for one in range(count)]
                beside = [1 if one == player else kept for one, kept in enumerate(without)]
                values[player] += share * (worth(beside) - worth(without))
    return values


def in_a_grid(monkeypatch, segments):
    monkeypatch.setattr(
        "mlvision.explain.perturb.slic_segments", lambda pixels, *_: segments.expand(len(pixels), -1, -1)
    )


def test_kernel_shap_equals_shapley_values_by_definition(monkeypatch):
    """Parts that act together, and one that does nothing: exact where there are copies for every sub-set."""
    segments = torch.arange(6)[:, None] // 3 * 3 + torch.arange(9) // 3  # 2 x 3 of them
    in_a_grid(monkeypatch, segments)

    class Together(nn.Module):
        def forward(self, images):
            part = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 3).flatten(1)
            return torch.stack([part[:, 0] * part[:, 4] + part[:, 2], (part[:, 1] + part[:, 3] - part[:, 5]) ** 2], 1)

    image = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(1)) + 0.5
    image /= image.max()
    maps = explain(Together(), image, "kernel_shap", num_samples=64, cell_px=3, baseline="black").maps[0]
    for label in range(2):

        def worth(kept, label=label):
            shown = image.double() * torch.tensor(kept)[segments]
            return Together()(shown)[0, label].item()

        torch.testing.assert_close(maps[label].flatten().double(), brute_force_shapley(worth, 6), rtol=1e-4, atol=1e-6)


def test_drawn_coalitions_keep_the_sum_and_are_exact_for_a_linear_model(linear_model, monkeypatch):
    in_a_grid(monkeypatch, torch.arange(12)[:, None] // 4 * 3 + torch.arange(18) // 6)
    images = torch.rand(2, 3, 12, 18)
    found = explain(linear_model, images, "kernel_shap", num_samples=61, cell_px=2, baseline="black").maps
    parts = torch.einsum("bchw,kchw->bkhw", images, linear_model.weight)
    expected = nn.functional.avg_pool2d(parts, (4, 6)) * 24
    cells = nn.functional.interpolate(found, (12, 18))[:, :, ::4, ::6]
    assert (cells - expected).abs().max() <= 1e-5 * expected.abs().max()

    class Square(nn.Module):
        def forward(self, images):
            return linear_model(images).square()

    found = explain(Square(), images, "kernel_shap", num_samples=61, cell_px=2, baseline="black").maps
    total = nn.functional.interpolate(found, (12, 18))[:, :, ::4, ::6].sum((2, 3))
    torch.testing.assert_close(total, Square()(images) - Square()(images * 0), rtol=1e-4, atol=1e-3)


def test_coalitions_come_with_their_complements_and_are_of_the_kernels_sizes():
    design, weights = coalitions(torch.tensor([12, 3, 1]), 2002)
    assert design[0, :2].sum(1).tolist() == [12, 0]
    assert torch.equal(design[0, 2::2], 1 - design[0, 3::2])
    sizes = torch.arange(1, 12)
    expected = 1 / (sizes * (12 - sizes))
    counted = torch.bincount(design[0, 2:].sum(1).long(), minlength=12)[1:] / 2000
    assert (counted - expected / expected.sum()).abs().max() < 0.03
    assert weights[0].tolist() == [0, 0] + [1] * 2000
    # Of three segments every sub-set, each (3 - 1) / (3 choose s) / (s (3 - s)); of one there is none.
    assert design[1, 2:8, :3].tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1]]
    assert weights[1, 2:8].tolist() == pytest.approx([1 / 3] * 6)
    assert not weights[1, 8:].any()
    assert not weights[2].any()


def test_lime_of_a_linear_model_is_exact(linear_model, monkeypatch):
    """No ridge, a free intercept, a design of full rank: the coefficient is the region's sum of w (x - b)."""
    in_a_grid(monkeypatch, torch.arange(12)[:, None] // 4 * 3 + torch.arange(18) // 6)
    images = torch.rand(2, 3, 12, 18)
    found = explain(linear_model, images, "lime", ridge=0.0, num_samples=60, cell_px=2, baseline="black")
    parts = torch.einsum("bchw,kchw->bkhw", images, linear_model.weight)
    expected = nn.functional.avg_pool2d(parts, (4, 6)) * 24
    cells = nn.functional.interpolate(found.maps, (12, 18))[:, :, ::4, ::6]
    assert (cells - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_the_ridge_equals_scikit_learns_for_every_label(penalty):
    noise = torch.Generator().manual_seed(0)
    design = (torch.rand(2, 40, 7, generator=noise) < 0.5).float()
    weights, values = torch.rand(2, 40, generator=noise), torch.randn(2, 40, 3, generator=noise)
    ours = weighted_ridge(design, weights, values, penalty)
    for image in range(2):
        for label in range(3):
            peer = Ridge(alpha=penalty).fit(design[image], values[image, :, label], sample_weight=weights[image])
            np.testing.assert_allclose(ours[image, :, label], peer.coef_, rtol=1e-5, atol=1e-7)


def test_segments_that_an_image_lacks_do_not_matter():
    segments = torch.zeros(2, 4, 6, dtype=torch.long)
    segments[0, :, 2:4], segments[0, :, 4:], segments[1, 2:] = 1, 2, 1
    masks = Segments(segments, coin_flips(torch.tensor([3, 2]), 16), cell_px=2)
    assert not masks.design[1, :, 2].any()
    every = torch.arange(16)
    kept = masks.keep(torch.ones(16, dtype=torch.long), every)
    assert torch.equal(kept[:, 0, 0], masks.design[1, :, 0])
    assert torch.equal(kept[:, 3, 5], masks.design[1, :, 1])
    assert masks.members[0, :, 0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert masks.design[:, 0].sum(1).tolist() == [3, 2]  # the first copy is the image itself


def test_windows_are_cut_at_the_border_and_their_cells_hold_all_lines():
    masks = Windows((10, 14), window=4, stride=4, device=torch.device("cpu"))
    assert masks.num == 3 * 4
    kept = masks.keep(torch.zeros(12, dtype=torch.long), torch.arange(12))
    assert kept[11].nonzero().tolist() == [[y, x] for y in range(10) for x in range(14) if not (y >= 8 and x >= 12)]
    drops = torch.randn(2, 12, 3)
    folded = masks.fold(drops)
    assert folded.shape == (2, 3, 5, 7)
    hidden = 1 - kept
    expected = torch.einsum("bml,mhw->blhw", drops, hidden) / hidden.sum(0)
    torch.testing.assert_close(nn.functional.interpolate(folded, (10, 14)), expected)


def test_rise_masks_have_the_asked_mean_and_are_smooth():
    masks = SmoothGrids((30, 45), 300, 5, 0.3, 3, torch.device("cpu"))
    kept = masks.keep(torch.zeros(300, dtype=torch.long), torch.arange(300))
    assert kept.shape == (300, 30, 45)
    assert abs(kept.mean().item() - 0.3) < 0.02
    assert kept.diff(dim=1).abs().max() <= 1 / 6 + 1e-5  # a cell is 6 rows high
    torch.testing.assert_close(masks.cells, nn.functional.avg_pool2d(kept, 3))


class BrightCorner(nn.Module):
    """Class 0 is the brightness of the bottom left quarter, class 1 of the top right one."""

    def forward(self, images):
        height, width = images.shape[2] // 2, images.shape[3] // 2
        return 10 * torch.stack(
            [images[:, :, height:, :width].mean((1, 2, 3)), images[:, :, :height, width:].mean((1, 2, 3))], 1
        )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("occlusion", {}),
        ("coarse_to_fine", {}),
        ("lime", {"num_samples": 300}),
        ("kernel_shap", {"num_samples": 300}),
        ("rise", {"num_samples": 800}),
    ],
)
def test_the_evidence_is_where_it_is(method, options):
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.7
    maps = explain(BrightCorner(), image, method, baseline="black", **options).maps[0]
    for label, (rows, columns) in enumerate(((slice(1, None), slice(1)), (slice(1), slice(1, None)))):
        quarters = nn.functional.adaptive_avg_pool2d(maps[label][None], 2)[0]
        inside = quarters[rows, columns].item()
        assert inside > 2 * max(q for q in quarters.flatten().tolist() if q != inside)


def test_batches_of_any_size_give_the_same_answers(resnet, images):
    subject = Subject(resnet)
    masks = Windows((48, 80), 24, 12, torch.device("cpu"))
    one, many = (perturbed_logits(subject, images, masks, batch_size=n) for n in (1, 64))
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)
    assert one.shape == (2, masks.num, 5)


def test_too_large_a_batch_is_halved(images):
    sizes = []

    class Small(nn.Module):
        def forward(self, images):
            sizes.append(len(images))
            if len(images) > 3:
                raise torch.OutOfMemoryError("too much")
            return images.mean((2, 3))

    masks = Windows((48, 80), 24, 24, torch.device("cpu"))
    answers = perturbed_logits(Subject(Small()), images, masks, batch_size=8)
    assert max(sizes[2:]) == 2
    whole = perturbed_logits(Subject(Small()), images, masks, batch_size=1)
    torch.testing.assert_close(answers, whole)


def test_bf16_copies_agree(resnet, images):
    exact, half = (explain(resnet, images, "occlusion", precision=p).maps for p in ("fp32", "bf16"))
    assert np.corrcoef(exact.flatten(), half.flatten())[0, 1] > 0.98


# What hidden pixels become


def test_baselines_keep_what_is_kept():
    images = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(2, 20, 30)
    keep[0, 5:9, 3:12] = 0
    hidden = keep[0] == 0
    for baseline in ("black", "mean", "blur", "impute"):
        copies = fill_in(images, baseline)(torch.tensor([1, 0]), keep.flip(0))
        torch.testing.assert_close(copies[0], images[1])
        torch.testing.assert_close(copies[1][:, ~hidden], images[0][:, ~hidden])
        assert (copies[1] - images[0])[:, hidden].abs().mean() > 0.05
    assert not fill_in(images, "black")(torch.tensor([0]), keep[:1])[0][:, hidden].any()
    mean = fill_in(images, "mean")(torch.tensor([0]), keep[:1])[0][:, hidden]
    torch.testing.assert_close(mean, images[0].mean((1, 2))[:, None].expand_as(mean))


def test_imputed_pixels_are_the_means_of_their_neighbours():
    rng = np.random.default_rng(0)
    image, hidden = rng.random((3, 9, 12)), rng.random((9, 12)) < 0.4
    hidden[0, 0] = True
    filled = image.copy()
    filled[:, hidden] = _solve(image, hidden)
    for y, x in np.argwhere(hidden):
        total, weights = np.zeros(3), 0.0
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if (dy or dx) and 0 <= y + dy < 9 and 0 <= x + dx < 12:
                    weight = 1 / 6 if not (dy and dx) else 1 / 12
                    total, weights = total + weight * filled[:, y + dy, x + dx], weights + weight
        np.testing.assert_allclose(filled[:, y, x], total / weights, atol=1e-10)
    np.testing.assert_array_equal(filled[:, ~hidden], image[:, ~hidden])


def test_an_image_without_a_pixel_left_is_imputed_with_its_mean():
    image = np.random.default_rng(0).random((3, 4, 6))
    np.testing.assert_allclose(_solve(image, np.ones((4, 6), dtype=bool)), image.mean((1, 2))[:, None].repeat(24, 1))


def test_dropped_tokens_equal_a_vit_that_is_given_the_rest(vit, images):
    """One window of a patch: the answer is that of the tokens without it."""
    found = explain(vit, images, "occlusion", window_px=16, stride_px=16, baseline="drop")
    assert found.maps.shape[2:] == (3, 5)
    subject = Subject(vit)
    tokens = vit._pos_embed(vit.patch_embed(subject.normalise(images)))
    with torch.no_grad():
        whole = vit(subject.normalise(images))
        for row, column in ((0, 3), (2, 1)):
            left = [i for i in range(tokens.shape[1]) if i != 1 + row * 5 + column]
            logits = vit.forward_head(vit.norm(vit.blocks(tokens[:, left])))
            torch.testing.assert_close(found.maps[:, :, row, column], whole - logits, rtol=1e-3, atol=1e-4)


def test_masks_of_different_size_drop_different_numbers_of_tokens(vit, images):
    found = explain(vit, images, "occlusion", window_px=32, stride_px=32, baseline="drop", batch_size=16)
    one = explain(vit, images, "occlusion", window_px=32, stride_px=32, baseline="drop", batch_size=1)
    torch.testing.assert_close(found.maps, one.maps, rtol=1e-3, atol=1e-4)


def test_token_dropping_needs_a_vit(resnet, images):
    with pytest.raises(InputError, match="leaves out the tokens of a ViT"):
        explain(resnet, images, "occlusion", baseline="drop")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("occlusion", {"baseline": "white"}, "baseline: expected one of black, mean, blur, impute, drop, got 'white'"),
        ("occlusion", {"window_px": 4, "stride_px": 5}, "stride_px: expected 0 to window_px"),
        ("occlusion", {"stride_px": 30}, "stride_px: expected at most the window of 12"),
        ("occlusion", {"window_px": 200, "stride_px": 80}, "stride_px: expected at most the window of 48"),
        ("occlusion", {"window_px": "wide"}, "occlusion.window_px: expected whole number, got 'wide'"),
        ("lime", {"num_samples": 10.5}, "lime.num_samples: expected whole number, got 10.5"),
        ("lime", {"num_samples": True}, "lime.num_samples: expected whole number, got True"),
        ("lime", {"ridge": "much"}, "lime.ridge: expected number, got 'much'"),
        ("lime", {"baseline": 0}, "lime.baseline: expected text, got 0"),
        ("lime", {"num_samples": 1}, "num_samples: expected 2 to 100000"),
        ("lime", {"ridge": -1.0}, "ridge"),
        ("lime", {"compactness": 0.0}, "compactness: expected more than 0"),
        ("rise", {"share": 1.0}, "share"),
        ("kernel_shap", {"num_samples": 3}, "num_samples"),
        ("coarse_to_fine", {"num_splits": 0}, "num_splits"),
        ("rise", {"precision": "int8"}, "precision"),
    ],
)
def test_options_out_of_range_are_refused(method, options, message, resnet, images):
    with pytest.raises(InputError, match=message):
        explain(resnet, images, method, **options)


def test_memory_does_not_grow_with_the_labels():
    """The peak beyond the result itself is the same for 2 and for 64 labels."""

    def peak(num_classes: int) -> int:
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", num_classes=num_classes).eval()
        subject, image = Subject(model), torch.rand(1, 3, 96, 96)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            explain(subject, image, "occlusion", window_px=48, stride_px=24, batch_size=1)
        changes = sorted(
            (e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
        )
        return int(np.cumsum([size for _, size in changes]).max())

    few, many = peak(2), peak(64)
    assert many - few < 96 * 96 * 4  # less than one map of pixels, let alone 62
