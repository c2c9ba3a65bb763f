"""What can be explained: models in shells, of other precisions, and with answers and images of other kinds."""

import logging
from collections import namedtuple
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from factories import build_method
from PIL import Image
from timm.data import resolve_model_data_config
from timm.utils import ModelEmaV3
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from mlvision.errors import InputError
from mlvision.explain import EXPLAINERS, Subject, explain
from mlvision.losses import SoftmaxConfig
from mlvision.methods import BaselineConfig
from mlvision.models import BackboneConfig, LinearHeadConfig, build_classifier
from mlvision.runs.build import compile_backbone


def normalised(model, images):
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def compiled_in_place(model):
    model = deepcopy(model)
    model.compile(backend="eager")
    return model


def with_compiled_part(model):
    model = deepcopy(model)
    model.layer4 = torch.compile(model.layer4, backend="eager")
    return model


SHELLS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": compiled_in_place,
    "compiled part": with_compiled_part,
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "AveragedModel": AveragedModel,
    "ModelEmaV3": ModelEmaV3,
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_model_in_a_shell_is_explained_as_the_model_itself(shell, resnet, images, group):
    inside = SHELLS[shell](resnet).eval()
    inside(normalised(resnet, images))  # what compiles does it before a hook comes
    for name in ("grad_cam", "occlusion", "guided_backprop", "dense_head"):
        ours, bare = explain(inside, images, name, labels=[1, 3]), explain(resnet, images, name, labels=[1, 3])
        torch.testing.assert_close(ours.logits, resnet(normalised(resnet, images)).detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.maps, bare.maps, rtol=1e-3, atol=1e-4 * bare.maps.abs().max().item())
    torch.testing.assert_close(
        explain(inside, images, layer="layer3").maps, explain(resnet, images, layer="layer3").maps, rtol=1e-3, atol=1e-5
    )


def test_a_method_in_a_shell_keeps_its_softmax_and_its_own_maps(images):
    classifier = build_classifier(BackboneConfig("resnet10t"), LinearHeadConfig(), 3, image_size=(48, 80))
    method = build_method(BaselineConfig(loss=SoftmaxConfig()), classifier).eval()
    bare = explain(method, images, "dense_head")
    for shell in (nn.DataParallel(method), torch.compile(method, backend="eager")):
        found = explain(shell, images, "dense_head")
        assert found.groups == (3,)
        torch.testing.assert_close(found.maps, bare.maps)


def test_a_method_with_a_compiled_backbone_is_explained_as_it_was_written(images):
    torch.manual_seed(0)
    classifier = build_classifier(BackboneConfig("vit_tiny_patch16_224"), LinearHeadConfig(), 3, image_size=(48, 80))
    method = build_method(BaselineConfig(), classifier).eval()
    names = ("grad_cam", "attention_relevance", "dense_head")
    bare = [explain(method, images, name).maps for name in names]
    compile_backbone(method, "eager")
    logits = method.predict(images)
    for name, expected in zip(names, bare, strict=True):
        found = explain(method, images, name)
        torch.testing.assert_close(found.maps, expected)
        torch.testing.assert_close(found.logits, logits.detach(), rtol=1e-4, atol=1e-4)


class Wrapper(nn.Module):
    def __init__(self, model, prepare=nn.Identity()):  # noqa: B008
        super().__init__()
        self.model, self.prepare = model, prepare

    def forward(self, images):
        return self.model(self.prepare(images))


class Normalise(nn.Module):
    def __init__(self, model):
        super().__init__()
        config = resolve_model_data_config(model)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(1, -1, 1, 1))

    def forward(self, images):
        return (images - self.mean) / self.std


class ByParts(Wrapper):
    """Never calls the timm model itself."""

    def forward(self, images):
        return self.model.forward_head(self.model.forward_features(images))


class Logits(Wrapper):
    """Of two of the classes."""

    def forward(self, images):
        return self.model(images)[:, [3, 1]]


@pytest.mark.parametrize("kind", [Wrapper, ByParts, nn.Sequential])
def test_images_are_normalised_for_a_network_around_a_timm_model(kind, resnet, images, caplog):
    expected = resnet(normalised(resnet, images)).detach()
    with caplog.at_level(logging.WARNING, "mlvision"):
        found = explain(kind(resnet), images, "occlusion", labels=[0])
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    assert f"{kind.__name__} hands its images to timm's resnet10t as they are" in caplog.text


def test_a_network_that_normalises_by_itself_or_answers_otherwise_is_taken_as_it_is(resnet, images, caplog):
    expected = resnet(normalised(resnet, images)).detach()
    with caplog.at_level(logging.WARNING, "mlvision"):
        for model in (Wrapper(resnet, Normalise(resnet)), nn.Sequential(Normalise(resnet), resnet)):
            torch.testing.assert_close(explain(model, images, "occlusion").logits, expected, rtol=1e-4, atol=1e-4)
        assert not caplog.text
    found = explain(Logits(resnet), images, "occlusion")
    torch.testing.assert_close(found.logits, expected[:, [3, 1]], rtol=1e-4, atol=1e-4)
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    torch.testing.assert_close(explain(own, images, "occlusion").logits, own(images).detach())


@pytest.mark.parametrize(
    "name", ["grad_cam", "grad_cam_pp", "attention_rollout", "attention_relevance", "occlusion", "drop"]
)
def test_distilled_deit_is_explained_by_both_its_heads(name):
    torch.manual_seed(0)
    options = {"num_classes": 3, "depth": 2, "img_size": (48, 80)}
    model = timm.create_model("deit_tiny_distilled_patch16_224", **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    images = torch.rand(2, 3, 48, 80)
    name, extra = ("occlusion", {"baseline": "drop"}) if name == "drop" else (name, {})
    found = explain(model, images, name, **extra)
    torch.testing.assert_close(found.logits, model(normalised(model, images)).detach(), rtol=1e-4, atol=1e-4)
    if name in ("grad_cam", "grad_cam_pp"):  # the tail of two tokens is the whole last block
        torch.testing.assert_close(
            found.maps, explain(model, images, name, layer="blocks.1.norm1").maps, rtol=1e-3, atol=1e-5
        )
        assert found.maps.shape[2:] == (3, 5)


def test_a_timm_model_with_another_head_still_has_its_map(images):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4).eval()
    model.fc = nn.Sequential(nn.Linear(512, 8), nn.Tanh(), nn.Linear(8, 4))
    maps = explain(model, images).maps
    torch.testing.assert_close(maps, explain(model, images, layer="layer4").maps, rtol=1e-3, atol=1e-7)
    with pytest.raises(InputError, match="dense_head: .* its classifier is of type Sequential, not one linear layer"):
        explain(model, images, "dense_head")


def test_a_timm_model_for_grey_images_is_normalised_as_timm_adapts_it(images):
    model = timm.create_model("resnet10t", num_classes=4, in_chans=1).eval()
    config, grey = resolve_model_data_config(model), images[:, :1]
    mean, std = (sum(config[key]) / 3 for key in ("mean", "std"))
    torch.testing.assert_close(explain(model, grey).logits, model((grey - mean) / std).detach(), rtol=1e-4, atol=1e-4)


def test_the_dense_head_of_a_small_vit_is_read_at_its_own_size():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=2).eval()
    image = torch.rand(1, 3, 64, 64)
    maps = explain(model, image, "dense_head").maps
    tokens = model.forward_features(normalised(model, image))[:, 1:]
    torch.testing.assert_close(maps[0], model.head(tokens)[0].T.unflatten(1, (4, 4)).detach(), rtol=1e-4, atol=1e-4)


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "name", ["grad_cam", "occlusion", "saliency", "integrated_gradients", "guided_backprop", "dense_head"]
)
def test_a_model_of_another_precision_is_explained_in_it(name, dtype, resnet, images):
    few = {"num_steps": 6} if name == "integrated_gradients" else {}  # half precision is slow on a CPU
    exact = explain(resnet, images, name, labels=[1, 3], **few)
    other = explain(deepcopy(resnet).to(dtype), images, name, labels=[1, 3], **few)
    assert other.maps.dtype == torch.float32
    assert other.logits.dtype == torch.promote_types(dtype, torch.float32)
    least = {torch.float64: 0.9999, torch.float16: 0.99, torch.bfloat16: 0.9}[dtype]
    assert np.corrcoef(exact.maps.flatten(), other.maps.flatten())[0, 1] > least


@pytest.mark.parametrize("name", ["grad_cam", "attention_rollout", "attention_relevance"])
def test_a_vit_in_half_precision(name, vit, images):
    exact, half = (explain(model, images, name, labels=[1]) for model in (vit, deepcopy(vit).bfloat16()))
    assert np.corrcoef(exact.maps.flatten(), half.maps.flatten())[0, 1] > 0.9


def test_a_method_in_half_precision(images):
    torch.manual_seed(0)
    classifier = build_classifier(BackboneConfig("resnet10t"), LinearHeadConfig(), 3, image_size=(48, 80))
    method = build_method(BaselineConfig(), classifier).eval()
    nn.init.normal_(classifier.head.linear.weight)
    exact, half = (explain(model, images).maps for model in (method, deepcopy(method).bfloat16()))
    assert np.corrcoef(exact.flatten(), half.flatten())[0, 1] > 0.95


# Answers


class Answering(nn.Module):
    """Mean colours, and what else a forward pass makes of them."""

    def __init__(self, answer):
        super().__init__()
        self.stem, self.answer = nn.Conv2d(3, 3, 1), answer

    def forward(self, images):
        return self.answer(self.stem(images).mean((2, 3)))


Output = namedtuple("Output", ["logits", "aux"])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda z: {"logits": z, "aux": z}, "gives a dict of logits, aux, expected one tensor of logits"),
        (lambda z: (z, z), "gives a tuple, expected one tensor"),
        (lambda z: Output(z, z), "gives a Output, expected one tensor"),
        (lambda z: [z], "gives a list"),
        (lambda z: None, "gives a NoneType"),
        (lambda z: z.detach().numpy(), "gives a ndarray"),
        (lambda z: z[:, 0], r"expected logits \[2, C\], got \[2\]"),
        (lambda z: z[:1], r"expected logits \[2, C\], got \[1, 3\]"),
        (lambda z: z[..., None, None], r"expected logits \[2, C\], got \[2, 3, 1, 1\]"),
        (lambda z: z / 0, "logits are not finite"),
    ],
)
@pytest.mark.parametrize("name", ["grad_cam", "occlusion", "saliency"])
def test_answers_that_are_no_logits_are_refused(name, answer, message):
    options = {"layer": "stem"} if name == "grad_cam" else {}
    with pytest.raises(InputError, match=message):
        explain(Answering(answer), torch.rand(2, 3, 16, 16), name, labels=[0], **options)


def _without_gradient(context):
    class Cut(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            with context():
                return self.model(images)

    return Cut


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", EXPLAINERS)
def test_a_forward_pass_without_gradients_is_named(name, context, linear_model):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), linear_model)
    model = _without_gradient(context)(model)
    options = {"layer": "model.0"} if "cam" in name else {}
    options |= {"num_samples": 8} if name in ("lime", "kernel_shap", "rise", "smooth_grad") else {}
    images = torch.rand(2, 3, 12, 18)
    if name in ("occlusion", "coarse_to_fine", "lime", "kernel_shap", "rise"):
        assert explain(model, images, name, labels=[0], **options).maps.any()
        return
    reason = (
        "no score depends on model.0, or .* torch.no_grad"
        if "cam" in name and "guided" not in name
        else "torch.no_grad"
    )
    if name in ("attention_rollout", "attention_relevance", "dense_head", "own_maps"):
        reason = "neither a method nor a timm model|has no label maps of its own"
    with pytest.raises(InputError, match=reason):
        explain(model, images, name, labels=[0], **options)


# Images and labels


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 48, 80), r"got \[3, 48, 80\]; images\[None\] is a batch of one"),
        (torch.rand(48, 80), r"expected \[B, channels, H, W\], got \[48, 80\]"),
        (torch.rand(0, 3, 48, 80), r"got \[0, 3, 48, 80\]"),
        (Image.new("RGB", (80, 48)), r"expected a tensor \[B, channels, H, W\], got Image"),
        ([Image.new("RGB", (80, 48))], "got list"),
        (np.zeros((1, 3, 48, 80), np.float32), "got ndarray"),
        ("a.jpg", "got str"),
        (torch.full((1, 3, 48, 80), 7), r"float in \[0, 1\], got torch.int64"),
        (torch.rand(1, 4, 48, 80), r"resnet10t takes none of \[4, 48, 80\]"),
    ],
)
def test_images_that_are_no_batch_are_refused(images, message, resnet):
    for name in ("grad_cam", "occlusion", "dense_head"):
        with pytest.raises(InputError, match=message):
            explain(resnet, images, name)


def test_images_of_a_size_or_of_channels_that_a_model_does_not_take_are_refused(vit):
    for name in ("grad_cam", "occlusion"):
        with pytest.raises(
            InputError, match=r"vit_tiny_patch16_224 takes none of \[3, 96, 160\] \(Input height \(96\)"
        ):
            explain(vit, torch.rand(1, 3, 96, 160), name)
    classifier = build_classifier(BackboneConfig("vit_tiny_patch16_224"), LinearHeadConfig(), 3, image_size=(32, 48))
    method = build_method(BaselineConfig(), classifier).eval()
    with pytest.raises(InputError, match="gives no spatial map for images of 96x160"):
        explain(method, torch.rand(1, 3, 96, 160))
    with pytest.raises(InputError, match=r"takes 3 channels, got \[1, 1, 32, 48\]"):
        explain(method, torch.rand(1, 1, 32, 48))


def test_what_is_no_module_is_refused():
    with pytest.raises(InputError, match="expected an nn.Module, got function"):
        Subject(lambda images: images)


def test_one_label_and_arrays_of_labels(resnet, images):
    both = explain(resnet, images, labels=[2, 0])
    torch.testing.assert_close(explain(resnet, images, labels=2).maps, both.maps[:, :1])
    torch.testing.assert_close(explain(resnet, images, labels=np.array([2, 0])).maps, both.maps)
    each = explain(resnet, images, labels=np.array([[2, -1], [0, 2]]))
    assert each.labels.tolist() == [[2, -1], [0, 2]]
    torch.testing.assert_close(each.maps[1], both.maps[1].flip(0))
