"""The commands `dinov2 keys ...`, which create, list, rotate and revoke API keys. A running service notices each change
at its next request."""

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cli.shared import DATA, DataDirOption, JsonOption, fail

if TYPE_CHECKING:
    from service.keys import Key, KeyStore

app = typer.Typer(no_args_is_help=True, help="Create, list, rotate and revoke API keys.")

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
ExpiresOption = Annotated[
    str | None, typer.Option(help="Time until the key expires, such as 90d, 12h or 30m. Default: never.")
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Who or what uses the key. Several keys may have the same name.")],
    scopes: Annotated[
        str,
        typer.Option(
            help="What the key may do: read, write or admin, or several of them, separated by commas. write includes "
            "read, and admin includes both."
        ),
    ] = "read",
    expires: ExpiresOption = None,
    data_dir: DataDirOption = DATA,
) -> None:
    """Create an API key and print it. The key is shown only this once, because only its hash is stored."""
    from service.errors import ServiceError

    try:
        wanted = [scope.strip().lower() for scope in scopes.split(",") if scope.strip()]
        text, key = _store(data_dir, makes=True).create(name, wanted, _seconds(expires, "--expires"))
    except (ValueError, OSError, ServiceError) as error:
        raise fail(error) from error
    _show_new(text, key, data_dir)


@app.command("list")
def list_(data_dir: DataDirOption = DATA, as_json: JsonOption = False) -> None:
    """List all API keys, oldest first. The list includes expired and revoked keys."""
    from service.errors import ServiceError

    try:
        keys = _store(data_dir).all_keys()
    except (ValueError, OSError, ServiceError) as error:
        raise fail(error) from error
    now = time.time()
    rows = [
        {
            "id": key.id,
            "name": key.name,
            "scopes": list(key.scopes),
            "state": key.state(now),
            "created": _date(key.created),
            "expires": _date(key.expires),
            "revoked": _date(key.revoked),
            "last_used": _date(key.last_used),
        }
        for key in keys
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max([4, *(len(key.name) for key in keys)])
    typer.echo(f"{'id':<10}  {'name':<{width}}  {'scopes':<16}  {'state':<7}  {'expires':<20}  last used")
    for key in keys:
        expires, used = _date(key.expires) or "never", _date(key.last_used) or "never"
        scopes = ",".join(key.scopes)
        typer.echo(f"{key.id}  {key.name:<{width}}  {scopes:<16}  {key.state(now):<7}  {expires:<20}  {used}")


@app.command()
def revoke(
    key: Annotated[
        str, typer.Argument(help="Id of the key, its name if only one valid key has this name, or the whole key.")
    ],
    data_dir: DataDirOption = DATA,
) -> None:
    """Revoke an API key. A running service refuses it from its next request on. If this was the last valid key, the
    service still requires keys."""
    from service.errors import ServiceError

    try:
        revoked = _store(data_dir).revoke(key)
    except (ValueError, OSError, ServiceError) as error:
        raise fail(error) from error
    typer.echo(f"revoked the key {revoked.id} of {revoked.name}")


@app.command()
def rotate(
    name: Annotated[str, typer.Argument(help="Name of the keys.")],
    overlap: Annotated[
        str, typer.Option(help="Time for which the older keys stay valid, such as 7d or 1h. 0s: they expire at once.")
    ] = "7d",
    expires: Annotated[
        str | None,
        typer.Option(help="Time until the new key expires, such as 90d. Default: as long as the newest key was valid."),
    ] = None,
    data_dir: DataDirOption = DATA,
) -> None:
    """Create an API key that replaces the valid keys of this name, and print it. It has the scopes of the newest one.
    The older keys expire after the time that --overlap sets, so that clients can change to the new key."""
    from service.errors import ServiceError

    try:
        overlap_s = _seconds(overlap, "--overlap") or 0.0
        text, key, older = _store(data_dir).rotate(name, overlap_s, _seconds(expires, "--expires"))
    except (ValueError, OSError, ServiceError) as error:
        raise fail(error) from error
    _show_new(text, key, data_dir)
    for old in older:
        typer.echo(f"the key {old.id} expires {_date(old.expires)}", err=True)


def _store(data_dir: Path, *, makes: bool = False) -> "KeyStore":
    """Open the keys of a data folder. Unless `makes` is true, a folder without keys is an error, so that a mistyped
    folder is noticed."""
    from service.keys import FILE, KeyStore

    if not makes and not (data_dir / FILE).exists():
        raise ValueError(f"no API key was created in {data_dir.resolve()}: set the folder with --data-dir")
    return KeyStore(data_dir)


def _show_new(text: str, key: "Key", data_dir: Path) -> None:
    """Print a new key to standard output, and all else to standard error, so that a script can read the key."""
    typer.echo(text)
    expires = f"expires {_date(key.expires)}" if key.expires is not None else "never expires"
    typer.echo(
        f"key {key.id} of {key.name} for {data_dir.resolve()}: {', '.join(key.scopes)}; {expires}. "
        "The key above is shown only this once",
        err=True,
    )


def _seconds(text: str | None, option: str) -> float | None:
    """Return the seconds in a time such as 90d.

    Raises:
        ValueError: the text is not a time.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text.strip().lower())
    if match is None:
        raise ValueError(f"{option} {text[:40]!r} is not a time: write a number and s, m, h or d, such as 90d")
    return float(int(match[1]) * _SECONDS[match[2]])


def _date(seconds: float | None) -> str | None:
    """Return a time in ISO 8601 format, in UTC, or None for None."""
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
