import math

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import explanation_reference as reference
from scipy import stats

from mlvision.errors import InputError
from mlvision.metrics import entropy, gini, map_discrimination, max_sensitivity, png_bytes, spearman

NAN = math.nan
GRIDS = [(1, 1), (3, 7), (7, 3), (1, 6)]
PER_MAP = [gini, entropy, png_bytes]
every_grid = pytest.mark.parametrize("grid", GRIDS)
seeds = st.integers(0, 2**32 - 1)
levels = st.sampled_from([None, 1, 2, 3])


def random_maps(seed, shape, levels=None):
    """Maps of both signs; with levels, cells tie, and some maps are flat or 0."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=shape) if levels is None else rng.integers(-1, levels, shape).astype(np.float64)
    maps.flags.writeable = False  # whoever writes to it raises
    return maps


@every_grid
@given(seed=seeds, levels=levels)
def test_simplicity_matches_the_definition(grid, seed, levels):
    maps = random_maps(seed, (4, *grid), levels)
    np.testing.assert_allclose(gini(maps), [reference.gini(plane) for plane in maps], rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(entropy(maps), [reference.entropy(plane) for plane in maps], rtol=1e-9, atol=1e-14)


def test_simplicity_by_hand():
    maps = np.array([[[1.0, -3.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, -7.0]], [[2.0, -2.0], [2.0, 2.0]]])
    # |map| ascending 0, 0, 1, 3: (1 * 1 + 3 * 3) / (4 * 4) by the weights -3, -1, 1, 3.
    np.testing.assert_allclose(gini(maps), [10 / 16, 3 / 4, 0], rtol=1e-15)
    shares = -(1 / 4 * math.log(1 / 4) + 3 / 4 * math.log(3 / 4)) / math.log(4)
    np.testing.assert_allclose(entropy(maps), [shares, 0, 1], rtol=1e-15)
    assert not np.signbit(entropy(maps)).any()


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_only_the_pattern_of_sizes_counts(seed, scale):
    maps = random_maps(seed, (3, 3, 5))
    shuffled = np.random.default_rng(seed).permutation(maps.reshape(3, -1), axis=1).reshape(3, 5, 3)
    for measure in (gini, entropy):
        np.testing.assert_allclose(measure(-scale * shuffled), measure(maps), rtol=1e-9)


def test_extreme_scales_do_not_overflow():
    maps = np.array([[[1.0, 3.0]], [[1.0, 3.0]]]) * np.array([1e308 / 3, 1e-308])[:, None, None]
    np.testing.assert_allclose(gini(maps), 1 / 4, rtol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("measure", PER_MAP)
def test_a_map_of_zeros_has_no_simplicity(measure):
    maps = np.zeros((3, 2, 3))
    maps[1, 0, 2] = -1
    np.testing.assert_array_equal(np.isnan(measure(maps)), [True, False, True])
    assert len(measure(maps[:0])) == 0


@pytest.mark.filterwarnings("error")
def test_a_single_cell_is_neither_simple_nor_complex():
    maps = np.full((2, 1, 1), -3.0)
    assert gini(maps).tolist() == [0, 0]
    assert np.isnan(entropy(maps)).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_png_matches_the_definition(seed):
    # Sides that divide 224 and a highest |value| of 2 ** 7: every grey level is exact before it is rounded.
    maps = np.random.default_rng(seed).integers(-127, 128, (1, 7, 14)).astype(np.float64)
    maps[0, 5, 2] = -128
    maps.flags.writeable = False
    assert png_bytes(maps)[0] == reference.png_bytes(maps[0])


def test_png_of_one_sign_keeps_zero_in_the_middle():
    # Stretched to all grey levels from its minimum to its maximum, the ramp would have twice as many of them.
    maps = np.array([[[0.0, 128, 16, 64, 8, 2, 96]]])
    assert png_bytes(maps)[0] == reference.png_bytes(maps[0])
    assert png_bytes(maps)[0] < png_bytes(maps - 64)[0]


def test_png_sizes_follow_complexity():
    rng = np.random.default_rng(0)
    flat, noise = np.ones((1, 56, 56)), rng.normal(size=(1, 56, 56))
    blob = np.exp(-((np.arange(56) - 20.0) ** 2) / 100)[None, :, None] * np.ones(56)
    assert 0 < png_bytes(flat)[0] < png_bytes(blob)[0] < png_bytes(noise)[0]
    np.testing.assert_array_equal(png_bytes(4 * noise), png_bytes(noise))
    # Larger than the file, at an uneven factor: averaged down, not sampled.
    large = np.kron(noise, np.ones((1, 8, 8))) + 5 * np.indices((448, 448)).sum(axis=0) % 2
    assert png_bytes(large)[0] < png_bytes(rng.normal(size=(1, 448, 448)))[0]


@every_grid
@given(seed=seeds, levels=levels)
def test_rank_correlation_matches_the_definition(grid, seed, levels):
    a, b = random_maps(seed, (2, 4, *grid), levels)
    expected = [reference.spearman(*pair) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), expected, rtol=0, atol=1e-12)
    assert map_discrimination(a) == pytest.approx(reference.map_discrimination(a), abs=1e-12, nan_ok=True)


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
@given(seed=seeds, levels=levels)
def test_rank_correlation_agrees_with_scipy(seed, levels):
    a, b = random_maps(seed, (2, 5, 4, 6), levels)
    expected = [stats.spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), expected, rtol=0, atol=1e-12)


def test_rank_correlation_by_hand():
    rising = np.array([[[1.0, 2.0, 3.0, 4.0]]])
    # Ranks 1, 2.5, 2.5, 4 against 1 to 4: 4.5 / sqrt(4.5 * 5).
    tied = np.array([[[-9.0, 0.0, 0.0, 0.5]]])
    assert spearman(rising, tied)[0] == pytest.approx(math.sqrt(4.5 / 5), rel=1e-15)
    assert spearman(rising, np.exp(rising))[0] == 1
    assert spearman(rising, -rising)[0] == -1


def test_cells_are_compared_place_by_place():
    hot = np.zeros((2, 3, 5))
    hot[0, 2, 1] = hot[1, 1, 2] = 1
    assert spearman(hot[:1], hot[:1])[0] == pytest.approx(1, abs=1e-15)
    # Ranks of two maps with one hot cell each of 15: -1 / (cells - 1).
    assert spearman(hot[:1], hot[1:])[0] == pytest.approx(-1 / 14, rel=1e-12)


def test_flat_maps_have_no_rank_correlation_and_touch_no_neighbour():
    flat, rising = np.full((2, 3), 0.1), np.arange(6.0).reshape(2, 3)
    a, b = np.stack([flat, rising, rising, flat]), np.stack([rising, flat, rising, flat])
    np.testing.assert_array_equal(np.isnan(spearman(a, b)), [True, True, False, True])
    assert spearman(a, b)[2] == pytest.approx(1, abs=1e-15)


def test_discrimination_by_hand():
    rising = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert map_discrimination(np.stack([rising, 3 * rising + 1])) == pytest.approx(0, abs=1e-15)
    assert map_discrimination(np.stack([rising, -rising])) == pytest.approx(2, abs=1e-15)
    # Pairs: 1, -1, -1.
    three = np.stack([rising, rising**3, -rising])
    assert map_discrimination(three) == pytest.approx(1 + 1 / 3, rel=1e-14)
    with_flat = np.concatenate([three, np.ones((2, 2, 2))])
    assert map_discrimination(with_flat) == map_discrimination(three)


@pytest.mark.filterwarnings("error")
def test_discrimination_needs_two_maps_that_are_not_flat():
    rising, flat = np.arange(6.0).reshape(1, 2, 3), np.ones((3, 2, 3))
    assert math.isnan(map_discrimination(rising))
    assert math.isnan(map_discrimination(rising[:0]))
    assert math.isnan(map_discrimination(np.concatenate([rising, flat])))


@every_grid
@given(seed=seeds, samples=st.integers(1, 4), levels=levels)
def test_sensitivity_matches_the_definition(grid, seed, samples, levels):
    maps, *perturbed = random_maps(seed, (1 + samples, 3, *grid), levels)
    perturbed = np.stack(perturbed)
    perturbed.flags.writeable = False
    expected = [reference.max_sensitivity(maps[row], perturbed[:, row]) for row in range(3)]
    np.testing.assert_allclose(max_sensitivity(maps, perturbed), expected, rtol=1e-12)


def test_sensitivity_by_hand():
    maps = np.array([[[3.0, 4.0]], [[0.0, 0.0]], [[0.0, -2.0]]])
    perturbed = np.stack([maps + np.array([3.0, 0.0]), maps - np.array([0.0, 10.0]), maps])
    np.testing.assert_array_equal(max_sensitivity(maps, perturbed), [10 / 5, NAN, 10 / 2])
    np.testing.assert_array_equal(max_sensitivity(maps, perturbed[2:]), [0, NAN, 0])


def test_sensitivity_of_a_stub_that_returns_zeros_is_1():
    # What a harness must refuse: an explainer that is not the one the maps came from.
    maps = random_maps(0, (4, 3, 5))
    np.testing.assert_allclose(max_sensitivity(maps, np.zeros((2, 4, 3, 5))), 1, rtol=1e-15)


def test_takes_tensors_of_any_float_dtype():
    maps = random_maps(0, (3, 7, 3), levels=4)
    other = random_maps(1, (2, 3, 7, 3), levels=4)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensor, moved = (torch.from_numpy(values.copy()).to(dtype) for values in (maps, other))
        for measure in PER_MAP:
            np.testing.assert_array_equal(measure(tensor), measure(maps))
        np.testing.assert_array_equal(spearman(tensor, other[0]), spearman(maps, other[0]))
        np.testing.assert_array_equal(max_sensitivity(tensor, moved), max_sensitivity(maps, other))
        assert map_discrimination(tensor) == map_discrimination(maps)


def test_bad_maps_are_named():
    maps = np.ones((3, 2, 2))
    maps[1:, 0, 1] = [NAN, math.inf]
    for measure in (*PER_MAP, map_discrimination):
        with pytest.raises(InputError, match="maps: 2 of 3 hold NaN or infinity, the first in row 1"):
            measure(maps)
    fine = np.ones((3, 2, 2))
    with pytest.raises(InputError, match="a: 2 of 3 hold NaN"):
        spearman(maps, fine)
    with pytest.raises(InputError, match="b: 2 of 3 hold NaN"):
        spearman(fine, maps)
    with pytest.raises(InputError, match="maps: 2 of 3 hold NaN"):
        max_sensitivity(maps, fine[None])
    with pytest.raises(InputError, match=r"perturbed\[1\]: 2 of 3 hold NaN"):
        max_sensitivity(fine, np.stack([fine, maps]))
    with pytest.raises(InputError, match=r"perturbed \(0, 3, 2, 2\): expected \[n, \*\(3, 2, 2\)\] with n at least 1"):
        max_sensitivity(fine, np.ones((0, 3, 2, 2)))
    with pytest.raises(InputError, match=r"maps \(3, 0, 2\): expected \[N, h, w\] with at least one cell"):
        gini(fine[:, :0])


def test_shapes_that_do_not_fit_are_refused(monkeypatch):
    # Without the suite's own shape checker, as a user runs it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match=r"maps of shapes \(2, 2, 3\) and \(1, 2, 3\): expected one shape"):
        spearman(np.ones((2, 2, 3)), np.ones((1, 2, 3)))
    with pytest.raises(InputError, match=r"perturbed \(4, 1, 2, 3\): expected \[n, \*\(2, 2, 3\)\]"):
        max_sensitivity(np.ones((2, 2, 3)), np.ones((4, 1, 2, 3)))
    for measure in (*PER_MAP, map_discrimination):
        with pytest.raises(InputError, match=r"maps \(2, 3\): expected \[N, h, w\]"):
            measure(np.ones((2, 3)))
