import numpy as np
import pytest
import torch
from factories import build_method

from mlvision.data.manifest import Manifest, Record
from mlvision.errors import InputError
from mlvision.losses import (
    LOSSES,
    AslConfig,
    BceConfig,
    DecoupledSoftmaxConfig,
    SoftmaxConfig,
    SoftTopKConfig,
    asymmetric_loss,
    binary_cross_entropy,
    decoupled_softmax_loss,
    soft_top_k_loss,
)
from mlvision.methods import Baseline, BaselineConfig
from mlvision.models import LinearHeadConfig, Preprocessing, build_classifier
from mlvision.models.backbone import BackboneConfig
from mlvision.types import Batch, CropBox

MEAN, STD = (0.1, 0.2, 0.4), (0.5, 1.0, 0.25)


def build(**options) -> Baseline:
    torch.manual_seed(0)
    classifier = build_classifier(BackboneConfig("test_resnet"), LinearHeadConfig(), 3, image_size=(64, 96))
    return build_method(BaselineConfig(**options), classifier, Preprocessing(MEAN, STD, "bilinear", 0.9)).eval()


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (4, 3, 64, 96), dtype=torch.uint8, generator=generator)
    targets = torch.tensor([[1, 0, 0], [0, 1, float("nan")], [1, 1, 0], [0, 0, 0]])
    return Batch(images, targets, torch.arange(4), CropBox(torch.zeros(4, 4)))


def test_normalisation_is_by_channel():
    method = build()
    images = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = (images.numpy() / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(method.normalise(images).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_bytes_and_floats_give_the_same_logits():
    method, batch = build(), make_batch()
    torch.testing.assert_close(method.predict(batch.images), method.predict(batch.images / 255))


def test_predict_is_differentiable_in_the_image():
    method = build()
    images = (make_batch().images / 255).requires_grad_()
    method.predict(images)[:, 1].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().amax(dim=(1, 2, 3)).min() > 0


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({"loss": BceConfig()}, binary_cross_entropy),
        (
            {"loss": AslConfig(gamma_neg=2.0, gamma_pos=1.0, clip=0.1)},
            lambda z, y: asymmetric_loss(z, y, gamma_neg=2.0, gamma_pos=1.0, clip=0.1),
        ),
        ({"loss": DecoupledSoftmaxConfig()}, decoupled_softmax_loss),
        ({"loss": SoftTopKConfig()}, soft_top_k_loss),
        ({"loss": SoftTopKConfig(k=1, alpha=0.5)}, lambda z, y: soft_top_k_loss(z, y, k=1, alpha=0.5)),
    ],
)
def test_the_loss_is_that_of_the_logits(options, loss):
    method, batch = build(**options), make_batch()
    assert method(batch).loss.item() == pytest.approx(
        loss(method.predict(batch.images), batch.targets).item(), rel=1e-6
    )


def test_class_weights_follow_the_training_split():
    labels = [(0,), (0,), (0, 1), (0, 1)]  # four positives, two, none
    records = tuple(Record(f"{i}.jpg", f"{i}.jpg", row) for i, row in enumerate(labels))
    manifest = Manifest(("a", "b", "c"), records, "train")
    method, plain, batch = build(class_weights="inverse_sqrt"), build(), make_batch()
    method.prepare(manifest.statistics())
    plain.prepare(manifest.statistics())
    raw = np.array([4, 2, 1]) ** -0.5
    np.testing.assert_allclose(method.class_weights.numpy(), raw / raw.mean(), rtol=1e-6)
    expected = binary_cross_entropy(method.predict(batch.images), batch.targets, class_weights=method.class_weights)
    assert method(batch).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert plain.class_weights.tolist() == [1, 1, 1]
    assert "class_weights" in method.state_dict()  # survives a resume


def test_groups_are_backbone_and_head_without_overlap():
    method = build()
    groups = method.parameter_groups()
    assert list(groups) == ["backbone", "head"]
    assert groups["head"] == list(method.classifier.head.parameters())
    assert sum(len(group) for group in groups.values()) == len(list(method.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": SoftTopKConfig(k=3)}, "method.loss.k: expected 0, or less than the 3 classes, got 3"),
        ({"class_weights": "balanced"}, "method.class_weights: expected none or inverse_sqrt, got 'balanced'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_smoothing_spreads_a_share_of_each_label(loss):
    method, batch = build(loss=loss(), smoothing=0.3).eval(), make_batch()
    smooth = 0.7 * batch.targets + 0.3 / 3
    expected = build(loss=loss()).eval()(Batch(batch.images, smooth, batch.index, batch.view)).loss
    torch.testing.assert_close(method(batch).loss, expected)
    with pytest.raises(InputError, match=r"method.smoothing: expected a share in \[0, 1\), got 1.0"):
        build(smoothing=1.0)


def test_scores_are_what_was_trained():
    logits = torch.tensor([[1.0, 2.0, -3.0]])
    torch.testing.assert_close(build().space.scores(logits), logits.sigmoid())
    torch.testing.assert_close(build(loss=SoftmaxConfig()).space.scores(logits), logits.softmax(1))
