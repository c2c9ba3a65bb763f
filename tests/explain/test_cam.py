"""Class activation maps against captum, pytorch-grad-cam and equations written out."""

from functools import partial

import pytest
import timm
import torch
import torchvision
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM as PeerGradCam
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timm.layers import resample_abs_pos_embed
from torch import nn

from mlvision.errors import InputError
from mlvision.explain import Subject, cam, explain
from mlvision.explain.cam import differentiate
from mlvision.explain.selection import select


@pytest.mark.parametrize("layer", ["", "layer3", "layer2.0"])
def test_grad_cam_equals_captums_for_all_labels(layer, resnet, images):
    subject = Subject(resnet)
    peer = LayerGradCam(subject.logits, resnet.get_submodule(layer or "layer4"))
    ours = explain(resnet, images, "grad_cam", layer=layer).maps
    for label in range(5):
        theirs = peer.attribute(images, target=label)[:, 0]
        assert (ours[:, label] - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch16_dinov3"])
def test_grad_cam_on_vit_agrees_with_pytorch_grad_cam(name):
    options = {"img_size": (48, 80)} if "dinov3" not in name else {}
    model = timm.create_model(name, num_classes=4, depth=3, **options).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    images = torch.rand(1, 3, 48, 80)
    if "dinov3" in name:
        images = torch.rand(1, 3, 256, 256)
    prefix, grid = model.num_prefix_tokens, (images.shape[2] // 16, images.shape[3] // 16)
    layer = f"blocks.{len(model.blocks) - 1}.norm1"
    subject = Subject(model)
    ours = explain(model, images, "grad_cam", layer="" if model.global_pool == "token" else layer).maps[0]

    def to_map(tokens):
        return tokens[:, prefix:].mT.unflatten(2, grid)

    peer = PeerGradCam(model, [model.get_submodule(layer)], reshape_transform=to_map)
    compared = 0
    for label in range(4):
        theirs = torch.from_numpy(peer(subject.normalise(images), [ClassifierOutputTarget(label)])[0])
        mine = nn.functional.interpolate(ours[label].clamp(min=0)[None, None], theirs.shape, mode="bilinear")[0, 0]
        if ours[label].max() > 0:
            assert torch.corrcoef(torch.stack([mine.flatten(), theirs.flatten()]))[0, 1] >= 0.999
            compared += 1
    assert compared


def test_the_class_tokens_tail_is_the_whole_last_block(vit, images):
    subject, selection = Subject(vit), select("all", torch.zeros(2, 5))
    short = differentiate(subject, images, selection, "")
    whole = differentiate(subject, images, selection, "blocks.2.norm1")
    for ours, theirs in zip(short, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    assert short[0].shape[2:] == (3, 5)  # rows first


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "densenet121", "convnext_atto", "mobilenetv3_small_100"]
)
def test_closed_form_and_autograd_agree_on_other_networks(name):
    options = {"img_size": (64, 96), "window_size": 2} if "swin" in name else {}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).eval()
    images = torch.rand(1, 3, 64, 96)
    subject = Subject(model)
    maps = explain(model, images, "hires_cam").maps
    assert subject.backbone is not None
    backbone = subject.backbone
    cells, prefix = backbone.to_cells(model.forward_features(subject.normalise(images)), (64, 96))
    leaf = cells.detach().requires_grad_()
    logits = model.forward_head(backbone.from_cells(leaf, prefix))
    for label in range(3):
        (gradient,) = torch.autograd.grad(logits[0, label], leaf, retain_graph=True)
        expected = (gradient * leaf).sum(1).detach()
        torch.testing.assert_close(maps[:, label], expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


class Tiny(nn.Module):
    """logit = the sum of squares of one channel's cells, minus the other's: gradients differ from cell to cell."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Identity()

    def forward(self, images):
        squares = self.stem(images).square().sum((2, 3))
        return torch.stack([squares[:, 0] - squares[:, 1], squares[:, 2]], 1)


def test_a_linear_head_needs_no_autograd_but_for_one_score(resnet, images, monkeypatch):
    calls = []
    counted = cam.gradients
    monkeypatch.setattr(cam, "gradients", lambda logits, *rest: calls.append(logits.shape) or counted(logits, *rest))
    found = explain(resnet, images, "grad_cam").maps
    assert [shape[0] for shape in calls] == [1]  # the comparison on one image; what is refused there is differentiated
    assert len(found) > 1


def test_each_cam_by_hand():
    """A = images; dz_0/dA = 2 A_0 and -2 A_1."""
    images = torch.tensor([[[[0.1, 0.2, 0.4]], [[0.5, 0.1, 0.3]], [[0.0, 0.0, 1.0]]]])
    a, b, c = images[0, 0], images[0, 1], images[0, 2]
    maps = {
        name: explain(Tiny(), images, name, layer="stem").maps[0] for name in ("grad_cam", "hires_cam", "layer_cam")
    }
    torch.testing.assert_close(maps["grad_cam"][0], 2 * a.mean() * a - 2 * b.mean() * b)
    torch.testing.assert_close(maps["hires_cam"][0], 2 * a**2 - 2 * b**2)
    torch.testing.assert_close(maps["layer_cam"][0], 2 * a**2)
    torch.testing.assert_close(maps["hires_cam"][1], 2 * c**2)


def test_grad_cam_plus_plus_against_its_equation(resnet, images):
    subject, selection = Subject(resnet), select("all", torch.zeros(2, 5))
    a, g = (x.double() for x in differentiate(subject, images, selection, "layer3"))
    ours = explain(resnet, images, "grad_cam_pp", layer="layer3").maps
    for image in range(2):
        for label in range(5):
            expected = torch.zeros(a.shape[2:], dtype=torch.float64)
            for channel in range(a.shape[1]):
                grad = g[image, label, channel]
                alpha = grad**2 / (2 * grad**2 + a[image, channel].sum() * grad**3)
                expected += (alpha.nan_to_num() * grad.clamp(min=0)).sum() * a[image, channel]
            scale = expected.abs().max()
            assert (ours[image, label] - expected).abs().max() <= 1e-4 * scale


def test_grad_cam_plus_plus_stays_bounded_at_linear_bottlenecks():
    """Channels sum to -2 + 1e-4 and to 6, both slopes are 1: by the equation the first would weigh 1e4, the second 1/8."""

    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            self.bottleneck = nn.Conv2d(3, 2, 1, bias=False)
            self.bottleneck.weight.data = torch.tensor([[-1.0, 0, 0], [0, 1, 0]])[..., None, None]

        def forward(self, images):
            return self.bottleneck(images).sum((1, 2, 3))[:, None]

    image = torch.zeros(1, 3, 2, 4)
    image[0, 0] = (2 - 1e-4) / 8
    image[0, 1] = 6 / 8
    found = explain(Channels(), image, "grad_cam_pp", layer="bottleneck", allow_flat=True).maps
    # sum over cells of weight * activation: half of the whole slope where nothing is positive, 1 / (2 + 6) where 6 is
    expected = 8 * (1 / 2) * -image[0, 0] + 8 * (1 / 8) * image[0, 1]
    torch.testing.assert_close(found[0, 0], expected)


def test_the_weights_of_grad_cam_plus_plus_are_at_most_half_of_the_positive_slopes():
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_050", num_classes=3).eval()
    images, layer = torch.rand(1, 3, 64, 96), "blocks.5.2.bn3"
    a, g = differentiate(Subject(model), images, select("all", torch.zeros(1, 3)), layer)
    assert a.min() < 0
    most = torch.einsum("bld,bdhw->blhw", g.clamp(min=0).sum((3, 4)), a.abs()) / 2
    assert (explain(model, images, "grad_cam_pp", layer=layer).maps.abs() <= most * (1 + 1e-4)).all()


def test_a_layer_that_does_not_exist_gets_the_nearest_names(resnet, images):
    with pytest.raises(InputError, match="no module 'layer5'; nearest: layer"):
        explain(resnet, images, layer="layer5")


def test_a_layer_after_the_read_out_is_refused(vit, images):
    with pytest.raises(InputError, match=r"gradient of every score at norm is zero.*blocks.<last>.norm1"):
        explain(vit, images, layer="norm")


# On which grid a layer's output lies


class _Axes(nn.Module):
    """A map of 8 x 16 cells for 32 x 64 pixels, whose axes stand in several orders on the way."""

    def __init__(self):
        super().__init__()
        self.channels_first = nn.Conv2d(3, 8, 4, 4)
        self.channels_last, self.columns_first, self.attention = nn.LayerNorm(8), nn.Identity(), nn.Identity()
        self.windows, self.head = nn.Identity(), nn.Linear(8, 4)

    def forward(self, images):
        cells = self.channels_last(self.channels_first(images).permute(0, 2, 3, 1))
        cells = self.columns_first(cells.transpose(1, 2))
        tokens = cells.flatten(1, 2)
        mixed = self.attention((tokens @ tokens.mT).softmax(-1)[:, None])[:, 0] @ tokens
        windows = self.windows(mixed.unflatten(1, (4, -1)).flatten(0, 1))
        return self.head(windows.mean(1).unflatten(0, (-1, 4)).mean(1))


@pytest.mark.parametrize(
    ("layer", "order"), [("channels_first", (1, 2, 3)), ("channels_last", (3, 1, 2)), ("columns_first", (3, 2, 1))]
)
def test_rows_and_columns_are_found_wherever_they_stand(layer, order):
    torch.manual_seed(0)
    model, images, outputs = _Axes().eval(), torch.rand(2, 3, 32, 64), []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, output: outputs.append(output))
    logits = model(images)
    handle.remove()
    for label in range(4):
        (slope,) = torch.autograd.grad(logits[:, label].sum(), outputs[0], retain_graph=True)
        expected = (slope * outputs[0]).permute(0, *order).sum(1).detach()
        torch.testing.assert_close(
            explain(model, images, "hires_cam", [label], layer=layer).maps[:, 0], expected, rtol=1e-3, atol=1e-6
        )
    assert expected.shape == (2, 8, 16)


def test_outputs_that_are_no_map_of_each_image_are_refused(vit):
    model, images = _Axes().eval(), torch.rand(2, 3, 32, 64)
    with pytest.raises(InputError, match="no axis grows with the image's height only"):
        explain(model, images, layer="attention")  # [2, 1, 128, 128]
    with pytest.raises(InputError, match="windows gives 8 rows for 2 images"):
        explain(model, images, layer="windows")
    with pytest.raises(InputError, match=r"attn.q_norm, \(2, 3, 16, 64\), is no map"):
        explain(vit, torch.rand(2, 3, 48, 80), layer="blocks.1.attn.q_norm")
    square = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2, embed_dim=33, img_size=(64, 128)).eval()
    with pytest.raises(InputError, match=r"\(2, 33, 33\)"):  # tokens first or channels first
        explain(square, torch.rand(2, 3, 64, 128), layer="blocks.0")


class _OneSize(nn.Module):
    """It takes images of 32 x 16 only, or resizes them to that."""

    def __init__(self, resize):
        super().__init__()
        self.convolution, self.rest, self.head = nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Linear(8, 4)
        self.resize = resize

    def forward(self, images):
        images = nn.functional.interpolate(images, (32, 16)) if self.resize else images
        assert images.shape[2:] == (32, 16)
        return self.head(self.rest(self.convolution(images)).mean((2, 3)))


@pytest.mark.parametrize("resize", [False, True])
def test_of_a_network_for_one_size_convolutions_are_mapped_and_the_rest_is_refused(resize):
    model, images = _OneSize(resize).eval(), torch.rand(2, 3, 32, 16)
    assert explain(model, images, layer="convolution").maps.shape == (2, 4, 8, 4)
    with pytest.raises(InputError, match="rows and columns cannot be told"):
        explain(model, images, layer="rest")


GRIDS = [
    ("swin_t", {}, "features.7", (2, 4)),  # torchvision's, [B, h, w, C] throughout
    ("swin_t", {}, "features.5.1.mlp.0", (4, 8)),
    ("vgg11", {}, "avgpool", (7, 7)),
    ("swin_tiny_patch4_window7_224", {"img_size": (64, 128), "window_size": 2}, "layers.3.blocks.1", (2, 4)),
    ("swin_tiny_patch4_window7_224", {"img_size": (64, 128), "window_size": 2}, "patch_embed.proj", (16, 32)),
    ("convnext_atto", {}, "stages.3.blocks.1.norm", (2, 4)),  # [B, h, w, C] within [B, C, h, w]
    ("convnext_atto", {}, "stages.3", (2, 4)),
    ("pvt_v2_b0", {}, "", (2, 4)),
    ("pvt_v2_b0", {}, "stages.2", (4, 8)),
    ("xcit_nano_12_p16_224", {}, "", (4, 8)),
    ("eva02_tiny_patch14_224", {"img_size": (56, 112), "depth": 2}, "blocks.1", (4, 8)),
    ("cait_xxs24_224", {"img_size": (64, 128), "depth": 2}, "", (4, 8)),  # its class token comes after the blocks
    ("mixer_s32_224", {"img_size": (64, 128)}, "", (2, 4)),
    ("vit_base_patch14_reg4_dinov2", {"img_size": (56, 112), "depth": 2, "embed_dim": 96, "num_heads": 3}, "", (4, 8)),
    (
        "vit_tiny_patch16_224",
        {"img_size": (64, 128), "depth": 2, "class_token": False, "global_pool": "avg"},
        "",
        (4, 8),
    ),
    ("vit_tiny_patch16_224", {"dynamic_img_size": True, "depth": 2}, "", (4, 8)),
    ("vit_tiny_patch16_224", {"dynamic_img_size": True, "depth": 2}, "patch_embed", (4, 8)),
]


@pytest.mark.parametrize(("name", "options", "layer", "grid"), GRIDS)
def test_grids_of_known_networks(name, options, layer, grid):
    torch.manual_seed(0)
    library = torchvision.models if name in ("swin_t", "vgg11") else None
    build = getattr(library, name) if library else partial(timm.create_model, name)
    model = build(num_classes=3, **options).eval()
    with torch.no_grad():  # some heads start at 0
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    images = torch.rand(1, 3, *options.get("img_size", (64, 128)))
    assert explain(model, images, layer=layer).maps.shape == (1, 3, *grid)


@pytest.mark.parametrize("size", [(112, 448), (96, 160)])
@pytest.mark.parametrize("name", ["grad_cam", "hires_cam", "attention_rollout", "attention_relevance", "dense_head"])
def test_a_vit_for_images_of_any_size_is_explained_on_their_own_grid(name, size):
    """A model that is built for that very size is the oracle; 112 x 448 has as many patches as 224 x 224."""
    torch.manual_seed(0)
    options = {"num_classes": 3, "depth": 2, "embed_dim": 48, "num_heads": 3}
    dynamic = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **options).eval()
    fixed = timm.create_model("vit_tiny_patch16_224", img_size=size, **options).eval()
    with torch.no_grad():
        for parameter in dynamic.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        grid = (size[0] // 16, size[1] // 16)
        state = dynamic.state_dict()
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=1)
        fixed.load_state_dict(state)
    images = torch.rand(2, 3, *size)
    ours, oracle = explain(dynamic, images, name).maps, explain(fixed, images, name).maps
    assert ours.shape[2:] == grid
    torch.testing.assert_close(ours, oracle, rtol=1e-3, atol=1e-4 * oracle.abs().max().item())


def test_layers_that_are_no_maps_are_refused(resnet, vit, images):
    with pytest.raises(InputError, match="no map and no grid"):
        explain(resnet, images, layer="global_pool")
    with pytest.raises(InputError, match="name the module"):
        explain(Tiny(), images)
    shared = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    shared[2] = shared[0]
    twice = nn.Sequential(shared, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="runs 2 times"):
        explain(twice, images, layer="0.0")


def test_activations_written_in_place_afterwards_do_not_matter(images):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    activations = model[0](images).detach()
    open_ = (activations > 0).float()
    weight = model[4].weight.detach() / activations[0, 0].numel()
    expected = torch.einsum("kd,bdhw,bdhw->bkhw", weight, open_, activations)
    torch.testing.assert_close(explain(model, images, "hires_cam", layer="0").maps, expected.detach())
