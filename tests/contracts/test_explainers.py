"""What every explainer of EXPLAINERS keeps: the model as it was, a map for each label asked for, each image by itself."""

import pytest
import timm
import torch
from explained import images, linear_model, resnet, vit

from mlvision.errors import InputError
from mlvision.explain import CONTROLS, EXPLAINERS, Explanation, build_explainer, explain

__all__ = ["images", "linear_model", "resnet", "vit"]  # fixtures


def test_every_name_builds_with_its_defaults():
    for name in {**EXPLAINERS, **CONTROLS}:
        build_explainer(name)


# Nothing of the model changes


def _state(model):
    return {
        "modes": [part.training for part in model.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "hooks": [
            (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
            for part in model.modules()
        ],
        "weights": [t.clone() for t in model.state_dict().values()],
        "fused": [getattr(part, "fused_attn", None) for part in model.modules()],
        "random": torch.get_rng_state(),
    }


def _same(a, b):
    def equal(x, y):
        return torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x is y or x == y

    return all(len(a[k]) == len(b[k]) and all(equal(x, y) for x, y in zip(a[k], b[k], strict=True)) for k in a)


class Failing(torch.nn.Module):
    """Raises in the middle of the second forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, images):
        features = self.model.forward_features(images)
        self.passes += 1
        if self.passes > 1:
            raise RuntimeError("in the middle")
        return self.model.forward_head(features)


def _in_training(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **({"img_size": 48, "depth": 2} if "vit" in name else {}))
    model.train()
    model.get_submodule("norm" if "vit" in name else "bn1").eval()  # a frozen part must stay frozen, and eval
    next(model.parameters()).requires_grad_(False)
    model(torch.rand(2, 3, 48, 48)).sum().backward()
    return model


# What a model cannot carry, and why.
UNFIT = {
    "resnet10t": {
        "attention_rollout": "resnet10t is no plain ViT",
        "attention_relevance": "resnet10t is no plain ViT",
        "own_maps": "ResNet has no label maps of its own",
    },
    "vit_tiny_patch16_224": {
        "guided_backprop": "made for networks of nn.ReLU modules .* and gelu in blocks.0.mlp.act",
        "guided_grad_cam": "made for networks of nn.ReLU modules .* and gelu in blocks.0.mlp.act",
        "deep_lift": "native_layer_norm in blocks.0.norm1 .* no rule for",
        "own_maps": "VisionTransformer has no label maps of its own",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in [*EXPLAINERS, *CONTROLS] for k in UNFIT])
def test_the_model_is_left_as_it_was(name, kind):
    model = _in_training(kind)
    options = {"num_samples": 4} if name in ("lime", "kernel_shap", "rise", "smooth_grad") else {}
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    before = _state(model)
    kept = images.clone()
    if name in UNFIT[kind]:
        with pytest.raises(InputError, match=UNFIT[kind][name]):
            explain(model, images, name, labels=[1, 3], **options)
    else:
        found = explain(model, images, name, labels=[1, 3], **options)
        assert isinstance(found, Explanation)
        assert found.labels.tolist() == [[1, 3]] * 2
        assert found.maps.shape[:2] == (2, 2)
        assert found.maps.isfinite().all()
        assert not found.flat.all()
        assert not found.maps.requires_grad
    assert _same(before, _state(model))
    assert torch.equal(images, kept)


@pytest.mark.parametrize("name", ["grad_cam", "occlusion", "lime", "saliency"])
def test_the_model_is_left_as_it_was_after_an_exception(name):
    model = Failing(_in_training("resnet10t"))
    options = {"layer": "model.layer3"} if name == "grad_cam" else {}
    image = torch.rand(1, 3, 48, 48)
    before = _state(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        explain(model, image, name, labels=[1], **options)
    assert _same(before, _state(model))


# Batches


@pytest.mark.slow
@pytest.mark.parametrize("name", list(EXPLAINERS))
def test_different_labels_in_a_batch_equal_separate_calls(name, resnet, images):
    options = {"num_samples": 8} if name in ("lime", "kernel_shap", "rise") else {}
    unfit = {
        "attention_rollout": "needs a ViT",
        "attention_relevance": "needs a ViT",
        "guided_grad_cam": "a label whose Grad-CAM is negative has no map",
        "own_maps": "needs a method with maps of its own",
    }
    if name in unfit:
        pytest.skip(unfit[name])
    both = explain(resnet, images, name, labels=[[4, 1], [(2, 0)]], **options)
    assert both.labels.tolist() == [[4, 1], [2, -1]]
    assert not both.maps[1, 1].any()
    first = explain(resnet, images[:1], name, labels=[4, 1], **options)
    torch.testing.assert_close(both.maps[:1], first.maps, rtol=1e-4, atol=1e-5 * first.maps.abs().max().item())
    if name in ("lime", "kernel_shap", "rise"):
        return  # the second image's masks are others when it is the first
    second = explain(resnet, images[1:], name, labels=[(2, 0)], **options)
    torch.testing.assert_close(both.maps[1:, :1], second.maps, rtol=1e-4, atol=1e-5 * second.maps.abs().max().item())
