"""Copies of models in which every activation is a module that captum knows, or a reason why there can be none."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mlvision.errors import InputError
from mlvision.explain.subject import Subject


class _ClippedReLU(nn.ReLU):
    """ReLU6 that captum's guided backpropagation takes for a ReLU: its own gradient, of which the positive part is kept."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu6(input)


class _TwoReLUs(nn.Module):
    """ReLU6 for DeepLift, whose slope between two points is the difference of the slopes of two ReLUs.

    Not for guided backpropagation: that would let pass where it is saturated, and turn the sign.
    """

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.low(x) - self.high(x - 6)


class _MaxOfReLUs(nn.Module):
    """Max pooling along one axis and then the other, a ReLU for each further cell of a window."""

    def __init__(self, pool: nn.MaxPool2d):
        super().__init__()
        both = (pool.kernel_size, pool.stride, pool.padding)
        sizes = ((n, n) if isinstance(n, int) else n for n in both)
        self._axes = list(zip(*sizes, strict=True))
        self._ceil_mode = pool.ceil_mode
        self.relus = nn.ModuleList(nn.ModuleList(nn.ReLU() for _ in range(kernel - 1)) for kernel, _, _ in self._axes)

    def forward(self, x: Tensor) -> Tensor:
        for axis, (kernel, stride, padding), relus in zip((-2, -1), self._axes, self.relus, strict=True):
            size = x.shape[axis]
            reach = size + 2 * padding - kernel + (stride - 1 if self._ceil_mode else 0)
            num = reach // stride + 1
            if self._ceil_mode and (num - 1) * stride >= size + padding:
                num -= 1  # no window starts in the padding behind
            starts = torch.arange(num, device=x.device) * stride - padding
            # A cell of the padding counts as the nearest of the image, which the window has too.
            cells = [x.index_select(axis, (starts + n).clamp(0, size - 1)) for n in range(kernel)]
            x = cells[0]
            for relu, cell in zip(relus, cells[1:], strict=True):  # pyright: ignore[reportArgumentType]
                x = x + relu(cell - x)
        return x


# Activations that are neither ReLUs nor gates in (0, 1)
_RECTIFIERS = {
    *("relu", "hardtanh", "gelu", "silu", "elu", "leaky_relu", "rrelu_with_noise", "hardswish", "mish", "softplus"),
    *("_prelu_kernel", "threshold", "clamp", "clamp_min"),
}
_NONLINEAR = {
    *_RECTIFIERS,
    *("sigmoid", "hardsigmoid", "tanh", "_softmax", "native_layer_norm", "native_group_norm", "_fused_rms_norm"),
    *("max_pool2d_with_indices", "adaptive_max_pool2d", "_scaled_dot_product_attention"),
}
_LIFTED = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus)


def guidable(subject: Subject, pixels: Tensor) -> Subject:
    """For guided backpropagation: a copy whose only rectifiers are modules of the type nn.ReLU.

    Raises:
        InputError: there are others, or none.
    """
    copy = subject.copy()
    _replace(copy.module, lambda module: _ClippedReLU() if type(module) is nn.ReLU6 else None)
    seen = _watch(copy, pixels, _untangle(copy.module, lambda module: isinstance(module, nn.ReLU)), _RECTIFIERS)
    if seen.others or not seen.calls:
        raise InputError(
            "guided_backprop: it is made for networks of nn.ReLU modules (ReLU6 too), and "
            + (f"{seen.others[0]} is run" if seen.others else "none is run")
            + " (take saliency or smooth_grad)"
        )
    return copy


def liftable(subject: Subject, pixels: Tensor) -> Subject:
    """For DeepLift: a copy whose nonlinearities are modules that captum has a rule for, each run once.

    Raises:
        InputError: there are others, or one is run twice.
    """
    copy = subject.copy()

    def other(module: nn.Module) -> nn.Module | None:
        if type(module) is nn.ReLU6:
            return _TwoReLUs()
        if type(module) is nn.MaxPool2d and module.dilation in (1, (1, 1)):
            return _MaxOfReLUs(module)
        return None

    _replace(copy.module, other)
    seen = _watch(copy, pixels, _untangle(copy.module, lambda module: type(module) in _LIFTED), _NONLINEAR)
    if seen.others:
        raise InputError(f"deep_lift: {seen.others[0]} is run, which it has no rule for (take integrated_gradients)")
    for name, calls in seen.calls.items():
        if calls > 1:
            raise InputError(
                f"deep_lift: {name} is run {calls} times in one pass; each activation has to be a module of its own"
            )
    return copy


def _replace(root: nn.Module, other: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put other modules in the place of some; one that stands in two places stays one."""
    made: dict[nn.Module, nn.Module | None] = {}
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None:
                new = made.setdefault(child, other(child)) if child not in made else made[child]
                if new is not None:
                    parent._modules[name] = new.train(child.training)


def _untangle(root: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[nn.Module, str]:
    """The wanted activations with their names, none in place, each with an input of its own.

    captum hooks the tensor that goes in, and where a shortcut reads it too would replace the shortcut's gradient as well.
    """
    found = {module: name for name, module in root.named_modules() if wanted(module)}
    for module in found:
        if hasattr(module, "inplace"):
            module.inplace = False  # pyright: ignore[reportArgumentType]
        module.register_forward_pre_hook(lambda _, inputs: tuple(x.clone() for x in inputs))
    return found


class _Watch(TorchDispatchMode):
    """Which operations run, and in which module.

    Attributes:
        calls: how often each of the known activations is run.
        others: the nonlinearities outside of them.
    """

    def __init__(self, root: nn.Module, known: dict[nn.Module, str], operations: set[str]):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.others: list[str] = []
        self._known, self._operations = known, operations
        self._inside: list[str] = []  # names of the modules that are being run
        self._in_known = 0
        self.handles = []
        for name, module in root.named_modules():
            label = f"{name} ({type(module).__name__})" if name else type(module).__name__
            self.handles.append(module.register_forward_pre_hook(lambda m, _, label=label: self._enter(m, label)))
            self.handles.append(module.register_forward_hook(lambda m, _, __: self._leave(m)))

    def _enter(self, module: nn.Module, label: str) -> None:
        self._inside.append(label)
        if module in self._known:
            self.calls[self._known[module]] += 1
            self._in_known += 1

    def _leave(self, module: nn.Module) -> None:
        self._inside.pop()
        self._in_known -= module in self._known

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name.startswith("_scaled_dot_product"):
            name = "_scaled_dot_product_attention"  # each device has its own
        if name.startswith("clamp") and not (args[0].is_floating_point() and 0 in args[1:]):
            name = ""  # of indices, or keeps a norm from 0 as F.normalize does
        if name in self._operations and not self._in_known:
            where = self._inside[-1] if self._inside else "the network"
            self.others.append(f"{name.strip('_')} in {where}")
        return func(*args, **(kwargs or {}))


def _watch(copy: Subject, pixels: Tensor, known: dict[nn.Module, str], operations: set[str]) -> _Watch:
    with torch.enable_grad():
        copy.logits(pixels[:1].detach().requires_grad_())  # refuses a network without gradients before captum stumbles
    watch = _Watch(copy.module, known, operations)
    try:
        with torch.no_grad(), watch:
            copy.logits(pixels[:1])
    finally:
        for handle in watch.handles:
            handle.remove()
    return watch
