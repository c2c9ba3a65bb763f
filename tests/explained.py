"""Small models and images to explain: fixtures of tests/explain and tests/study."""

import pytest
import timm
import torch
from torch import nn


class Linear(nn.Module):
    """logits = the sum over pixels of w * image, + b: every method's answer is known."""

    def __init__(self, num_classes: int = 4, size: tuple[int, int] = (12, 18)):
        super().__init__()
        noise = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(num_classes, 3, *size, generator=noise))
        self.bias = nn.Parameter(torch.randn(num_classes, generator=noise))

    def forward(self, images):
        return torch.einsum("bchw,kchw->bk", images, self.weight) + self.bias


@pytest.fixture
def linear_model() -> nn.Module:
    return Linear()


@pytest.fixture(scope="session")
def resnet() -> nn.Module:
    """A small ResNet whose batch norms and biases are no identities, and whose logits spread as trained ones do."""
    torch.manual_seed(0)
    model = _shaken(timm.create_model("resnet10t", num_classes=5))
    with torch.no_grad():
        model.fc.weight *= 10
    return model


@pytest.fixture(scope="session")
def vit() -> nn.Module:
    torch.manual_seed(0)
    return _shaken(timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=(48, 80), depth=3))


def _shaken(model: nn.Module) -> nn.Module:
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(2))
