"""The linear head and the classifier by hand."""

import pytest
import torch
from torch import nn

from mlvision.errors import InputError
from mlvision.models import BackboneConfig, Classifier, LinearHeadConfig, build_backbone, build_classifier, build_head
from mlvision.types import Features


def features(pooled: list[list[float]]) -> Features:
    return Features(torch.full((len(pooled), len(pooled[0]), 2, 3), 99.0), torch.tensor(pooled))


def test_linear_head_by_hand():
    head = build_head("linear", 2, 3)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]]))
        head.linear.bias.copy_(torch.tensor([0.0, 0.5, 10.0]))
    output = head(features([[3.0, 4.0], [-1.0, 0.0]]))
    assert output.logits.tolist() == [[3.0, 8.5, 11.0], [-1.0, 0.5, 11.0]]
    assert output.embedding.tolist() == [[3.0, 4.0], [-1.0, 0.0]]
    assert output.maps is None
    assert head.num_classes == 3


def test_linear_head_starts_near_even_odds():
    torch.manual_seed(0)
    head = build_head(LinearHeadConfig(), 1280, 80)
    probabilities = head(features(torch.rand(16, 1280).tolist())).logits.sigmoid()
    assert (probabilities - 0.5).abs().max() < 0.25


def test_dropout_of_the_linear_head_acts_in_training_alone():
    torch.manual_seed(0)
    head = build_head("linear", 1000, 1, dropout=0.25)
    nn.init.ones_(head.linear.weight)
    pooled = features([[1.0] * 1000])
    assert head.eval()(pooled).logits.item() == pytest.approx(1000)
    kept = head.train()(pooled).logits.item() * 0.75  # the kept ones are scaled up by 1 / 0.75
    assert 680 < kept < 820


def test_classifier_is_the_head_on_the_backbone():
    torch.manual_seed(0)
    backbone = build_backbone("test_resnet", image_size=(64, 96))
    head = build_head("linear", backbone.num_features, 5)
    classifier = Classifier(backbone, head).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        pooled = backbone.model.forward_features(images).mean((2, 3))
        torch.testing.assert_close(classifier(images).logits, pooled @ head.linear.weight.T)


def test_every_parameter_of_a_classifier_gets_a_gradient():
    torch.manual_seed(0)
    for name in ("test_resnet", "test_efficientnet", "test_convnext", "test_vit"):
        classifier = build_classifier(BackboneConfig(name), LinearHeadConfig(), 5, image_size=(64, 96))
        for module in classifier.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # timm starts the last norm of a residual branch at zero
        classifier(torch.randn(4, 3, 64, 96)).logits.square().sum().backward()
        for key, parameter in classifier.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().max() > 0, key


def test_wrong_head_options_are_named():
    with pytest.raises(InputError, match="head.name: expected one of linear, .*, got 'linaer'"):
        build_head("linaer", 2, 3)
    with pytest.raises(InputError, match="head.dropout: expected a probability"):
        build_head("linear", 2, 3, dropout=1.0)


def test_logits_are_not_rounded_under_autocast():
    """Logits in bfloat16 tie, and ties move AP: the head computes in float32 also under autocast."""
    head = build_head("linear", 32, 5)
    features = Features(torch.zeros(64, 32, 1, 1), torch.randn(64, 32).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(features).logits
    assert logits.dtype == torch.float32
    expected = features.pooled.double() @ head.linear.weight.double().T + head.linear.bias.double()
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)
