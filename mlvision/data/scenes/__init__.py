"""`scenes`: a data set that is drawn here, so that the demo and the tests need no download; the COCO reader reads it."""

from mlvision.data.scenes.generator import ScenesConfig, write_scenes

__all__ = ["ScenesConfig", "write_scenes"]
