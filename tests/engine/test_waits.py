"""No training step makes the host wait for a GPU: tried on tensors that have a device and no content, so without one."""

import warnings

import pytest
import torch
from factories import build_method, head_of, small_classifier
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mlvision.engine.optim import OptimConfig
from mlvision.engine.precision import Precision
from mlvision.engine.trainer import Trainer
from mlvision.label_maps.mix import Mix, MixConfig
from mlvision.losses import LOSSES
from mlvision.methods import METHODS, relabel, token_labeling
from mlvision.models import HEADS
from mlvision.types import Batch, CropBox, LabelMap

B, C, SIDE = 4, 6, 64


class Copies(TorchDispatchMode):
    """Collects copies between devices; what reads a value back raises on such tensors by itself."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {a.device.type for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and "copy" in func.name() and given - {result.device.type}:
            self.found.append(func.name())
        return result


def batch_on_gpu(fill):
    size = (B, 3, 5, 5)
    label_map = LabelMap(torch.rand(size), torch.zeros(size, dtype=torch.int64), "logit", fill)
    view = CropBox(torch.rand(B, 4), torch.zeros(B, dtype=torch.bool), torch.zeros(B, dtype=torch.int64))
    images = torch.zeros(B, 3, SIDE, SIDE, dtype=torch.uint8)
    return Batch(images, torch.zeros(B, C), torch.arange(B), view, label_map).to("cuda")


def move_to_gpu(method):
    """As `method.to("cuda")`, which tensors without content refuse."""
    for module in method.modules():
        for name, value in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty_like(value, device="cuda")))
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(value, device="cuda"))


@pytest.mark.parametrize(
    ("name", "options", "fill"),
    [
        *((name, {}, "of each cell") for name in METHODS),
        *(("baseline", {"loss": loss()}, "none") for loss in LOSSES.values()),
        *(("baseline", {"head": head}, "none") for head in HEADS),
        *(
            (name, options, fill)
            for name, options in (
                ("relabel", {"target": "softmax", "operator": "mean_logit"}),
                ("relabel", {"target": "multilabel"}),
                ("relabel", {"operator": "log_sum_exp"}),
                ("relabel", {"target": "gated"}),
                ("relabel", {"region": "image"}),
                ("relabel", {"mix": MixConfig(cutmix=1.0)}),
                ("token_labeling", {"mix": 1.0}),
            )
            for fill in ("of each cell", "one number")
        ),
    ],
)
def test_a_training_step_does_not_wait(name, options, fill, monkeypatch):
    head = options.get("head") or head_of(name)
    classifier = small_classifier(head, C, SIDE, "test_resnet")
    method = build_method(METHODS[name](**{key: options[key] for key in options if key != "head"}), classifier).train()
    if "mix" in options:  # what the host draws for itself
        drawn = Mix(MixConfig(cutmix=1.0), 0.75, (0, 0, 1, 1))
        for room in (relabel, token_labeling):
            monkeypatch.setattr(room, "draw_mix", lambda *_: drawn)

    def backward(loss):  # autograd asks the driver; it runs the same kinds of operations as the forward pass
        for parameter in method.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    optim = OptimConfig(clip_norm=1.0)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast: there is no GPU
        move_to_gpu(method)
        batch = batch_on_gpu(torch.zeros(B, 5, 5) if fill == "of each cell" else 0.0)
        precision = Precision("bf16", torch.device("cuda"))
        trainer = Trainer(method, optim, precision, steps_per_epoch=1000, images_per_step=B, keys=list("abcd"))
        with Copies() as copies:
            trainer.step(batch)
    assert not copies.found
