import os
from pathlib import Path

import pytest
import torch

from mlvision.data.scenes.generator import ScenesConfig, write_scenes

torch.set_num_threads(1)  # the tests run on every core already


# Whoever asks for one of these trains, evaluates, or reads real data: seconds, not milliseconds.
SLOW_FIXTURES = {"scenes_root", "smoke_arguments", "real_data"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
    # Begun last, a module of minutes would keep one worker busy after the others have ended.
    items.sort(key=lambda item: item.get_closest_marker("distributed") is None)


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory) -> Path:
    """A small `scenes` data set: 96 training and 32 test images of 48 px."""
    root = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(ScenesConfig(train_images=96, test_images=32, image_size=48, num_workers=0), root)
    return root


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images and labels; tests that need it are skipped where it is not named."""
    folder = os.environ.get("MLVISION_REAL_DATA")
    if not folder:
        pytest.skip("MLVISION_REAL_DATA is not set: no real images to test with")
    return Path(folder)


@pytest.fixture
def smoke_arguments(scenes_root) -> list[str]:
    """Arguments of train.py for a run of a few seconds that uses every part with state."""
    config = Path(__file__).parents[1] / "configs" / "smoke" / "scenes_test_resnet_baseline.yaml"
    return [str(config), f"data.root={scenes_root}", "device=cpu", "threads=1", "log.tensorboard=false"]
