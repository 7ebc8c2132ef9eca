"""Tests that the decoder's errors are translated to errors of the service."""

import pytest

from model.decode import DecodeLimits
from service.errors import BrokenImage, ImageTooLarge, ServiceError, UnsupportedImage
from service.features.images import decode
from tests.fakes import photo


@pytest.mark.parametrize(
    ("data", "limits", "kind", "status", "words"),
    [
        (b"", DecodeLimits(), BrokenImage, 422, "the image is empty"),
        (b"GIF89a", DecodeLimits(), BrokenImage, 422, "header is damaged"),
        (b"a red shoe", DecodeLimits(), UnsupportedImage, 415, "not a known image"),
        (photo(), DecodeLimits(max_bytes=10), ImageTooLarge, 413, "the limit is 10"),
    ],
)
def test_errors_of_the_decoder_are_the_services(
    data: bytes, limits: DecodeLimits, kind: type[ServiceError], status: int, words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        decode(data, limits)
    assert type(caught.value) is kind
    assert caught.value.status == status
