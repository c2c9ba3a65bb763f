"""How large an image may be: one limit for every format and decoder, looked at before anything is decoded."""

from mlvision.errors import InputError

# By default as many as Pillow takes before it refuses a file as an attack.
MAX_PIXELS = 178_956_970
MOST_PIXELS = 2**30  # that the option may allow: OpenCV goes no further


def check_pixels(width: int, height: int, max_pixels: int, path: str) -> None:
    """Refuses an image of more pixels than the option `max_pixels` allows.

    Raises:
        InputError: names the file, its size and the limit.
    """
    if width * height > max_pixels:
        raise InputError(
            f"{path}: {width:,} x {height:,} pixels are more than max_pixels allows ({max_pixels:,}): make the image "
            "smaller, or raise that option"
        )
