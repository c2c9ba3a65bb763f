import pytest
import torch
from torch import nn

from mlvision.engine.guard import FiniteGuard, NonFiniteError

KEYS = [f"image{i}.jpg" for i in range(10)]


def step(layer, optimizer, guard, number, scale, scaler=None):
    """One update on a loss of `scale` times the output, guarded as in the training loop."""
    loss = (layer(torch.ones(2, 3)) * scale).sum()
    index = torch.tensor([number, number + 1])
    if scaler is not None:
        guard.update(number, loss, None, index)
        scaler.scale(guard.poison(loss)).backward()
        scaler.step(optimizer)
        scaler.update()
    else:
        guard.poison(loss).backward()
        norm = nn.utils.get_total_norm([p.grad for p in layer.parameters()])
        guard.update(number, loss, norm, index)
        guard.step(optimizer)
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["fused", "plain", "scaler"])
def test_weights_stay_those_of_the_last_good_step(kind):
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5, fused=kind != "plain")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if kind == "scaler" else None
    guard = FiniteGuard(torch.device("cpu"), batch_size=2)
    before = [p.clone() for p in layer.parameters()]
    step(layer, optimizer, guard, 1, 1.0, scaler)
    good = [p.clone() for p in layer.parameters()]
    assert not torch.equal(before[0], good[0])
    guard.check(KEYS)
    step(layer, optimizer, guard, 2, float("nan"), scaler)
    step(layer, optimizer, guard, 3, 1.0, scaler)  # finite again, but the run has already gone wrong
    step(layer, optimizer, guard, 4, float("inf"), scaler)
    assert all(torch.equal(a, b) for a, b in zip(good, layer.parameters(), strict=True))
    with pytest.raises(NonFiniteError, match=r"step 2: .*image2.jpg, image3.jpg;"):
        guard.check(KEYS)


def test_a_finite_loss_with_an_infinite_gradient_trips_it():
    x = torch.zeros(1, requires_grad=True)
    x.sqrt().sum().backward()  # 0, with derivative infinity
    guard = FiniteGuard(torch.device("cpu"), batch_size=4)
    guard.update(5, torch.tensor(0.0), nn.utils.get_total_norm([x.grad]), torch.tensor([7]))
    with pytest.raises(NonFiniteError, match="step 5.*with image7.jpg;"):
        guard.check(KEYS)


def test_overflow_under_a_scaler_is_no_error():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    guard = FiniteGuard(torch.device("cpu"), batch_size=2)
    before = layer.weight.clone()
    step(layer, optimizer, guard, 1, 1e3, scaler)  # 1e3 * 1e38 overflows float32; the loss itself is fine
    assert torch.equal(before, layer.weight)
    assert scaler.get_scale() < 1e38
    guard.check(KEYS)
