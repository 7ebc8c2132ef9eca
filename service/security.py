"""Decides who may call which route: names of the service, API keys, their scopes, and the audit log.

`Border` (service/middleware.py) calls `Security.admit` once for each request, before the body is read. It stores a
`Principal` in the state of the request: who sends the request, and what this sender may do. The route then calls
`require` with the scope that `ROUTES` assigns to it. The scope is checked after the routing and not before, so that no
difference between two ways of reading a path can open a route. A route that is missing in `ROUTES` needs `admin`.

A verified `Authorization` header is remembered, so that the next request with it costs a lookup in a dict and no hash.
All remembered headers are forgotten as soon as a key changes, in every process with the same data folder.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from service.cors import SAFE_METHODS, Cors, is_foreign, parse_origins
from service.errors import CrossOrigin, HostNotAllowed, MissingScope, ServiceError, Unauthenticated
from service.hosts import Hosts, parse_names
from service.keys import FILE, FileState, Key, KeyStore, digest_of_key, granted, key_id_of
from service.settings import Settings
from service.telemetry import audit_log

Need = Literal["open", "metrics", "read", "write", "admin"]
"""What a route needs: a scope, or nothing ("open"). The setting `metrics_auth` decides what "metrics" needs."""

ROUTES: Final[dict[tuple[str, str], Need]] = {
    ("GET", "/livez"): "open",
    ("GET", "/readyz"): "open",
    ("GET", "/metrics"): "metrics",
    ("GET", "/openapi.json"): "open",  # these four contain no data; their scripts send the key that the user enters
    ("GET", "/docs"): "open",
    ("GET", "/"): "open",
    ("GET", "/assets/{name:path}"): "open",
    ("GET", "/v1/models"): "read",
    ("GET", "/v1/models/{name:path}"): "read",
    ("DELETE", "/v1/models/{name:path}"): "admin",
    ("POST", "/v1/models/load"): "admin",
    ("POST", "/v1/models/rollback"): "admin",
    ("POST", "/v1/models/unload"): "admin",
    ("POST", "/v1/embeddings"): "read",
    ("POST", "/v1/attention"): "read",
    ("POST", "/v1/features"): "read",
    ("POST", "/v1/segment"): "read",
    ("POST", "/v1/detect"): "read",
    ("POST", "/v1/match"): "read",
    ("POST", "/v1/depth"): "read",
    ("POST", "/v1/words"): "read",
    ("POST", "/v1/analyze"): "read",
    ("POST", "/v1/classify"): "read",
    ("GET", "/v1/collections"): "read",
    ("GET", "/v1/collections/{name}"): "read",
    ("PUT", "/v1/collections/{name}"): "write",
    ("PATCH", "/v1/collections/{name}"): "write",
    ("DELETE", "/v1/collections/{name}"): "admin",
    ("GET", "/v1/collections/{name}/stats"): "read",
    ("POST", "/v1/collections/{name}/search"): "read",
    ("POST", "/v1/collections/{name}/duplicates"): "read",
    ("POST", "/v1/collections/{name}/find-region"): "read",
    ("POST", "/v1/collections/{name}/items"): "write",
    ("PUT", "/v1/collections/{name}/items/{item_id:path}"): "write",
    ("GET", "/v1/collections/{name}/items/{item_id:path}/image"): "read",
    ("GET", "/v1/collections/{name}/items/{item_id:path}"): "read",
    ("PATCH", "/v1/collections/{name}/items/{item_id:path}"): "write",
    ("DELETE", "/v1/collections/{name}/items/{item_id:path}"): "write",
    ("POST", "/v1/collections/{name}/items/delete"): "write",
    ("POST", "/v1/collections/{name}/items/scroll"): "read",
    ("POST", "/v1/collections/{name}/items/count"): "read",
    ("POST", "/v1/collections/{name}/items/facets"): "read",
    ("POST", "/v1/collections/{name}/snapshots"): "admin",
    ("GET", "/v1/collections/{name}/snapshots"): "admin",
    ("GET", "/v1/collections/{name}/snapshots/{snapshot}"): "admin",
    ("DELETE", "/v1/collections/{name}/snapshots/{snapshot}"): "admin",
    ("POST", "/v1/collections/{name}/restore"): "admin",
    ("DELETE", "/v1/originals/{digest}"): "admin",
    ("POST", "/v1/originals/erase-unreferenced"): "admin",
    ("POST", "/v1/jobs"): "admin",
    ("GET", "/v1/jobs"): "admin",
    ("GET", "/v1/jobs/{job_id}"): "admin",
    ("GET", "/v1/jobs/{job_id}/log"): "admin",
    ("POST", "/v1/jobs/{job_id}/cancel"): "admin",
    ("POST", "/v1/jobs/{job_id}/approve"): "admin",
    ("POST", "/v1/jobs/{job_id}/retry"): "admin",
    ("DELETE", "/v1/jobs/{job_id}"): "admin",
    ("GET", "/v1/jobs/events"): "admin",
    ("GET", "/v1/jobs/{job_id}/events"): "admin",
    ("GET", "/v1/schedules"): "admin",
    ("GET", "/v1/schedules/{schedule}"): "admin",
    ("PUT", "/v1/schedules/{schedule}"): "admin",
    ("DELETE", "/v1/schedules/{schedule}"): "admin",
    ("GET", "/v1/aliases"): "read",
    ("PUT", "/v1/aliases/{alias}"): "admin",  # decides what all readers see
    ("DELETE", "/v1/aliases/{alias}"): "admin",
}
"""What each route needs, by its method and the template of its path. HEAD needs what GET needs."""

MAX_HEADER_BYTES: Final = 512
"""The size limit of the header `Authorization`. A key takes less than 100 bytes."""
LOOK_EVERY_S: Final = 1.0
_MAX_REMEMBERED: Final = 4096
log = logging.getLogger(__name__)
_BEARER: Final = re.compile(rb"bearer +(\S+)", re.IGNORECASE)
_CHALLENGE: Final = 'Bearer realm="dinov2-service"'
_DENIALS: Final = (Unauthenticated, MissingScope, CrossOrigin, HostNotAllowed)
PROBES: Final = frozenset({"/livez", "/readyz"})
"""Routes that any name may call, because health checks choose the name themselves."""
_SEND_A_KEY: Final = 'send an API key in the header "Authorization: Bearer KEY"'


@dataclass(frozen=True, slots=True)
class Principal:
    """The sender of a request. `key_id` and `name` are those of the API key, or None if the request has no valid key.
    `scopes` contains everything that the sender may call."""

    key_id: str | None
    name: str | None
    scopes: frozenset[Need]


def _denied(detail: str, reason: str, key_id: str | None = None) -> Unauthenticated:
    """Return the error for a request without a valid key. `reason` and `key_id` are for the audit log."""
    challenge = _CHALLENGE if reason == "no key" else f'{_CHALLENGE}, error="invalid_token"'
    return Unauthenticated(detail, challenge=challenge, reason=reason, key_id=key_id)


class Security:
    """The access control of one service process. `open` must be called before the first request.

    Args:
        settings: the operator's settings.
        clock: a function that returns the time in seconds since 1970.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._clock = clock
        self._ring: KeyRing | None = None
        self._cors = Cors(parse_origins(settings.cors_origins)) if settings.cors_origins else None
        self._hosts = _hosts(settings)
        self._everyone: frozenset[Need] = frozenset({"open"} if settings.metrics_auth else {"open", "metrics"})
        self._nobody = Principal(None, None, self._everyone)
        self._anyone = Principal(None, None, frozenset({"open", "metrics", "read", "write", "admin"}))

    def open(self) -> None:
        """Open the stored keys, unless the setting `auth` is `off`.

        Raises:
            StorageFailed: the file of the keys cannot be used.
        """
        if self._settings.auth != "off":
            self._ring = KeyRing(KeyStore(self._settings.data_dir), self._everyone, self._clock)
            self._ring.refresh()
        if not self.requires_keys:
            level = logging.WARNING if self._settings.trusted_proxies else logging.INFO  # a proxy lets others in
            log.log(level, "requests need no API key: everyone who reaches the service may call every route")

    @property
    def requires_keys(self) -> bool:
        """Whether requests need a key at the moment."""
        return self._ring is not None and (self._settings.auth == "on" or self._ring.has_keys)

    def admit(self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes]) -> None:
        """Store the sender of a request as `principal` in the request's state. If the request has no valid key but
        needs one, the sender may call open routes only, and `denial` in the state is the error for all other routes.

        Raises:
            CrossOrigin: a page of another origin sends a request that may change something.
            HostNotAllowed: the service is not called by one of its names.
        """
        state = scope["state"]
        state["principal"] = self._nobody
        self._check_host(scope, headers)
        if scope["method"] not in SAFE_METHODS and is_foreign(headers, self._cors):
            raise CrossOrigin(
                "a web page of another origin sent this request; the setting DINOV2_CORS_ORIGINS lists the origins "
                "whose pages may call the service"
            )
        if self._ring is None:
            state["principal"] = self._anyone
            return
        try:
            self._ring.refresh()
            if self._settings.auth == "auto" and not self._ring.has_keys:
                state["principal"] = self._anyone
            else:
                state["principal"] = self._ring.principal(_authorization(scope, headers))
        except ServiceError as error:  # StorageFailed too: without the keys, nobody gets in
            state["denial"] = error

    def _check_host(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> None:
        """Check the name by which the service is called. Without the setting `hosts`, names are not checked if requests
        need a key, which a web page does not have, or if there is a trusted proxy, which may serve any name."""
        host = headers.get(b"host")
        if not host or self._hosts.allows(host) or scope["path"] in PROBES:
            return
        settings = self._settings
        if settings.hosts is not None or not (settings.trusted_proxies or self.requires_keys):
            name = re.sub(r":[0-9]*\Z", "", host[:80].decode("latin-1"))
            raise HostNotAllowed(
                f"the service is not called {name!r}: add this name to DINOV2_HOSTS; localhost, IP addresses and names "
                "without a dot are always allowed"
            )

    async def save_last_used(self) -> None:
        """Store when keys were last used."""
        if self._ring is not None:
            await self._ring.save_last_used()


class KeyRing:
    """The stored keys in memory.

    Args:
        store: the stored keys.
        everyone: what senders without a key may call, too.
        clock: a function that returns the time in seconds since 1970.
    """

    def __init__(self, store: KeyStore, everyone: Collection[Need], clock: Callable[[], float]) -> None:
        self._store = store
        self._everyone = frozenset(everyone)
        self._clock = clock
        self._stamp = store.stamp
        self._seen: int | None = None  # the stamp when the keys were read
        self._file_state: FileState | None = None  # the state of the file when the keys were read
        self._next_look = 0.0  # when to look at the file again, in seconds of the monotonic clock
        self._keys: dict[str, Key] = {}
        self._verified: dict[bytes, tuple[Principal, Key]] = {}  # by the value of the header
        self._has_keys = False
        self._used: dict[str, float] = {}  # by key id; times of the last use that are not stored yet

    @property
    def has_keys(self) -> bool:
        """Whether a key was ever created. A revoked or expired key counts: if it did not, revoking the last key would
        let everyone in. For the same reason, the answer stays true if all keys disappear from the file."""
        return self._has_keys

    def refresh(self) -> None:
        """Read the keys again if one of them has changed since they were last read.

        The stamp tells this at once. Once a second, the state of the file is compared too, because the stamp stays the
        same if a process is killed between its change and the new stamp, or if an operator replaces the files.

        Raises:
            StorageFailed: the keys cannot be read. The next call tries again.
        """
        stamp, now = self._stamp.read(), time.monotonic()
        if stamp == self._seen and now < self._next_look:
            return
        state = self._store.file_state()  # like the stamp, before the keys: the next call notices a change in between
        if stamp != self._seen or state != self._file_state:
            self._keys = {key.id: key for key in self._store.all_keys()}
            self._has_keys = self._has_keys or bool(self._keys)
            self._verified.clear()
            self._seen, self._file_state = stamp, state
        self._next_look = now + LOOK_EVERY_S

    def principal(self, header: bytes) -> Principal:
        """Return the sender that an `Authorization` header stands for.

        Raises:
            Unauthenticated: the header contains no valid key.
        """
        now = self._clock()
        remembered = self._verified.get(header)
        if remembered is None:
            remembered = self._verify(header)
        principal, key = remembered
        state = key.state(now)
        if state != "valid":
            raise _denied(_INVALID, state, key.id)
        self._used[key.id] = now
        return principal

    def _verify(self, header: bytes) -> tuple[Principal, Key]:
        if not header:
            raise _denied(f"this service needs an API key: {_SEND_A_KEY}", "no key")
        match = _BEARER.fullmatch(header.strip(b" \t")) if len(header) <= MAX_HEADER_BYTES else None
        if match is None:
            raise _denied(f"the header Authorization has another form: {_SEND_A_KEY}", "not a bearer token")
        text = match[1]
        key_id = key_id_of(text)
        if key_id is None:
            raise _denied(
                "the API key is malformed: it has the form dv2_ID_SECRET_CHECKSUM, and its checksum is wrong if a "
                "character is missing or mistyped",
                "malformed",
            )
        key = self._keys.get(key_id)
        digest = digest_of_key(text)
        # An unknown id is compared too, so that the time of the answer does not depend on whether the id exists.
        if not hmac.compare_digest(digest, key.digest if key else bytes(len(digest))) or key is None:
            raise _denied(_INVALID, "unknown" if key is None else "wrong secret", key_id)
        principal = Principal(key.id, key.name, self._everyone | granted(key.scopes) | {"metrics"})
        if len(self._verified) >= _MAX_REMEMBERED:
            self._verified.clear()
        self._verified[header] = principal, key
        return principal, key

    async def save_last_used(self) -> None:
        """Store when keys were last used."""
        used, self._used = self._used, {}  # here and not in the thread, so that no request changes what is written
        if used:
            await asyncio.to_thread(self._store.set_last_used, used)


_INVALID: Final = "the API key is not valid: it is unknown, expired or revoked"


def needed(method: str, template: str) -> Need:
    """Return what a route needs, given its method and the template of its path. A route that is not in `ROUTES` needs
    `admin`."""
    return ROUTES.get(("GET" if method == "HEAD" else method, template), "admin")


def require(state: MutableMapping[str, Any], need: Need) -> None:
    """Check that the sender of a request may call a route. `state` is the state of the request, and `need` is what the
    route needs.

    Raises:
        Unauthenticated: the request has no valid key.
        MissingScope: the key lacks the scope.
    """
    state["need"] = need
    principal: Principal = state["principal"]
    if need in principal.scopes:
        return
    if "denial" in state:
        raise state["denial"]
    raise MissingScope(
        f"the key {principal.key_id} lacks the scope {need}",
        headers={"WWW-Authenticate": f'{_CHALLENGE}, error="insufficient_scope", scope="{need}"'},
    )


def is_audited(scope: Mapping[str, Any], error: ServiceError | None) -> bool:
    """Return whether a request belongs into the audit log: it was denied, or its route needs `admin`. `error` is the
    error that the answer reports, or None."""
    return scope["state"].get("need") == "admin" or isinstance(error, _DENIALS)


def audit(
    scope: Mapping[str, Any], status: int, error: ServiceError | None, request_id: str, client: str | int | None
) -> None:
    """Write one line to the audit log. It never contains the key, only its id. `client` is the address of the client,
    or None if it is unknown."""
    state = scope["state"]
    principal: Principal | None = state.get("principal")
    fields = {
        "request_id": request_id,
        "key_id": getattr(error, "key_id", None) or (principal and principal.key_id),
        "key_name": principal and principal.name,
        "client": client,
        "method": scope["method"],
        "route": getattr(scope.get("route"), "path", "unmatched"),
        "path_params": scope.get("path_params") or None,
        "status": status,
        "needs": state.get("need"),
        "code": error.code if error is not None else None,
        "reason": getattr(error, "reason", None),
    }
    message = "denied" if isinstance(error, _DENIALS) else "admin request"
    audit_log.info(message, extra={"fields": {name: value for name, value in fields.items() if value is not None}})


def check_reachable(settings: Settings) -> None:
    """Check that a service that other machines can reach has a key, or that the operator wants it open.

    Raises:
        ValueError: the service would listen on an address that is not a loopback address, without any key.
        StorageFailed: the file of the keys cannot be used.
    """
    where = settings.publish or settings.host
    if settings.auth != "auto" or is_loopback(where):
        return
    has_file = (settings.data_dir / FILE).exists()
    if not has_file or not KeyStore(settings.data_dir).all_keys():
        raise ValueError(
            f"other machines can reach {where}, and there is no API key, so everyone could read and change all data. "
            "Create a key with `dinov2 keys create NAME`, or set DINOV2_AUTH=off to let everyone in"
        )


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach an address. The address may have a port at its end. A port alone, as
    Docker Compose accepts it, means all interfaces. A name other than `localhost` may stand for any address."""
    for host in (address, re.sub(r":[0-9-]*\Z", "", address)):
        host = host.removeprefix("[").removesuffix("]")
        if host.lower() == "localhost":
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
    return False


def _hosts(settings: Settings) -> Hosts:
    """Return the names of the service: those in the setting `hosts`, and the addresses where it listens and that it is
    published at, if they are names."""
    names = parse_names(settings.hosts or "")
    own = {re.sub(r":[0-9-]*\Z", "", address).lower() for address in (settings.host, settings.publish or "")}
    return Hosts(names | own - {""})


def _authorization(scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> bytes:
    """Return the value of the header `Authorization`, or nothing if there is no such header.

    Raises:
        Unauthenticated: there are several. A proxy could have checked another one than the service would.
    """
    value = headers.get(b"authorization")
    if value is None:
        return b""
    if [name for name, _ in scope["headers"]].count(b"authorization") > 1:
        raise _denied("the request has several Authorization headers: send exactly one", "several keys")
    return value
