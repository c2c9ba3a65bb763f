import pytest
import torch

from mlvision.errors import InputError
from mlvision.label_maps import pool_label_map
from mlvision.label_maps.geometry import boxes_in_image
from mlvision.label_maps.mix import Mix, MixConfig, draw_mix
from mlvision.types import CropBox, LabelMap

H, W = 12, 20
SIZE = (H, W)


def make_maps(num=2, classes=6, grid=(6, 10), seed=0):
    return LabelMap(torch.rand(num, classes, *grid, generator=torch.Generator().manual_seed(seed)).double())


def pool_of(label_map, operator="mean_probability"):
    num_classes = label_map.values.shape[1]
    return lambda view, hole: pool_label_map(label_map, view, num_classes, operator=operator, hole=hole)


def whole(num=2):
    return CropBox(torch.tensor([[0.0, 0, 1, 1]]).double().repeat(num, 1))


# Images


def test_cutmix_pastes_the_partner():
    images = torch.randint(256, (4, 3, H, W), dtype=torch.uint8)
    before = images.clone()
    mixed = Mix(MixConfig(cutmix=1.0), 0.5, (4, 2, 15, 9)).images(images)
    assert torch.equal(images, before)
    patch = torch.zeros(H, W, dtype=torch.bool)
    patch[2:9, 4:15] = True
    assert torch.equal(mixed, torch.where(patch, images[[3, 2, 1, 0]], images))


def test_mixup_is_the_weighted_mean():
    images = torch.randint(256, (3, 3, H, W), dtype=torch.uint8)
    mixed = Mix(MixConfig(mixup=1.0), 0.25, None).images(images)
    torch.testing.assert_close(mixed, (0.25 * images + 0.75 * images.flip(0)) / 255)


# Targets


@pytest.mark.parametrize("patch", [(4, 2, 14, 8), (0, 0, 6, 12), (10, 6, 20, 12)])
def test_exact_targets_are_those_of_the_composed_map(patch):
    """Two whole images mixed along cell borders: pooling the map that is composed as the image is."""
    label_map, (x1, y1, x2, y2) = make_maps(), patch
    share = 1 - (x2 - x1) * (y2 - y1) / (W * H)
    mix = Mix(MixConfig(cutmix=1.0, union=False), share, patch)
    composed = label_map.values.clone()
    rows, columns = slice(y1 // 2, y2 // 2), slice(x1 // 2, x2 // 2)
    composed[:, :, rows, columns] = label_map.values.flip(0)[:, :, rows, columns]
    found = mix.targets(pool_of(label_map), whole(), SIZE, ())
    torch.testing.assert_close(found, composed.mean((2, 3)))
    # and with the maximum, united as sigmoids are
    found = Mix(MixConfig(cutmix=1.0), share, patch).targets(pool_of(label_map, "max"), whole(), SIZE, ())
    hidden = torch.zeros(6, 10, dtype=torch.bool)
    hidden[rows, columns] = True
    own = label_map.values.masked_fill(hidden, 0).amax((2, 3))
    other = label_map.values.masked_fill(~hidden, 0).amax((2, 3)).flip(0)
    torch.testing.assert_close(found, 1 - (1 - own) * (1 - other))


def test_a_label_under_the_patch_is_gone():
    values = torch.zeros(2, 2, 6, 10).double()
    values[0, 0, 3, 7] = 1  # image 0 has class 0 where the patch goes, image 1 has class 1 elsewhere
    values[1, 1, 0, 0] = 1
    mix = Mix(MixConfig(cutmix=1.0), 0.75, (10, 4, 20, 10))
    exact = mix.targets(pool_of(LabelMap(values), "max"), whole(), SIZE, ())
    assert exact.tolist() == [[0, 0], [1, 1]]
    linear = Mix(MixConfig(cutmix=1.0, targets="linear"), 0.75, (10, 4, 20, 10))
    assert linear.targets(pool_of(LabelMap(values), "max"), whole(), SIZE, ()).tolist() == [
        [0.75, 0.25],
        [0.25, 0.75],
    ]


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_patch_of_a_view_is_found_in_the_image(turns, flipped):
    """By pixels: each pixel of an image holds its own place, the view is cut, flipped and turned, the patch read off."""
    side = 40
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    x1, y1, x2, y2 = 4, 12, 24, 32
    view = places[:, y1:y2, x1:x2]
    view = (view.flip(-1) if flipped else view).rot90(turns, (-2, -1))
    patch = view[:, 3:8, 6:17]
    crop = CropBox(torch.tensor([[x1, y1, x2, y2]]) / side, torch.tensor([flipped]), torch.tensor([turns]))
    found = boxes_in_image(torch.tensor([[6, 3, 17, 8]]) / 20, crop)[0] * side
    expected = [patch[1].min(), patch[0].min(), patch[1].max() + 1, patch[0].max() + 1]
    torch.testing.assert_close(found, torch.stack(expected).float())


def test_nothing_and_everything_covered():
    label_map = make_maps()
    pool = pool_of(label_map)
    none = Mix(MixConfig(cutmix=1.0), 1.0, (5, 5, 5, 5)).targets(pool, whole(), SIZE, ())
    torch.testing.assert_close(none, label_map.values.mean((2, 3)))
    everything = Mix(MixConfig(cutmix=1.0), 0.0, (0, 0, W, H)).targets(pool, whole(), SIZE, ())
    torch.testing.assert_close(everything, label_map.values.mean((2, 3)).flip(0))


def test_mixup_targets_are_linear():
    label_map = make_maps()
    found = Mix(MixConfig(mixup=1.0), 0.3, None).targets(pool_of(label_map), whole(), SIZE, ())
    mean = label_map.values.mean((2, 3))
    torch.testing.assert_close(found, 0.3 * mean + 0.7 * mean.flip(0))


# Drawing


def test_the_share_is_the_area_that_is_left():
    torch.manual_seed(0)
    shares = []
    for _ in range(400):
        mix = draw_mix(MixConfig(cutmix=1.0), SIZE)
        x1, y1, x2, y2 = mix.patch
        assert 0 <= x1 <= x2 <= W
        assert 0 <= y1 <= y2 <= H
        assert mix.share == pytest.approx(1 - (x2 - x1) * (y2 - y1) / (W * H))
        shares.append(mix.share)
    assert 0.5 < sum(shares) / len(shares) < 0.8  # Beta(1, 1), and patches that are cut at the border


def test_steps_follow_their_probabilities():
    torch.manual_seed(0)
    assert draw_mix(MixConfig(), SIZE) is None
    drawn = [draw_mix(MixConfig(cutmix=1.0, mixup=0.4, probability=0.5), SIZE) for _ in range(600)]
    assert 0.4 < sum(m is None for m in drawn) / 600 < 0.6
    assert 0.2 < sum(m is not None and m.patch is None for m in drawn) / 600 < 0.3


def test_the_global_generator_decides():
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append([draw_mix(MixConfig(cutmix=1.0), SIZE) for _ in range(5)])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("option", "value"),
    [("cutmix", -1.0), ("mixup", -0.1), ("probability", 1.5), ("targets", "soft"), ("until_epoch", -1)],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(InputError, match=rf"^method\.mix\.{option}: expected "):
        MixConfig(**{option: value})


def test_two_distributions_stay_one():
    """A softmax's targets are averaged by area whatever `union` says, which is of labels that do not exclude each other."""
    label_map = make_maps()
    patch, share = (4, 2, 6, 6), 1 - 8 / (W * H)
    found = Mix(MixConfig(cutmix=1.0), share, patch).targets(pool_of(label_map), whole(), SIZE, (6,))
    averaged = Mix(MixConfig(cutmix=1.0, union=False), share, patch).targets(pool_of(label_map), whole(), SIZE, ())
    torch.testing.assert_close(found, averaged)


def test_groups_are_averaged_and_classes_for_themselves_united():
    pool, patch, share = pool_of(make_maps(), "max"), (4, 2, 6, 6), 1 - 8 / (W * H)
    found = Mix(MixConfig(cutmix=1.0), share, patch).targets(pool, whole(), SIZE, (2, 1, 3))
    united, averaged = (
        Mix(MixConfig(cutmix=1.0, union=union), share, patch).targets(pool, whole(), SIZE, ())
        for union in (True, False)
    )
    alone = torch.tensor([False, False, True, False, False, False])
    torch.testing.assert_close(found, torch.where(alone, united, averaged))
    assert not torch.equal(united, averaged)


def test_what_is_unknown_of_the_hidden_part_stays_hidden():
    nan = float("nan")
    known = {True: torch.tensor([[1.0, 0, nan], [nan, nan, nan]]), False: torch.tensor([[1.0, 0, 0.5], [nan, 1, 0]])}

    def pool(view, hole):
        return known[hole is None]

    def targets(share, patch):
        return Mix(MixConfig(cutmix=1.0), share, patch).targets(pool, whole(), SIZE, ()).nan_to_num(-1).tolist()

    assert targets(1.0, (5, 5, 5, 5)) == [[1, 0, -1], [-1, -1, -1]]  # nothing of the partner is seen
    # own part (second table) with the partner's (first, reversed): a certain label stays certain
    assert targets(0.5, (0, 0, 20, 6)) == [[1, -1, -1], [1, 1, -1]]
