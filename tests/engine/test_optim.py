import pytest
import torch
from torch import nn

from mlvision.engine.optim import OptimConfig, build_optimizer, learning_rate_factor, parameter_groups
from mlvision.errors import InputError


def test_one_cycle_equals_torch():
    config = OptimConfig(lr=0.3, schedule="one_cycle", warmup=0.2, start_factor=0.05, final_factor=1e-3)
    total = 50
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=0.3,
        total_steps=total,
        pct_start=0.2,
        div_factor=1 / 0.05,
        final_div_factor=0.05 / 1e-3,  # torch counts it from the first rate, we from the peak
        cycle_momentum=False,
    )
    ours = learning_rate_factor(config, total)
    for step in range(total):
        assert 0.3 * ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step < total - 1:
            reference.step()


def test_cosine_by_hand():
    factor = learning_rate_factor(
        OptimConfig(schedule="cosine", warmup=0.5, start_factor=0.0, final_factor=0.0), total_steps=8
    )
    # Peak at step 3 (warmup * total - 1), linear before it, half a cosine over the four steps after it.
    assert [round(factor(step), 6) for step in range(8)] == [0, 0.333333, 0.666667, 1, 0.853553, 0.5, 0.146447, 0]


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_very_short_runs_have_finite_rates(schedule, total):
    factor = learning_rate_factor(OptimConfig(schedule=schedule), total)
    assert all(0 <= factor(step) <= 1 for step in range(total))


def test_groups_split_by_dimension_and_scale_by_name():
    backbone, head = nn.Linear(3, 2), nn.Linear(2, 4)
    groups = parameter_groups(
        {"backbone": list(backbone.parameters()), "head": list(head.parameters())},
        OptimConfig(lr=0.1, weight_decay=0.5, lr_scales={"head": 10.0}),
    )
    described = [(g["params"], g["weight_decay"], g["lr"]) for g in groups]
    assert described == [
        ([backbone.weight], 0.5, 0.1),
        ([backbone.bias], 0.0, 0.1),
        ([head.weight], 0.5, 1.0),
        ([head.bias], 0.0, 1.0),
    ]


def test_frozen_parameters_are_left_out():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    groups = parameter_groups({"backbone": list(layer.parameters())}, OptimConfig())
    assert [g["params"] for g in groups] == [[layer.bias]]


def test_adamw_is_fused_and_lamb_is_not():
    groups = {"backbone": list(nn.Linear(3, 2).parameters())}
    assert build_optimizer(groups, OptimConfig(name="adamw")).defaults["fused"]
    assert "fused" not in build_optimizer(groups, OptimConfig(name="lamb")).defaults


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimConfig(name="adamww"), "optim.name: timm has no optimizer 'adamww'"),
        (OptimConfig(lr_scales={"haed": 2.0}), "optim.lr_scales: no parameter group 'haed'"),
    ],
)
def test_bad_options_are_named(config, message):
    with pytest.raises(InputError, match=message):
        build_optimizer({"backbone": list(nn.Linear(3, 2).parameters())}, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, "optim.schedule: expected one of one_cycle, cosine, constant, got 'step'"),
        ({"warmup": 1.0}, "optim.warmup: expected a share"),
        ({"lr": -1.0}, "optim.lr: expected a number above 0, got -1.0"),
        ({"epochs": 0}, "optim.epochs: expected at least 1, got 0"),
        ({"weight_decay": -0.1}, "optim.weight_decay: expected 0 or more"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(InputError, match=message):
        OptimConfig(**options)
