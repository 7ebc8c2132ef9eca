"""What requests may say. Bodies of answers are written straight to JSON by the routes: building and checking a pydantic
object for every one of thousands of floats costs more than a small model's forward pass.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

Pooling = Literal["cls", "mean", "cls+mean"]
ItemId = Annotated[str, Field(min_length=1, max_length=256)]


class Options(BaseModel):
    """Fields of every request with images; an unknown field is an error, so that a typo is not silently ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("auto", max_length=256, description="empty or auto: the model served; else one of its names")


class EmbeddingOptions(Options):
    """What may stand beside the images: JSON fields, form fields or query parameters, by the kind of body."""

    encoding_format: Literal["float", "base64"] = Field("float", description="base64: little-endian float32")
    dimensions: int | None = Field(None, description="only the model's own: vectors are never cut short")
    user: str | None = Field(None, max_length=256, description="accepted for OpenAI's clients, not used")
    pooling: Pooling = Field("cls", description="class token, mean of the patch tokens, or both joined")
    normalize: bool = Field(True, description="scale every vector to length 1")
    on_error: Literal["fail", "partial"] = Field("fail", description="partial: answer the good items, list the bad")


class SegmentOptions(Options):
    """Options of `/v1/segment`."""

    format: Literal["png", "rle", "overlay"] = Field("png", description="mask, COCO RLE in JSON, or mask over photo")
    include: Annotated[list[Literal["embedding"]], FailFast()] = Field(
        default_factory=list, max_length=1, description="from the same pass; the answer is JSON"
    )
    pooling: Pooling = Field("cls", description="of the embedding")
    normalize: bool = Field(True, description="of the embedding")


class ItemIn(BaseModel):
    """One photo for a collection."""

    model_config = ConfigDict(extra="forbid")

    id: ItemId | None = Field(None, description="yours; left out: the sha256 of the bytes")
    image: str = Field(description="data URL or base64")
    metadata: dict[str, Any] = Field(default_factory=dict, description="given back by searches")


class ItemsIn(Options):
    """Body of `POST /v1/collections/{name}/items`."""

    items: list[ItemIn] = Field(min_length=1)
    on_error: Literal["fail", "partial"] = "fail"


class UploadOptions(Options):
    """Form fields of an upload of files into a collection."""

    on_error: Literal["fail", "partial"] = "fail"


class SearchIn(Options):
    """Body of `POST /v1/collections/{name}/search`: exactly one of image, vector, id."""

    image: str | None = Field(None, description="data URL or base64")
    vector: list[float] | None = Field(None, min_length=1, max_length=8192)
    id: ItemId | None = Field(None, description="an item of the collection")
    fingerprint: str | None = Field(None, max_length=64, description="of the model that made `vector`")
    k: int = Field(10, ge=1, le=1000, description="how many")


class SearchOptions(Options):
    """Query parameters or form fields of a search by file."""

    k: int = Field(10, ge=1, le=1000)
