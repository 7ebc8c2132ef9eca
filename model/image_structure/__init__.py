"""Count the parts of an encoded image before a decoder sees it.

Each format has a function that reads the file once, from its start to its end, and allocates no memory by a number in
the file. `limits.py` has the table of limits with the reason for each.
"""

from model.image_structure.boxes import check_boxes
from model.image_structure.limits import Counts
from model.image_structure.streams import check_bmp, check_gif, check_jpeg, check_webp, without_texts
from model.image_structure.tags import check_tiff

_CHECKS = {
    "JPEG": check_jpeg,
    "GIF": check_gif,
    "WEBP": check_webp,
    "BMP": check_bmp,
    "TIFF": check_tiff,
    "AVIF": check_boxes,
    "HEIC": check_boxes,
}


def checked(name: str, data: bytes) -> bytes:
    """Check the structure of an image in the format `name`, and return the bytes to decode: `data`, or a PNG without
    its texts and other parts that do not affect the pixels.

    Raises:
        TooLarge: a part exceeds a limit.
        Unsupported: the pixels are stored in a way that is not supported.
        Broken: the parts contradict each other.
    """
    counts = Counts(name)
    if name == "PNG":
        return without_texts(data, counts)
    _CHECKS[name](data, counts)
    return data
