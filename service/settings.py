"""All settings of the service. In `service/`, only this module reads the environment.

Each setting is read from an environment variable. For instance, `queue_max_images` is read from
`DINOV2_QUEUE_MAX_IMAGES`. An unknown variable with the prefix `DINOV2_` is an error, so that a mistyped name is not
silently ignored. The error message suggests the most similar name. An empty value means the default, because Docker
Compose passes an unset variable as an empty one. A `~` at the start of a path means the home folder.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from model.cpus import available_cpus
from model.files import expanded
from model.memory import available_memory
from model.messages import in_words
from model.zoo import HUGGING_FACE_URL, META_URL
from service.addresses import (
    masked_milvus_url,
    masked_url,
    milvus_parts,
    otlp_traces_url,
    redis_parts,
    secret_in,
    with_redis_password,
)
from service.cors import parse_origins
from service.hosts import parse_names
from service.image_urls import parse_hosts

PREFIX = "DINOV2_"
READ_BY_COMPOSE = frozenset({"DINOV2_MEMORY"})
"""Variables that docker-compose.yml reads on the host. They are not settings of the service, but an .env file may pass
them to it."""
_SECRET: Final = ("redis_url", "jobs_redis_url", "originals_url", "vector_store")
"""Settings whose values may contain a password, so error messages do not show them."""
_IN_FILES: Final = ("vector_store", "originals_url")
"""Settings that can be in a file instead, which the setting with `_file` at the end of its name names."""
_OWN_PATHS: Final = frozenset({"v1", "livez", "readyz", "metrics", "docs", "assets", "openapi.json"})
"""The first parts of the paths of all routes. With one of them as the prefix, it would be ambiguous whether a proxy has
removed the prefix."""


class Settings(BaseSettings):
    """The operator's settings. The names indicate the units: sizes are in bytes or pixels, and times in seconds."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free port")
    publish: str | None = Field(
        None,
        description="in a container: the address and port on the host at which others reach the service; only used to "
        "decide whether other machines reach it; unset: host",
    )
    auth: Literal["auto", "off", "on"] = Field(
        "auto",
        description="whether requests need an API key; auto: as soon as a key has been created, and without any key "
        "the service does not start on an address that other machines reach; see docs/security.md",
    )
    metrics_auth: bool = Field(
        True, description="whether /metrics needs an API key with the scope read, if requests need keys"
    )
    audit_log: Path | None = Field(
        None, description="file to which the audit log is also appended; unset: only to standard error"
    )
    root_path: str = Field(
        "",
        description="path prefix under which a proxy publishes the service, such as /images; links contain it, and "
        "requests may come with or without it",
    )
    playground: bool = Field(True, description="whether the web page at / is served; see docs/playground.md")
    hosts: str | None = Field(
        None,
        description="names by which clients may call the service, in addition to localhost, IP addresses and names "
        "without a dot: comma-separated names such as images.example.com or *.example.com, or * for all; unset: only "
        "those, as long as requests need no API key and trusted_proxies is 0; see docs/security.md",
    )
    workers: int = Field(
        1,
        ge=1,
        le=64,
        description="number of processes that answer requests on this port; each loads the model, and they divide the "
        "CPUs; see docs/deployment.md",
    )
    data_dir: Path = Field(Path("data"), description="folder for collections, artifacts and derived files")
    model: str = Field(
        "auto", description="model to serve: auto, an artifact folder or its URL, or the name of a published model"
    )
    meta_url: str = Field(META_URL, description="server of Meta's published weights, or a mirror with the same paths")
    hugging_face_url: str = Field(
        HUGGING_FACE_URL,
        description="server of Hugging Face's published weights, used if Meta's fails",
    )
    engine: str = Field(
        "auto", description="engine that runs the model: auto, fastest, or runtime[:precision]; see docs/engines.md"
    )
    engine_photos: Path | None = Field(
        None, description="folder of images to check an engine with at startup; unset: generated images"
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="number of CPU threads for a forward pass; unset: as many as CPUs"
    )

    redis_url: str | None = Field(
        None,
        description="Redis server for the cache and the rate limits, redis://[:password@]host:port/db; unset: each "
        "process has its own",
    )
    redis_password_file: Path | None = Field(
        None, description="file with the password for redis_url and jobs_redis_url, which then must not contain one"
    )
    cache_bytes: int = Field(
        256 * 2**20, ge=0, description="memory limit of the cache in the process; 0: no cache, not even in Redis"
    )
    patch_cache_bytes: int = Field(
        64 * 2**20, ge=0, description="memory limit of the cache of patch features; 0: no such cache"
    )
    patch_store_bytes: int = Field(
        2 * 2**30, ge=0, description="size limit of the file in data_dir that keeps patch features; 0: no such file"
    )
    cache_ttl_s: int = Field(7 * 24 * 3600, ge=1, description="time until Redis deletes a cached vector")

    vector_store: str = Field(
        "embedded",
        description="where vectors are stored: embedded (in data_dir), or milvus://[user:password@]host[:port][/database]",
    )
    vector_store_file: Path | None = Field(
        None,
        description="file that contains vector_store, for instance a secret with a password; instead of vector_store",
    )
    originals_url: str | None = Field(None, description="URL where original images are stored; unset: in data_dir")
    originals_url_file: Path | None = Field(
        None, description="file that contains originals_url, for instance a secret; instead of originals_url"
    )

    max_collections: int = Field(1000, ge=1, description="highest number of collections; only with the embedded store")
    max_collection_items: int | None = Field(
        None, ge=1, description="highest number of items in a collection; unset: no limit; only with the embedded store"
    )
    max_items: int | None = Field(
        None,
        ge=1,
        description="highest number of items of all collections; unset: no limit; only with the embedded store",
    )
    max_originals_bytes: int | None = Field(
        None, ge=1, description="size limit of all stored original images together; unset: no limit"
    )
    max_snapshots: int = Field(1000, ge=1, description="highest number of snapshots of all collections together")
    max_snapshot_bytes: int | None = Field(
        None, ge=1, description="size limit of all snapshots together; unset: no limit"
    )

    local_worker: bool = Field(
        True, description="whether the service starts a worker process for jobs, which ends with the service"
    )
    jobs_redis_url: str | None = Field(
        None,
        description="Redis server that announces jobs to workers, with RQ: redis://[:password@]host:port/db; unset: "
        "workers look into data_dir",
    )
    jobs_kept: int = Field(
        1000,
        ge=1,
        le=100_000,
        description="highest number of finished jobs that are kept; the oldest are removed first",
    )
    job_roots: str | None = Field(
        None,
        description="folders, and URLs such as s3://bucket/images, below which jobs may read data: comma-separated; "
        "unset: data_dir/datasets",
    )
    job_stop_grace_s: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="time limit for the process of a job to save its state and end after SIGTERM, after which it is "
        "killed",
    )
    schedule_zone: str = Field("UTC", description="time zone of schedules that name none, for example Europe/Berlin")

    max_image_bytes: int = Field(20 * 2**20, ge=1, description="size limit of one image, as it is sent")
    max_image_pixels: int = Field(
        64_000_000,
        ge=1,
        le=178_956_970,
        description="limit of width x height of one image, checked before decoding",
    )
    max_batch_items: int = Field(64, ge=1, le=2048, description="highest number of images in one request")
    max_body_bytes: int = Field(
        64 * 2**20, ge=1, description="size limit of one request body, and of the images that are fetched for a request"
    )
    max_buffered_bytes: int = Field(
        2**30,
        ge=1,
        description="limit on the total size of all request bodies, fetched images and unread answers in memory",
    )
    max_answer_bytes: int = Field(
        32 * 2**20,
        ge=2**16,
        description="size limit of the answer to a search; larger ones get 422, and pages of items end earlier",
    )
    max_connections: int = Field(1024, ge=1, le=1_000_000, description="highest number of open connections")

    image_urls: str | None = Field(
        None,
        description="hosts from which clients may let the service fetch images: comma-separated names such as "
        "images.example.com, *.example.com or images.example.com:8443, or * for all public hosts; unset: none; see "
        "docs/image-urls.md",
    )

    rate_pixels_per_s: int | None = Field(
        None,
        ge=1,
        le=10**12,
        description="rate limit of each API key, or of each address without a key; unset: no limit; see docs/limits.md",
    )
    rate_burst_pixels: int | None = Field(
        None, ge=1, le=10**15, description="what a client may use at once; unset: the rate limit of 60 seconds"
    )
    rate_request_pixels: int = Field(
        50_000, ge=0, description="cost of a request in addition to its images, as a number of pixels"
    )

    client_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share that one client may occupy of what the others leave: of the queue, of the memory for bodies "
        "and answers, and of the connections; further requests of this client get 429; 1: no such limit",
    )
    queue_max_images: int = Field(
        256,
        ge=1,
        description="highest number of images that are accepted and not yet answered; further requests get 503",
    )
    queue_max_patches: int = Field(
        262_144, ge=1, description="highest number of patches that wait for the engine; further requests get 503"
    )
    batch_max_patches: int | None = Field(
        None,
        ge=1,
        description="highest number of patches in one forward pass; an image of 224 x 224 has 256; unset: measured at "
        "the start on a CPU, and 64 images on a GPU; see docs/engines.md",
    )
    max_input_patches: int = Field(
        4096,
        ge=1,
        le=65_536,
        description="highest number of patches in the network's input if a request chooses its size",
    )
    decode_memory_bytes: int | None = Field(
        None,
        ge=2**26,
        description="limit on the memory that images take while they are decoded, all together; unset: three eighths "
        "of the memory of the container or machine; see docs/deployment.md",
    )
    decode_workers: int = Field(default_factory=available_cpus, ge=1, le=256, description="number of decoding threads")

    header_timeout_s: float = Field(
        20.0,
        gt=0,
        allow_inf_nan=False,
        description="time limit for the headers of a request, after which the connection is closed",
    )
    min_bytes_per_s: int = Field(
        4096,
        ge=0,
        description="minimum rate at which a client must send a body, measured every 10 seconds, and read an answer, "
        "measured every answer_stall_s seconds; 0: none",
    )
    answer_stall_s: float = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="time after which the connection of a client that does not read its answer is closed",
    )
    request_deadline_s: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="time limit of a request, after which the answer is 504"
    )
    shutdown_grace_s: float = Field(
        25.0, ge=0, allow_inf_nan=False, description="time limit for running requests to finish after SIGTERM"
    )
    hang_timeout_s: float = Field(
        120.0,
        gt=0,
        allow_inf_nan=False,
        description="time limit of a forward pass, after which /livez fails",
    )
    gzip_min_bytes: int = Field(
        16_384,
        ge=0,
        description="JSON and text of at least this size are compressed if the client accepts gzip; 0: never",
    )
    cors_origins: str | None = Field(
        None,
        description="origins of web pages that may call the service: comma-separated, or * for all; unset: none",
    )
    trusted_proxies: int = Field(
        0,
        ge=0,
        le=16,
        description="number of trusted proxies in front of the service, needed to read the client's address from "
        "X-Forwarded-For; 0: the header is ignored",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest level of messages that are logged"
    )

    otlp_endpoint: str | None = Field(
        None,
        description="OpenTelemetry collector to which traces are sent with OTLP over HTTP, for instance "
        "http://collector:4318; needs the extra otel; unset: no traces",
    )
    trace_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of the requests without a traceparent header that are traced; if a request has this header, "
        "its sampled flag decides",
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_means_default(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Remove settings with an empty value, so that they get their defaults, and return the other settings.
        Otherwise an empty host would mean all network interfaces, and an empty data folder would mean the current
        folder."""
        return {name: value for name, value in values.items() if value != ""}

    @field_validator("log_level", "auth", mode="before")
    @classmethod
    def _word_in_any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _redis_password_is_read(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add the password from `redis_password_file` to the URLs of Redis, and return the settings."""
        file = values.get("redis_password_file")
        urls = {name: str(values[name]) for name in ("redis_url", "jobs_redis_url") if file and values.get(name)}
        for name, url in urls.items():
            try:
                urls[name] = with_redis_password(url, secret_in(expanded(Path(str(file)))))
            except ValueError as error:
                raise ValueError(f"{name} with redis_password_file: {error}") from None
        return values | urls

    @model_validator(mode="before")
    @classmethod
    def _secrets_are_read(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Add the settings that are in files, and return the settings."""
        files = {name: file for name in _IN_FILES if (file := values.get(f"{name}_file"))}
        for name, file in files.items():
            if values.get(name):
                raise ValueError(f"{name} and {name}_file must not both be set")
            try:
                files[name] = secret_in(expanded(Path(str(file))))
            except ValueError as error:
                raise ValueError(f"{name}_file: {error}") from None
        return values | files

    @field_validator("root_path")
    @classmethod
    def _root_path_is_a_prefix(cls, value: str) -> str:
        prefix = value.rstrip("/")
        if prefix and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", prefix):
            raise ValueError("must be empty or like /images: each part begins with / and has only A-Z a-z 0-9 . _ ~ -")
        if prefix and (first := prefix.split("/")[1]) in _OWN_PATHS:
            raise ValueError(f"must not begin with /{first}, because the service has routes there")
        return prefix

    @field_validator(
        "data_dir", "engine_photos", "redis_password_file", "vector_store_file", "originals_url_file", "audit_log"
    )
    @classmethod
    def _home_is_expanded(cls, value: Path | None) -> Path | None:
        return None if value is None else expanded(value)

    @field_validator("engine")
    @classmethod
    def _engine_is_known(cls, value: str) -> str:
        if value != "auto":
            from model.engines.runtimes import parse_engine  # only here, because it imports onnx

            parse_engine(value)
        return value

    @field_validator("redis_url", "jobs_redis_url")
    @classmethod
    def _redis_url_is_whole(cls, value: str | None) -> str | None:
        if value is not None:
            redis_parts(value)
        return value

    @field_validator("schedule_zone")
    @classmethod
    def _zone_is_known(cls, value: str) -> str:
        try:
            return value if value == "UTC" else ZoneInfo(value).key
        except (ZoneInfoNotFoundError, OSError) as error:
            raise ValueError("must be UTC or a name of the IANA database, such as Europe/Berlin") from error

    @field_validator("otlp_endpoint")
    @classmethod
    def _otlp_endpoint_is_an_address(cls, value: str | None) -> str | None:
        if value is not None:
            otlp_traces_url(value)
        return value

    @field_validator("vector_store")
    @classmethod
    def _vector_store_is_known(cls, value: str) -> str:
        if value != "embedded":
            milvus_parts(value)
        return value

    @field_validator("image_urls")
    @classmethod
    def _image_urls_are_hosts(cls, value: str | None) -> str | None:
        if value is not None:
            parse_hosts(value)
        return value

    @field_validator("hosts")
    @classmethod
    def _hosts_are_names(cls, value: str | None) -> str | None:
        if value is not None:
            parse_names(value)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _cors_origins_are_origins(cls, value: str | None) -> str | None:
        if value is not None:
            parse_origins(value)
        return value

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.max_image_bytes > self.max_body_bytes:
            raise ValueError(
                f"max_image_bytes={self.max_image_bytes} must not exceed max_body_bytes={self.max_body_bytes}"
            )
        if self.max_body_bytes > self.max_buffered_bytes:
            raise ValueError(
                f"max_body_bytes={self.max_body_bytes} must not exceed max_buffered_bytes={self.max_buffered_bytes}"
            )
        return self

    @model_validator(mode="after")
    def _rate_and_burst_fit(self) -> Self:
        rate, burst = self.rate_pixels_per_s, self.rate_burst_pixels
        if rate is None:
            if burst is not None:
                raise ValueError(f"rate_burst_pixels={burst} needs a rate limit: set rate_pixels_per_s too")
            return self
        if self.burst_pixels < self.rate_request_pixels:
            raise ValueError(
                f"rate_request_pixels={self.rate_request_pixels} must not exceed the burst, which is "
                f"{self.burst_pixels} pixels: no request could ever be answered"
            )
        if self.burst_pixels > rate * 24 * 3600:
            raise ValueError(
                f"rate_burst_pixels={burst} must not exceed the rate limit of one day, which is {rate * 24 * 3600}"
            )
        return self

    @property
    def burst_pixels(self) -> int:
        """What a client may use at once, in pixels. 0 if there is no rate limit."""
        return self.rate_burst_pixels or 60 * (self.rate_pixels_per_s or 0)

    @property
    def memory_for_decoding(self) -> int:
        """What images may take while they are decoded, in bytes."""
        return self.decode_memory_bytes or available_memory() * 3 // 8

    @property
    def items_per_request(self) -> int:
        """The highest number of images in one request: the lower of `max_batch_items` and `queue_max_images`."""
        return min(self.max_batch_items, self.queue_max_images)

    @property
    def originals_place(self) -> str | Path:
        """The folder (a Path) or URL (a str) where original images are stored."""
        return self.originals_url or self.data_dir / "originals"

    @property
    def patch_store_file(self) -> Path:
        """The file that keeps patch features."""
        return self.data_dir / "patches" / "patches.sqlite3"

    @property
    def otlp_traces_url(self) -> str | None:
        """The URL to which spans are posted, or None if there are no traces."""
        return None if self.otlp_endpoint is None else otlp_traces_url(self.otlp_endpoint)

    def shown(self) -> dict[str, Any]:
        """Return the settings as a dictionary for the log, without secrets."""
        values = self.model_dump(mode="json")
        urls = {"redis_url": self.redis_url, "jobs_redis_url": self.jobs_redis_url}
        redis = {name: url and masked_url(url) for name, url in urls.items()}
        originals = self.originals_url and re.sub(r"://.*", "://...", self.originals_url, flags=re.DOTALL)
        vectors = self.vector_store if self.vector_store == "embedded" else masked_milvus_url(self.vector_store)
        return {**values, **redis, "originals_url": originals, "vector_store": vectors}


def load_settings(overrides: Mapping[str, Any] | None = None) -> Settings:
    """Load the settings from the environment and return them. `overrides` contains command-line options, which take
    precedence over the environment.

    Raises:
        ValueError: a `DINOV2_*` variable is unknown, or a value is not allowed.
    """
    check_names()
    try:
        return Settings(**dict(overrides or {}))
    except ValidationError as error:
        raise ValueError(in_words(error, secret=_SECRET)) from None  # pydantic's own message would show a password


def check_names() -> None:
    """Check the names of all `DINOV2_*` variables in the environment.

    Raises:
        ValueError: a name is not that of a setting. The message suggests the most similar name.
    """
    names = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in names | READ_BY_COMPOSE:
            nearest = difflib.get_close_matches(name.upper(), names, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown setting {name} in the environment: did you mean {nearest}?")
