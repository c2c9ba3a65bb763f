"""What an edit is: it makes a Manifest of a Manifest, such as one with fewer labels."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from mlvision.data.manifest import Manifest
from mlvision.errors import InputError, check_fields
from mlvision.options import Selectable


@dataclass(frozen=True)
class EditConfig(Selectable):
    """The options of an edit, which each edit's own class adds to. There is nothing to build: the options apply it."""

    name: Annotated[str, "which edit: a key of EDITS"]

    def __post_init__(self) -> None:
        check_fields(self, f"data.edits.{self.name}.")

    def apply(self, manifest: Manifest) -> Manifest:
        """The edited images, in their order, with a phrase more in the protocol; `manifest` itself stays as it is.

        What is drawn is drawn by a seed and each image's key, so that it does not depend on the order of the images. The
        phrase of an edit that leaves images out names how many stay, as in "70 of 80 images".

        Raises:
            InputError: options that do not fit the images or classes.
        """
        raise NotImplementedError


def apply_edits(edits: Iterable[EditConfig], manifest: Manifest) -> Manifest:
    """What the edits make of a manifest, one after the other.

    Raises:
        InputError: as `EditConfig.apply`, or an edit that leaves no image.
    """
    for number, edit in enumerate(edits):
        edited = edit.apply(manifest)
        if not len(edited):
            raise InputError(
                f"data.edits.{number}: {edit.name} leaves none of the {len(manifest):,} images of split "
                f"{manifest.split!r}; expected at least one"
            )
        manifest = edited
    return manifest
