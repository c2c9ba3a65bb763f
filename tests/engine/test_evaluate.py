import torch

from mlvision.engine.evaluate import predict
from mlvision.engine.precision import Precision
from mlvision.methods import Method
from mlvision.space import LabelSpace
from mlvision.types import Batch, CropBox


class Echo(Method):
    """Its logits are the images' first pixels, so that rows can be told apart."""

    def __init__(self):
        torch.nn.Module.__init__(self)

    def predict(self, images):
        assert torch.is_inference_mode_enabled()
        assert not self.training
        return images[:, 0, 0, :2].float()


def batch(rows):
    images = torch.tensor(rows, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    targets = torch.tensor(rows, dtype=torch.float32).view(-1, 1).expand(-1, 2)
    return Batch(images, targets, torch.tensor(rows), CropBox(torch.zeros(len(rows), 4)))


def test_rows_come_in_manifest_order_and_once():
    method = Echo().train()
    method.space = LabelSpace(("a", "b"), groups=(2,))
    loader = [batch([4, 0]), batch([2]), batch([0, 3, 4])]  # out of order; 0 and 4 twice, as padded ranks would give
    found = predict(method, loader, Precision("fp32", torch.device("cpu")))
    assert found.index.tolist() == [0, 2, 3, 4]
    assert found.space is method.space
    assert found.logits[:, 1].tolist() == [0, 2, 3, 4]
    assert found.targets[:, 0].tolist() == [0, 2, 3, 4]
    assert found.logits.dtype == torch.float32
    assert method.training
