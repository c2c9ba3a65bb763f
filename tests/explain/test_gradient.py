import captum.attr
import numpy as np
import pytest
import timm
import torch
from factories import build_method
from torch import nn
from torch.nn import functional as F

from mlvision.errors import InputError
from mlvision.explain import Subject, explain
from mlvision.explain.cam import GradCam
from mlvision.explain.gradient import (
    DeepLift,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    Saliency,
    SmoothGrad,
)
from mlvision.explain.impute import fill_in
from mlvision.explain.rewrite import _MaxOfReLUs
from mlvision.methods.baseline import BaselineConfig
from mlvision.metrics.faithfulness import deletion_measures
from mlvision.models import Classifier, LinearHead, LinearHeadConfig, build_backbone
from mlvision.study.measure import MeasureConfig, deletion_curves

ALL = [Saliency, InputXGradient, IntegratedGradients, SmoothGrad, GuidedBackprop, GuidedGradCam, DeepLift]
CONTRIBUTIONS = [InputXGradient(), IntegratedGradients(num_steps=5), DeepLift()]  # linear in the score
SLOPES = [Saliency(), SmoothGrad(num_samples=3), GuidedBackprop(), GuidedGradCam(layer="1")]
FEW = {IntegratedGradients: {"num_steps": 6}, SmoothGrad: {"num_samples": 6}}
CLASSES = 4


def images(num=2, size=(48, 64), seed=0):
    return torch.rand(num, 3, *size, generator=torch.Generator().manual_seed(seed))


def timm_model(name, **options):
    """Random weights, with statistics and biases that are not those of a fresh model."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, **options).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        model.get_classifier().weight.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def resnet():
    return timm_model("resnet10t")


@pytest.fixture(scope="module")
def lite():
    return timm_model("tf_efficientnet_lite0")


def vit():
    return timm_model("vit_tiny_patch16_224", img_size=(48, 64), depth=2)


def linear(size=(6, 9)):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size[0] * size[1], CLASSES)).eval()


def weights_of(model, size=(6, 9)):
    return model[1].weight.detach().view(CLASSES, 3, *size)


def pointwise(*layers):
    """Logits are the means over the pixels of what 1x1 layers say of them."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def conv(weight, bias=None):
    weight = torch.tensor(weight, dtype=torch.float32)
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    with torch.no_grad():
        layer.weight.copy_(weight[:, :, None, None])
        layer.bias.copy_(torch.tensor(bias, dtype=torch.float32) if bias else torch.zeros(len(weight)))
    return layer


def normalised(model, pixels):
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return model((pixels - mean) / std)


def gradients(model, pixels, label):
    """Of one logit with respect to images in [0, 1], by autograd."""
    pixels = pixels.clone().requires_grad_()
    return torch.autograd.grad(normalised(model, pixels)[:, label].sum(), pixels)[0]


def nothing_of(x, baseline):
    """The image without content that a baseline stands for."""
    return fill_in(x, baseline)(torch.arange(len(x)), torch.zeros_like(x[:, 0]))


# Plain gradients


def test_saliency_is_the_gradient_of_images_in_0_1(resnet):
    x = images()
    found = explain(resnet, x, Saliency(batch_size=3), labels=[2, 0, 3]).maps
    for column, label in enumerate([2, 0, 3]):
        torch.testing.assert_close(found[:, column], gradients(resnet, x, label).abs().sum(1), rtol=1e-6, atol=1e-6)


def test_smooth_grad_without_noise_is_the_gradient(resnet):
    x = images()
    found = explain(resnet, x, SmoothGrad(num_samples=3, sigma=0.0, batch_size=2), labels=[1]).maps
    torch.testing.assert_close(found[:, 0], gradients(resnet, x, 1).abs().sum(1), rtol=1e-5, atol=1e-6)


def test_smooth_grads_noise_has_the_given_deviation():
    class Squares(nn.Module):
        def forward(self, x):
            return torch.stack([x.square().sum((1, 2, 3)), x.sum((1, 2, 3))], 1)

    x = images(1, (64, 96))[:, :1] / 2 + 0.5  # so that no slope is negative
    found = explain(Squares(), x, SmoothGrad(num_samples=16, sigma=0.3), labels=[0, 1]).maps
    noise = (found[0, 0] - 2 * x[0, 0]) / 2
    assert float(noise.std()) == pytest.approx(0.3 / 4, rel=0.05)
    assert float(noise.mean()) == pytest.approx(0, abs=0.005)
    torch.testing.assert_close(found[0, 1], torch.ones(64, 96))


@pytest.mark.parametrize("explainer", CONTRIBUTIONS, ids=lambda e: type(e).__name__)
def test_linear_models_are_taken_apart_exactly(explainer):
    model, x = linear(), images(size=(6, 9))
    expected = (weights_of(model)[None] * x[:, None]).sum(2)  # set against black
    torch.testing.assert_close(explain(model, x, explainer).maps, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("explainer", SLOPES[:2], ids=lambda e: type(e).__name__)
def test_slopes_of_linear_models_are_the_weights_magnitudes(explainer):
    model, x = linear(), images(size=(6, 9))
    expected = weights_of(model).abs().sum(1).expand(2, -1, -1, -1)
    torch.testing.assert_close(explain(model, x, explainer).maps, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("explainer", SLOPES, ids=lambda e: type(e).__name__)
def test_what_is_known_by_being_dark_counts_as_evidence_too(explainer):
    """A dark spot makes the label; at it brighter pixels would lower the score, so every slope there is negative."""
    model = pointwise(conv([[-10, -10, -10]], [15]), nn.ReLU(), conv([[3]]))
    x = torch.full((1, 3, 28, 42), 0.9)
    x[:, :, 14:20, 6:12] = 0.1
    maps = explain(model, x, explainer).maps[:, 0]
    assert float(maps.min()) >= 0
    assert (maps[0] > 0.5 * maps.max()).nonzero().float().mean(0).tolist() == [16.5, 8.5]
    most, least = deletion_curves(Subject(model), x, maps, "mean", MeasureConfig(lattice=14, steps=10))
    assert deletion_measures(most[..., 0], least[..., 0]).srg.item() > 0


def test_integrated_gradients_are_a_sum_over_points(resnet):
    x = images()
    base = x.mean((2, 3), keepdim=True).expand_as(x)
    found = explain(resnet, x, IntegratedGradients(num_steps=5, baseline="mean", batch_size=3), labels=[1, 3]).maps
    points, weights = np.polynomial.legendre.leggauss(5)
    for column, label in enumerate([1, 3]):
        mean = sum(
            w / 2 * gradients(resnet, base + (p + 1) / 2 * (x - base), label)
            for p, w in zip(points, weights, strict=True)
        )
        torch.testing.assert_close(found[:, column], ((x - base) * mean).sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("baseline", ["black", "blur"])
def test_integrated_gradients_sum_to_the_difference_of_the_scores(baseline):
    model, x = vit(), images(1)
    found = explain(model, x, IntegratedGradients(baseline=baseline))
    difference = found.logits - normalised(model, nothing_of(x, baseline)).detach()
    assert float(difference.abs().min()) > 1e-3
    torch.testing.assert_close(found.maps.sum((2, 3)), difference, rtol=0.01, atol=0)


# Guided backpropagation, by hand

# a = relu(10 t - 2), b = relu(6 - 10 t); c = relu6(a + b), d = relu6(a - b); z0 = c - 2 d, z1 = 3 d
PIXELS = torch.tensor([[0.5, 0.7, 0.1], [0.9, 0.3, 0.55]])[None, None]
GUIDED = torch.tensor(
    [
        # The negative -2 d never passes. Both a and b carry c: they cancel, unless one is off; c is saturated at 0.9.
        [[0.0, 10, 10], [0, 0, 0]],  # the second by b, which falls with t
        # Only a passes (b enters with -1); d is off or saturated at 0.1, 0.9 and 0.3.
        [[30.0, 30, 0], [0, 0, 30]],
    ]
)


def rectified(reused=False, inplace=True):
    first = nn.ReLU(inplace)
    second = nn.ReLU6(inplace) if not reused else first
    return pointwise(conv([[10], [-10]], [-2, 6]), first, conv([[1, 1], [1, -1]]), second, conv([[1, -2], [0, 3]]))


def test_guided_backprop_by_hand_with_relu6():
    found = explain(rectified(), PIXELS, GuidedBackprop()).maps
    torch.testing.assert_close(found[0], GUIDED / 6)


def test_guided_backprop_takes_a_relu_that_is_used_twice():
    pixels = PIXELS[..., :2]
    found = explain(rectified(reused=True), pixels, GuidedBackprop()).maps
    expected = torch.tensor([[[0.0, 10], [10, 0]], [[30, 30], [30, 0]]])  # c and d are not cut off at 6
    torch.testing.assert_close(found[0], expected / 4)


def test_guided_backprop_leaves_a_shortcut_around_a_relu_alone():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            x = x * 2 - 1
            return (self.act(x) - 3 * x).sum((2, 3))

    found = explain(Shortcut(), torch.tensor([[[[0.9, 0.2]]]]), GuidedBackprop()).maps
    assert found.flatten().tolist() == [abs(2 - 6), 6]


def test_guided_grad_cam_is_guided_backprop_where_grad_cam_is_positive(lite):
    x = images(1, (64, 96))
    cam = explain(lite, x, GradCam(), labels=[1, 2]).maps.clamp(min=0)
    guided = explain(lite, x, GuidedBackprop(), labels=[1, 2]).maps
    found = explain(lite, x, GuidedGradCam(), labels=[1, 2]).maps
    assert cam.shape[2:] == (2, 3)
    torch.testing.assert_close(found, guided * F.interpolate(cam, (64, 96), mode="bilinear"))


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_guided_methods_are_the_magnitudes_of_captums():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES),
    ).eval()  # fmt: skip
    x = images(2, (24, 36))
    peers = {
        GuidedBackprop(): captum.attr.GuidedBackprop(model),
        GuidedGradCam(layer="3"): captum.attr.GuidedGradCam(model, model[3]),
    }
    for ours, theirs in peers.items():
        options = {"interpolate_mode": "bilinear"} if isinstance(ours, GuidedGradCam) else {}
        expected = torch.stack(
            [theirs.attribute(x.clone().requires_grad_(), target=c, **options).detach() for c in range(CLASSES)], 1
        )
        assert float(expected.min()) < 0 < float(expected.max())
        torch.testing.assert_close(explain(model, x, ours).maps, expected.abs().sum(2), rtol=1e-4, atol=1e-7)


# DeepLift


@pytest.mark.parametrize("baseline", ["black", "mean", "blur"])
@pytest.mark.parametrize("name", ["resnet", "lite"])
def test_deep_lift_sums_to_the_difference_of_the_scores(name, baseline, request):
    model, x = request.getfixturevalue(name), images()
    found = explain(model, x, DeepLift(baseline=baseline), labels=[[1, 3], [2]])
    with torch.no_grad():
        difference = normalised(model, x) - normalised(model, nothing_of(x, baseline))
    difference = difference.gather(1, found.labels.clamp(min=0))
    difference[1, 1] = 0
    torch.testing.assert_close(found.maps.sum((2, 3)), difference, rtol=1e-3, atol=1e-4)


def test_deep_lift_by_hand_with_relu6():
    x = torch.tensor([[0.2, 0.5, 0.9], [0.0, 0.6, 1.0]])[None, None]
    model = pointwise(conv([[10]], [1]), nn.ReLU6(inplace=True), conv([[2], [-1]]))
    # From relu6(1) = 1 at black to relu6(10 t + 1), and all of that is t's.
    gained = torch.tensor([[2.0, 5, 5], [0, 5, 5]])
    found = explain(model, x, DeepLift()).maps
    torch.testing.assert_close(found[0], torch.stack([2 * gained, -gained]) / 6)


@pytest.mark.parametrize("size", [(7, 10), (8, 9)])
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d((2, 3), (1, 2), (0, 1)),
        nn.MaxPool2d(2, 3, 1, ceil_mode=True),
    ],
    ids=str,
)
def test_max_pooling_by_relus(pool, size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_MaxOfReLUs(pool)(x), pool(x))


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.act, self.head, self.function = conv([[1], [-1]]), nn.ReLU(), conv([[1, 2]]), function

    def forward(self, x):
        return self.head(self.function(self.act(self.conv(x - 0.5)) - 0.1)).mean((2, 3))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.gate = nn.ReLU(), nn.Sigmoid()

    def forward(self, x):
        return (self.act(x * 2 - 1) * self.gate(x)).mean((2, 3))


@pytest.mark.parametrize("function", [F.relu, F.relu6, lambda x: x.clamp(min=0), F.gelu, F.leaky_relu])
@pytest.mark.parametrize("explainer", [GuidedBackprop(), DeepLift()])
def test_functional_activations_are_refused(explainer, function):
    with pytest.raises(InputError, match="in Functional is run"):
        explain(Functional(function), PIXELS, explainer)


@pytest.mark.parametrize("explainer", [GuidedBackprop(), GuidedGradCam(), DeepLift()])
def test_vits_are_refused_with_the_layer_that_does_not_do(explainer):
    with pytest.raises(InputError, match=r"in blocks.0.(norm1|mlp.act) \((LayerNorm|GELU)\) is run"):
        explain(vit(), images(1), explainer)


def test_deep_lift_refuses_what_it_cannot_take_apart():
    with pytest.raises(InputError, match="1 is run 2 times"):
        explain(rectified(reused=True), PIXELS, DeepLift())
    with pytest.raises(InputError, match="the model multiplies activations"):
        explain(Gated(), PIXELS, DeepLift())


def test_guided_backprop_refuses_a_model_without_relus():
    with pytest.raises(InputError, match="none is run"):
        explain(linear(), images(size=(6, 9)), GuidedBackprop())


def test_a_norm_kept_from_zero_is_no_activation():
    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return F.normalize(self.act(x - 0.4).flatten(1))[:, :2]

    explain(Cosine(), PIXELS, GuidedBackprop())


def test_options_out_of_range():
    for make in (
        lambda: IntegratedGradients(num_steps=0),
        lambda: IntegratedGradients(baseline="drop"),
        lambda: SmoothGrad(sigma=-0.1),
        lambda: SmoothGrad(num_samples=0),
        lambda: DeepLift(baseline="white"),
        lambda: Saliency(batch_size=-1),
    ):
        with pytest.raises(InputError):
            make()


# All of them


@pytest.mark.parametrize("explainer", CONTRIBUTIONS, ids=lambda e: type(e).__name__)
def test_a_contrast_is_the_difference_of_two_maps(explainer, resnet):
    x = images(1)
    found = explain(resnet, x, explainer, labels=[(1, 3), 1, 3]).maps[0]
    size = float(found.abs().max())
    torch.testing.assert_close(found[0], found[1] - found[2], rtol=1e-3, atol=1e-5 * size)


@pytest.mark.parametrize("method", ALL)
def test_different_labels_of_two_images_equal_separate_calls(method, resnet):
    x, explainer = images(), method(**FEW.get(method, {}))
    together = explain(resnet, x, explainer, labels=[[(0, 1), 3], [2]]).maps
    assert torch.equal(together[1, 1], torch.zeros(48, 64))
    first = explain(resnet, x[:1], explainer, labels=[(0, 1), 3]).maps
    second = explain(resnet, x[1:], explainer, labels=[2]).maps
    size = float(together.abs().max())
    torch.testing.assert_close(together[0], first[0], rtol=1e-4, atol=1e-5 * size)
    torch.testing.assert_close(together[1, 0], second[0, 0], rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("method", ALL)
def test_only_the_asked_for_pairs_are_run(method, monkeypatch):
    """Empty places cost nothing, and no pass holds more than `batch_size` images (DeepLift's: with their baselines)."""
    model = pointwise(conv([[10], [-10]], [-2, 6]), nn.ReLU(), conv([[1, 1], [1, -1]]))
    options = {"layer": "0"} if method is GuidedGradCam else {}
    sizes = []
    real = nn.Flatten.forward
    monkeypatch.setattr(nn.Flatten, "forward", lambda self, x: sizes.append(len(x)) or real(self, x))
    explain(model, PIXELS.expand(3, -1, -1, -1), method(batch_size=4, **options), labels=[[0], [0, 1], [1]])
    assert max(sizes) <= 4
    if method in (Saliency, InputXGradient):
        assert sizes == [3, 4]  # the logits first, then four pairs of six places


def record(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        [(m.training, getattr(m, "inplace", None), *(len(getattr(m, h)) for h in hooks)) for m in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        {k: v.clone() for k, v in model.state_dict().items()},
        [str(type(m)) for m in model.modules()],
        torch.get_rng_state(),
    )


def assert_same(found, expected):
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(found, dict | list | tuple):
        assert len(found) == len(expected)
        values = zip(*(x.values() if isinstance(x, dict) else x for x in (found, expected)), strict=True)
        for one, other in values:
            assert_same(one, other)
    else:
        assert found == expected


def in_training():
    """A method of which some parts are frozen, with gradients that a step may not have used up."""
    backbone = build_backbone("resnet10t", image_size=(48, 64))
    head = LinearHead(backbone.num_features, CLASSES, LinearHeadConfig())
    model = build_method(BaselineConfig(), Classifier(backbone, head)).train()
    for number, (parameter, module) in enumerate(zip(model.parameters(), model.modules(), strict=False)):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
        module.training = number % 4 > 0
    return model


@pytest.mark.parametrize("method", ALL)
def test_the_model_is_as_before(method):
    model, x = in_training(), images(1)
    before, pixels = record(model), x.clone()
    explain(model, x, method(**FEW.get(method, {})), labels=[1, 2])
    assert_same(record(model), before)
    assert not x.requires_grad
    assert torch.equal(x, pixels)


@pytest.mark.parametrize("method", ALL)
def test_the_model_is_as_before_after_an_exception(method, monkeypatch):
    model = in_training()
    before = record(model)
    calls = []

    def broken(self, x):
        calls.append(x)
        if x.requires_grad:  # in captum's pass
            raise RuntimeError("broken")
        return x.flatten(1).mean(1, keepdim=True) * self.weight.sum(1)

    monkeypatch.setattr(nn.Linear, "forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        explain(model, images(1), method(), labels=[1])
    assert_same(record(model), before)
