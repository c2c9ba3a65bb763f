"""Conditional transport against a double loop, its limits, and POT for Sinkhorn's plan."""

import math

import jaxtyping
import numpy as np
import ot
import pytest
import torch
from reference.losses_reference import conditional_transport_of_one
from torch.nn.functional import normalize

from mlvision.errors import InputError
from mlvision.losses import conditional_transport


@pytest.fixture
def sets():
    """Two images of five patches, four labels; the second image has an unknown one."""
    noise = torch.Generator().manual_seed(4)
    patches = torch.randn(2, 5, 3, generator=noise, dtype=torch.float64)
    labels = torch.randn(4, 3, generator=noise, dtype=torch.float64)
    weights = torch.tensor([[1, 0, 1, 0], [0, 1, 3, math.nan]], dtype=torch.float64)
    theta = torch.rand(2, 5, generator=noise, dtype=torch.float64) + 0.1
    return patches, labels, weights, theta


@pytest.mark.parametrize(("tau", "rho"), [(0.07, 0.5), (1.0, 0.2), (0.3, 1.0), (0.3, 0.0)])
def test_it_equals_the_double_loop(sets, tau, rho):
    patches, labels, weights, theta = sets
    found = conditional_transport(patches, labels, weights, theta, tau=tau, rho=rho)
    for image in range(2):
        cost, forward, backward = conditional_transport_of_one(
            patches[image].numpy(), labels.numpy(), weights[image].tolist(), theta[image].tolist(), tau, rho
        )
        assert found.cost[image].item() == pytest.approx(cost, abs=1e-12)
        np.testing.assert_allclose(found.forward_plan[image], forward, atol=1e-12)
        np.testing.assert_allclose(found.backward_plan[image], backward, atol=1e-12)


def test_rows_and_columns_sum_to_one_and_absent_labels_draw_nothing(sets):
    patches, labels, weights, theta = sets
    found = conditional_transport(patches, labels, weights, theta)
    torch.testing.assert_close(found.forward_plan.sum(2), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(found.backward_plan.sum(1), torch.ones(2, 4, dtype=torch.float64))
    assert not found.forward_plan[(weights.nan_to_num() == 0)[:, None].expand(-1, 5, -1)].any()
    assert (found.cost > 0).all()


def test_one_present_label_gets_every_patch(sets):
    patches, labels, _, theta = sets
    weights = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.float64)
    found = conditional_transport(patches, labels, weights, theta, rho=1.0)
    assert (found.forward_plan[0, :, 2] == 1).all()
    cosine = normalize(patches, dim=-1) @ normalize(labels, dim=-1).T
    share = theta / theta.sum(1, keepdim=True)
    torch.testing.assert_close(found.cost[0], (share[0] * (1 - cosine[0, :, 2])).sum())
    torch.testing.assert_close(found.cost[1], (share[1] * (1 - cosine[1, :, 1])).sum())


def test_the_cost_is_zero_only_where_everything_points_the_same_way(sets):
    _, labels, _, _ = sets
    weights = torch.tensor([[0, 1, 0, 0]], dtype=torch.float64)
    along = labels[1] * torch.tensor([0.5, 2, 7], dtype=torch.float64)[:, None]
    assert conditional_transport(along[None], labels, weights).cost.abs() < 1e-12
    tilted = along.clone()
    tilted[2] = labels[0]
    assert conditional_transport(tilted[None], labels, weights).cost > 1e-3


def test_the_order_of_patches_and_labels_does_not_matter(sets):
    patches, labels, weights, theta = sets
    first = conditional_transport(patches, labels, weights, theta)
    row, column = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 3, 1, 0])
    second = conditional_transport(patches[:, row], labels[column], weights[:, column], theta[:, row])
    torch.testing.assert_close(first.cost, second.cost)
    torch.testing.assert_close(first.forward_plan[:, row][..., column], second.forward_plan)


def test_a_patch_that_is_there_twice_with_half_the_weight_changes_nothing(sets):
    patches, labels, weights, theta = sets
    halves = torch.cat([theta[:, :1] / 2, theta[:, 1:], theta[:, :1] / 2], 1)
    twice = torch.cat([patches, patches[:, :1]], 1)
    found = conditional_transport(twice, labels, weights, halves)
    torch.testing.assert_close(found.cost, conditional_transport(patches, labels, weights, theta).cost)


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_cold_and_hot_limits(sets, rho):
    """Cold: the nearest label of each patch, or the nearest patch of each label. Hot: everything by its weights."""
    patches, labels, weights, theta = sets
    cost = 1 - normalize(patches, dim=-1) @ normalize(labels, dim=-1).T
    theta, beta = theta / theta.sum(1, keepdim=True), weights.nan_to_num()
    beta = beta / beta.sum(1, keepdim=True)
    nearest_label = cost.masked_fill(beta[:, None] == 0, torch.inf).amin(2)
    cold = (theta * nearest_label).sum(1) if rho else (beta * cost.amin(1)).sum(1)
    torch.testing.assert_close(conditional_transport(patches, labels, weights, theta, tau=1e-3, rho=rho).cost, cold)
    hot = torch.einsum("bn,bm,bnm->b", theta, beta, cost)
    found = conditional_transport(patches, labels, weights, theta, tau=1e6, rho=rho).cost
    torch.testing.assert_close(found, hot, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("plan", "max_steps"), [("ct", 0), ("sinkhorn", 10_000), ("sinkhorn", 0)])
def test_the_gradient_is_right(sets, plan, max_steps):
    """Of Sinkhorn's plan that of the fixed point, so the steps have to reach it."""
    patches, labels, weights, theta = sets
    sink = torch.tensor([0.3, -1, 0.2], dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def cost(patches, labels, theta, tau, sink):
        options = {"plan": plan, "tau": tau, "sink": sink, "tolerance": 1e-12, "max_steps": max_steps}
        return conditional_transport(patches, labels, weights, theta, **options).cost

    inputs = (patches.requires_grad_(), labels.requires_grad_(), theta.requires_grad_(), tau, sink)
    assert torch.autograd.gradcheck(cost, inputs)


def test_absent_labels_have_no_gradient(sets):
    patches, labels, weights, _ = sets
    labels.requires_grad_()
    conditional_transport(patches[:1], labels, weights[:1]).cost.sum().backward()
    assert labels.grad[[0, 2]].abs().sum() > 0
    assert not labels.grad[[1, 3]].any()


@pytest.mark.parametrize("plan", ["ct", "sinkhorn"])
@pytest.mark.parametrize("sink", [None, torch.ones(3)])
def test_images_without_a_present_label_cost_nothing_and_stay_finite(plan, sink):
    patches, labels = torch.randn(3, 4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    weights = torch.tensor([[0.0, 0.0], [math.nan, 0.0], [0.0, 1.0]])
    found = conditional_transport(patches, labels, weights, plan=plan, sink=sink)
    assert found.cost[:2].tolist() == [0, 0]
    assert not found.forward_plan[:2].any()
    found.cost.sum().backward()
    assert not patches.grad[:2].any()
    assert patches.grad[2].abs().sum() > 0
    assert labels.grad.isfinite().all()
    nothing = conditional_transport(patches, labels, weights[:2].repeat(2, 1)[:3], plan=plan, sink=sink).cost
    assert nothing.tolist() == [0, 0, 0]
    assert all(not gradient.any() for gradient in torch.autograd.grad(nothing.sum(), (patches, labels)))


@pytest.mark.parametrize("plan", ["ct", "sinkhorn"])
def test_images_without_a_patch_of_weight_cost_nothing_and_stay_finite(plan):
    patches, labels = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    theta = torch.tensor([[0.0, 0, 0, 0], [0, 1, 2, 0]], requires_grad=True)
    found = conditional_transport(patches, labels, torch.ones(2, 2), theta, plan=plan)
    alone = conditional_transport(patches[1:], labels, torch.ones(1, 2), theta[1:], plan=plan)
    assert found.cost[0] == 0
    assert not found.forward_plan[0].any()
    torch.testing.assert_close(found.cost[1:], alone.cost)
    for gradient in torch.autograd.grad(found.cost.sum(), (patches, labels, theta)):
        assert gradient.isfinite().all()
    assert not torch.autograd.grad(
        conditional_transport(patches, labels, torch.ones(2, 2), theta, plan=plan).cost[0], patches
    )[0].any()


def test_no_image():
    found = conditional_transport(torch.ones(0, 4, 3), torch.ones(2, 3), torch.ones(0, 2), plan="sinkhorn")
    assert [tuple(x.shape) for x in found] == [(0,), (0, 4, 2), (0, 4, 2)]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.bfloat16])
def test_weights_of_any_dtype(dtype, sets, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as a user runs it
    patches, labels, _, _ = sets
    weights, theta = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]]), torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
    found = conditional_transport(patches, labels, weights.to(dtype), theta.to(dtype))
    assert torch.equal(found.cost, conditional_transport(patches, labels, weights.double(), theta.double()).cost)


def test_sinkhorns_plan_equals_pots(sets):
    patches, labels, weights, theta = sets
    found = conditional_transport(patches, labels, weights, theta, plan="sinkhorn", tau=0.4, tolerance=1e-12)
    cost = 1 - normalize(patches, dim=-1) @ normalize(labels, dim=-1).T
    for image in range(2):
        beta = weights[image].nan_to_num()
        there = beta > 0
        a, b = theta[image] / theta[image].sum(), (beta / beta.sum())[there]
        distance = (cost[image][:, there] / 0.4).numpy()
        plan = ot.sinkhorn(a.numpy(), b.numpy(), distance, reg=1.0, stopThr=1e-14, numItermax=10_000)
        np.testing.assert_allclose(a[:, None] * found.forward_plan[image][:, there], plan, atol=1e-9)
        np.testing.assert_allclose(b * found.backward_plan[image][:, there], plan, atol=1e-9)
        assert found.cost[image].item() == pytest.approx((plan * cost[image][:, there].numpy()).sum(), abs=1e-9)


def test_each_one_sided_plan_is_half_a_step_of_sinkhorns(sets):
    patches, labels, weights, theta = sets
    none = conditional_transport(patches, labels, weights, theta, plan="sinkhorn", max_steps=0)
    torch.testing.assert_close(none.cost, conditional_transport(patches, labels, weights, theta).cost)


def large(dtype: torch.dtype = torch.float32):
    """Eight images of 49 patches and 20 labels, near each other in a space of 16: Sinkhorn's steps take long when cold."""
    noise = torch.Generator().manual_seed(1)
    patches, labels = torch.randn(8, 49, 16, generator=noise), torch.randn(20, 16, generator=noise)
    weights = (torch.rand(8, 20, generator=noise) < 0.2).float()
    theta = torch.rand(8, 49, generator=noise)
    return patches.to(dtype), labels.to(dtype), weights, theta


def largest_error(found, weights, theta) -> float:
    """Of any marginal that a plan does not keep by itself, relative to it."""
    theta, beta = (x.to(found.cost) / x.to(found.cost).sum(1, keepdim=True) for x in (theta, weights))
    columns = torch.einsum("bn,bnm->bm", theta, found.forward_plan) / beta
    rows = torch.einsum("bm,bnm->bn", beta, found.backward_plan) / theta
    return max((columns[weights > 0] - 1).abs().max().item(), (rows[theta > 0] - 1).abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.01, 0.07, 1.0])
def test_sinkhorns_plan_keeps_both_marginals(dtype, tau):
    patches, labels, weights, theta = large(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = conditional_transport(patches, labels, weights, theta, plan="sinkhorn", tau=tau)
    assert largest_error(found, weights, theta) < 2e-3
    few = conditional_transport(patches, labels, weights, theta, plan="sinkhorn", tau=tau, max_steps=50)
    assert (largest_error(few, weights, theta) > 0.01) == (tau == 0.01)  # fifty steps are not enough when cold
    if dtype == torch.float64:
        closer = conditional_transport(
            patches, labels, weights, theta, plan="sinkhorn", tau=tau, tolerance=1e-9, max_steps=9999
        )
        assert largest_error(closer, weights, theta) < 2e-9
        torch.testing.assert_close(found.cost, closer.cost, rtol=1e-3, atol=1e-4)


def test_an_images_plan_does_not_depend_on_the_rest_of_its_batch():
    patches, labels, weights, theta = large()
    patches[0] = patches[0] + 10 * torch.randn(49, 16)  # a few steps are enough for this one
    options = {"plan": "sinkhorn", "tau": 0.02}
    together = conditional_transport(patches, labels, weights, theta, **options)
    alone = conditional_transport(patches[:1], labels, weights[:1], theta[:1], **options)
    torch.testing.assert_close(together.forward_plan[:1], alone.forward_plan, rtol=1e-5, atol=1e-7)


def test_the_steps_end_where_no_plan_is_reached():
    """float32 does not resolve the tolerance; a NaN never gets there."""
    patches, labels, weights, theta = large()
    found = conditional_transport(patches, labels, weights, theta, plan="sinkhorn", tau=0.01, tolerance=1e-12)
    assert largest_error(found, weights, theta) < 2e-3
    patches[2, 3, 4] = math.nan
    found = conditional_transport(patches, labels, weights, theta, plan="sinkhorn")
    assert found.cost.isnan().nonzero().flatten().tolist() == [2]


def test_the_sink_takes_the_patches_that_are_like_it(sets):
    _, labels, _, _ = sets
    sink = torch.linalg.cross(labels[0], labels[2])  # at right angles to both
    weights = torch.tensor([[1, 0, 1, 0]], dtype=torch.float64)
    patches = torch.stack([labels[0], sink, labels[2]])[None]
    found = conditional_transport(patches, labels, weights, tau=0.02, sink=sink, rho=1.0)
    share = found.forward_plan.sum(2)[0]
    assert share[1] < 1e-6
    assert (share[[0, 2]] > 1 - 1e-6).all()
    assert found.cost < 1e-6
    assert conditional_transport(patches, labels, weights, tau=0.02, rho=1.0).cost > 0.3
    # As one more label of its weight.
    more = conditional_transport(
        patches, torch.cat([labels, sink[None]]), torch.tensor([[1, 0, 1, 0, 2.0]], dtype=torch.float64), tau=0.3
    )
    same = conditional_transport(patches, labels, weights, tau=0.3, sink=sink, sink_mass=0.5)
    torch.testing.assert_close(same.cost, more.cost)
    torch.testing.assert_close(same.forward_plan, more.forward_plan[..., :4])


def test_labels_of_each_image_and_a_navigator_of_ones_own(sets):
    patches, labels, weights, theta = sets
    shared = conditional_transport(patches, labels, weights, theta, tau=0.5)
    each = conditional_transport(patches, labels.expand(2, -1, -1), weights, theta, tau=0.5)
    torch.testing.assert_close(each.cost, shared.cost)

    def navigator(patches, labels):
        return -2 * normalize(patches, dim=-1) @ normalize(labels, dim=-1).mT

    found = conditional_transport(patches, labels, weights, theta, navigator=navigator)
    torch.testing.assert_close(found.forward_plan, shared.forward_plan)


@pytest.mark.parametrize("plan", ["ct", "sinkhorn"])
def test_half_precision_and_autocast(plan, sets):
    patches, labels, weights, theta = (x.float() for x in sets)
    plain = conditional_transport(patches, labels, weights, theta, plan=plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = conditional_transport(patches, labels, weights, theta, plan=plan)
    assert torch.equal(inside.cost, plain.cost)
    rounded = conditional_transport(patches.bfloat16(), labels.bfloat16(), weights, theta, plan=plan)
    assert rounded.cost.dtype == torch.float32
    torch.testing.assert_close(rounded.cost, plain.cost, rtol=1e-2, atol=0)


def test_one_patch_and_one_label():
    found = conditional_transport(torch.ones(2, 1, 3), torch.tensor([[1.0, 0, 0]]), torch.ones(2, 1))
    torch.testing.assert_close(found.cost, torch.full((2,), 1 - 1 / math.sqrt(3)))
    assert found.forward_plan.tolist() == found.backward_plan.tolist() == [[[1.0]], [[1.0]]]


def test_patches_without_weight_play_no_part(sets):
    patches, labels, weights, theta = sets
    theta[:, 2] = 0
    rest = [0, 1, 3, 4]
    found = conditional_transport(patches, labels, weights, theta)
    fewer = conditional_transport(patches[:, rest], labels, weights, theta[:, rest])
    torch.testing.assert_close(found.cost, fewer.cost)
    assert not found.backward_plan[:, 2].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.randn(4, 2)}, "labels of width 2: expected the patches' width, 3"),
        ({"labels": torch.randn(1, 4, 3)}, "labels of 1 images: expected 2"),
        ({"label_weights": torch.ones(2, 5)}, "label_weights \\(2, 5\\): expected one per image and label, \\(2, 4\\)"),
        ({"patch_weights": torch.ones(2, 4)}, "patch_weights \\(2, 4\\): expected one per patch, \\(2, 5\\)"),
        ({"sink": torch.ones(2)}, "sink \\(2,\\): expected the patches' width, 3"),
        ({"plan": "exact"}, "plan 'exact': expected one of ct, sinkhorn"),
        ({"tau": 0.0}, "tau 0.0: expected more than 0"),
        ({"tau": math.nan}, "tau nan: expected more than 0"),
        ({"tau": torch.ones(2, 1, 1)}, "tau \\(2, 1, 1\\): expected one number"),
        ({"rho": math.nan}, "rho nan: expected 0 to 1"),
        ({"tolerance": 0.0}, "tolerance 0.0: expected more than 0"),
        ({"max_steps": -1}, "max_steps -1: expected 0 or more"),
        (
            {"label_weights": -torch.ones(2, 4)},
            "label_weights -1 at \\[0, 0\\]: expected 0 or more, or NaN for unknown",
        ),
        ({"label_weights": torch.full((2, 4), math.inf)}, "label_weights inf at \\[0, 0\\]: expected 0 or more"),
        ({"patch_weights": -torch.ones(2, 5)}, "patch_weights -1 at \\[0, 0\\]: expected 0 or more"),
        ({"patch_weights": torch.full((2, 5), math.nan)}, "patch_weights nan at \\[0, 0\\]: expected 0 or more"),
        ({"patches": torch.ones(5, 3)}, "patches \\(5, 3\\): expected \\[images, patches, width\\]"),
        ({"patches": torch.ones(2, 0, 3)}, "patches \\(2, 0, 3\\): expected .* with at least one patch"),
        ({"labels": torch.ones(3)}, "labels \\(3,\\): expected \\[labels, width\\] or \\[images, labels, width\\]"),
        ({"labels": torch.ones(0, 3)}, "labels \\(0, 3\\): expected .*, not empty"),
        ({"rho": 1.5}, "rho 1.5: expected 0 to 1"),
        ({"sink": torch.ones(3), "sink_mass": 1.0}, "sink_mass 1.0: expected at least 0, less than 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as a user runs it
    given = {"patches": torch.randn(2, 5, 3), "labels": torch.randn(4, 3), "label_weights": torch.ones(2, 4)} | change
    with pytest.raises(InputError, match=message):
        conditional_transport(**given)
