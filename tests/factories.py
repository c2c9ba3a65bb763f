"""What many tests need built."""

from mlvision.methods import Method, MethodConfig
from mlvision.models import Classifier, Preprocessing
from mlvision.parts import Context
from mlvision.space import LabelSpace


def context(num_classes: int) -> Context:
    """Of so many classes, without statistics."""
    return Context(LabelSpace(tuple(f"class {c}" for c in range(num_classes))))


def build_method(config: MethodConfig, classifier: Classifier, preprocessing: Preprocessing | None = None) -> Method:
    """A method around a classifier, of weights that expect their images in a given way."""
    classifier.backbone.preprocessing = preprocessing or classifier.backbone.preprocessing
    return config.build(context(classifier.num_classes), classifier)
