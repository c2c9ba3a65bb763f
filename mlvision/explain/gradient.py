"""Explanations from gradients of a score with respect to the image, through captum.

captum explains one score of each image at a time, so the cost grows with the number of labels: explain the labels that
matter, not all of them. It is given (image, label) pairs, a few at a time; empty places of a selection cost nothing.

Guided backpropagation and DeepLift replace the gradient of activations, which captum knows by the type of their module. They
run on a copy of the model in which every activation is such a module, and refuse a model in which that cannot be done.

What captum gives for each colour of a pixel is one of two things, and a map is made of it accordingly:

- a contribution (input_x_gradient, integrated_gradients, deep_lift) is a part of the score, in its units. Contributions add
  up, so the map is their sum over the colours, negative where a pixel speaks against the label.
- a slope (saliency, smooth_grad, guided_backprop, guided_grad_cam) says how far the score moves with the pixel, and by its
  sign whether a brighter or a darker one would raise it. That is no evidence for or against: a label that is known by what
  is dark has its strongest evidence where the slopes are negative. So the map is the sum of their magnitudes, and is never
  negative. Of signed slopes, those over one patch would mostly cancel, and what is left is the sign of the first layer's
  filters: patches ranked by it come out in any order, down to the reverse (docs/methods/explain.md has figures).

DEVIATION: the sum over the colours, where Simonyan et al. take the largest magnitude; patches rank alike by both.
"""

import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from mlvision.errors import InputError, check_fields
from mlvision.explain.cam import GradCam
from mlvision.explain.impute import fill_in
from mlvision.explain.rewrite import guidable, liftable
from mlvision.explain.selection import Selection
from mlvision.explain.subject import Subject

_BASELINES = ("black", "mean", "blur")  # of impute.py's those that are an image

Rows = Float[Tensor, "n in_chans H W"]


class _Score(nn.Module):
    """One selected score of each image: what captum differentiates."""

    def __init__(self, subject: Subject):
        super().__init__()
        self._subject = subject
        self.model = subject.module  # captum looks for activations here

    def forward(self, pixels: Rows, labels: Int64[Tensor, " n"], against: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
        return Selection(labels[:, None], against[:, None]).scores(self._subject.logits(pixels)).squeeze(1)


Chosen = tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]


def _captum() -> Any:
    """captum.attr, which brings pyplot: seconds to import, which --help does not wait for."""
    import captum.attr

    return captum.attr


@dataclass(frozen=True)
class Saliency:
    """The magnitude of the gradient, summed over the colours: how much a pixel could change the score, not which way.

    Source: Simonyan et al., "Deep Inside Convolutional Networks", ICLR workshop 2014, section 3.
    """

    batch_size: Annotated[int, "images a pass; 0: by their size and the device"] = 0
    label_specific = True
    signed = False

    @property
    def magnitudes(self) -> bool:
        """Whether the maps say how much, not which way."""
        return not self.signed

    def __post_init__(self) -> None:
        check_fields(self, "", [("batch_size", self.batch_size >= 0, "0 or more"), *self._rules()])

    def _rules(self) -> list[tuple[str, bool, str]]:
        return []

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L H W"]:
        score = self._score(subject, pixels)
        labels = selection.labels
        against = selection.rivals
        maps = pixels.new_zeros(*labels.shape, *pixels.shape[2:])
        batch_size = self.batch_size or _batch_size(pixels)
        for places in selection.valid.nonzero().split(max(1, self._at_once(batch_size))):
            place = places.unbind(1)
            rows = pixels[place[0]].detach().requires_grad_()
            found = self._attribute(score, rows, (labels[place], against[place]), batch_size).detach()
            maps[place] = (found if self.signed else found.abs()).sum(1).to(maps)
        return maps

    def _score(self, subject: Subject, pixels: Tensor) -> _Score:
        return _Score(subject)

    def _at_once(self, batch_size: int) -> int:
        """How many scores a call of captum is given."""
        return batch_size

    def _attribute(self, score: _Score, rows: Rows, chosen: Chosen, batch_size: int) -> Rows:
        return _captum().Saliency(score).attribute(rows, abs=False, additional_forward_args=chosen)


@dataclass(frozen=True)
class InputXGradient(Saliency):
    """Each pixel times its gradient: what it adds to the score of a linear model, set against black.

    Dark pixels get little, whatever they mean.

    Source: Shrikumar et al., "Not Just a Black Box", arXiv 1605.01713.
    """

    signed = True

    def _attribute(self, score: _Score, rows: Rows, chosen: Chosen, batch_size: int) -> Rows:
        return _captum().InputXGradient(score).attribute(rows, additional_forward_args=chosen)


@dataclass(frozen=True)
class IntegratedGradients(Saliency):
    """The mean gradient on the straight line from a baseline to the image, times their difference; the map's sum is the
    difference of the scores, but for the error of the sum over points. Pixels that equal the baseline get nothing.

    Source: Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017, eq. 1; Gauss-Legendre points.
    """

    signed = True

    num_steps: Annotated[int, "points on the line"] = 50
    baseline: Annotated[str, "the image that means nothing: black, mean (the image's colour) or blur"] = "black"

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [("num_steps", 1 <= self.num_steps <= 10_000, "1 to 10000"), _baseline_rule(self.baseline)]

    def _at_once(self, batch_size: int) -> int:
        return batch_size // self.num_steps

    def _attribute(self, score: _Score, rows: Rows, chosen: Chosen, batch_size: int) -> Rows:
        attribution = _captum().IntegratedGradients(score)
        return attribution.attribute(
            rows,
            _baseline(rows, self.baseline),
            n_steps=self.num_steps,
            internal_batch_size=batch_size,
            additional_forward_args=chosen,
        )


@dataclass(frozen=True)
class SmoothGrad(Saliency):
    """The magnitude of the mean gradient at noisy copies of the image, summed over the colours. Every label of every image
    gets the same noise, so an image's map depends on no other image.

    Source: Smilkov et al., "SmoothGrad: removing noise by adding noise", arXiv 1706.03825; 10-20 % noise; the magnitude of
    the mean, as they recommend for photos.
    """

    num_samples: Annotated[int, "noisy copies"] = 25
    sigma: Annotated[float, "standard deviation of the noise, for images in [0, 1]"] = 0.15

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [("num_samples", 1 <= self.num_samples <= 10_000, "1 to 10000"), ("sigma", self.sigma >= 0, "0 or more")]

    def _at_once(self, batch_size: int) -> int:
        return 1  # from the same random state

    def _attribute(self, score: _Score, rows: Rows, chosen: Chosen, batch_size: int) -> Rows:
        with torch.random.fork_rng([rows.device] if rows.device.type == "cuda" else []):
            tunnel = _captum().NoiseTunnel(_captum().Saliency(score))
            found = tunnel.attribute(
                rows,
                nt_type="smoothgrad",
                nt_samples=self.num_samples,
                nt_samples_batch_size=min(batch_size, self.num_samples),
                stdevs=float(self.sigma),
                abs=False,
                additional_forward_args=chosen,
            )
        assert isinstance(found, Tensor)
        return found


@dataclass(frozen=True)
class GuidedBackprop(Saliency):
    """The magnitude of the gradient without what is negative behind a ReLU: of the paths on which everything speaks for the
    label. No ReLU stands before the first layer, so the gradient of a pixel still has a sign, which is that of the filter.

    Sharp, but close to an edge filter: maps of different labels look alike, and may survive random weights (Adebayo et al.,
    NeurIPS 2018). ReLU6 counts as one rectifier: nothing passes where it is saturated.

    Source: Springenberg et al., "Striving for Simplicity", ICLR workshop 2015.
    """

    def _score(self, subject: Subject, pixels: Tensor) -> _Score:
        return _Score(guidable(subject, pixels))

    def _attribute(self, score: _Score, rows: Rows, chosen: Chosen, batch_size: int) -> Rows:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Setting backward hooks")  # on our copy
            return _captum().GuidedBackprop(score).attribute(rows, additional_forward_args=chosen)


@dataclass(frozen=True)
class GuidedGradCam(GuidedBackprop):
    """The magnitude of guided backpropagation where Grad-CAM is positive, weighted by it.

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, Guided Grad-CAM.
    """

    layer: Annotated[str, "the layer of Grad-CAM; empty: as grad_cam"] = ""

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L H W"]:
        guided = super().explain(subject, pixels, selection)
        where = GradCam(self.layer).explain(subject, pixels, selection).detach().clamp(min=0)
        return guided * F.interpolate(where, guided.shape[2:], mode="bilinear", align_corners=False).to(guided)


@dataclass(frozen=True)
class DeepLift(Saliency):
    """What each pixel's difference from a baseline adds to the score's, by the slopes between the two in every activation;
    the map's sum is the difference of the scores, and is checked.

    Max pooling is taken as a chain of ReLUs, `max(a, b) = a + relu(b - a)`.

    Source: Shrikumar et al., "Learning Important Features Through Propagating Activation Differences", ICML 2017,
    the rescale rule.

    DEVIATION: the paper has no rule for max pooling; by captum's, the sum is off where the baseline is not uniform.
    """

    signed = True

    baseline: Annotated[str, "the image that means nothing: black, mean (the image's colour) or blur"] = "black"

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [_baseline_rule(self.baseline)]

    def _at_once(self, batch_size: int) -> int:
        return batch_size // 2  # each with its baseline

    def _score(self, subject: Subject, pixels: Tensor) -> _Score:
        return _Score(liftable(subject, pixels))

    def _attribute(self, score: _Score, rows: Rows, chosen: Chosen, batch_size: int) -> Rows:
        baseline = _baseline(rows, self.baseline)
        # Slopes are quotients of differences, which half precision would round away.
        with warnings.catch_warnings(), torch.autocast(rows.device.type, enabled=False):
            warnings.filterwarnings("ignore", message="Setting forward, backward hooks")  # on our copy
            found = _captum().DeepLift(score).attribute(rows, baseline, additional_forward_args=chosen).detach()
            with torch.no_grad():
                here, there = score(rows, *chosen).double(), score(baseline, *chosen).double()
        difference, total, size = here - there, found.double().sum((1, 2, 3)), found.double().abs().sum((1, 2, 3))
        missing = (total - difference).abs()
        # Rounding is in proportion to the parts, not to what is left when they cancel; GPUs multiply in TF32.
        share = 1e-4 if rows.device.type == "cpu" else 1e-3
        if not bool((missing <= 1e-3 * difference.abs() + share * size + 1e-5 * (here.abs() + there.abs())).all()):
            worst = int(missing.nan_to_num(torch.inf).argmax())
            raise InputError(
                f"deep_lift: a map's sum is {float(total[worst]):.4g}, the scores differ by {float(difference[worst]):.4g}; "
                "the model multiplies activations, or has a nonlinearity without a rule (take integrated_gradients)"
            )
        return found


def _baseline_rule(baseline: str) -> tuple[str, bool, str]:
    return ("baseline", baseline in _BASELINES, f"one of {', '.join(_BASELINES)}")


@torch.no_grad()
def _baseline(rows: Rows, name: str) -> Rows:
    nothing = torch.zeros_like(rows[:, 0])
    return fill_in(rows.detach(), name)(torch.arange(len(rows), device=rows.device), nothing)


def _batch_size(pixels: Float[Tensor, "B in_chans H W"]) -> int:
    """As many pixels as 8 images of 224 have on a CPU, 64 on a GPU: the graph of each is kept."""
    most = 8 * 224 * 224 * (1 if pixels.device.type == "cpu" else 8)
    return max(1, min(256, most // (pixels.shape[2] * pixels.shape[3])))
