"""The names under which a service may be called, as the header Host states them.

A web page can let its own name resolve to this machine (DNS rebinding). The browser then takes the service for a part
of the page, so the page may read and change everything. The header Host still contains the page's name, so a service
that refuses unknown names is safe. Only names must be checked: the origin of a page can be an IP address only if the
page came from this address.
"""

import ipaddress
import re
from typing import Final

_NAME: Final = re.compile(r"(\*\.)?([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}")
_MOST_REMEMBERED: Final = 1024


def parse_names(text: str) -> frozenset[str]:
    """Return the host names in a comma-separated list. `*.example.com` stands for all names below example.com, and `*`
    for all names.

    Raises:
        ValueError: an entry is not a host name.
    """
    names = frozenset(name.strip().lower() for name in text.split(",") if name.strip())
    for name in sorted(names - {"*"}):
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name[:200]!r} is not a host name: write names without a port, such as images.example.com or "
                "*.example.com, or * for all"
            )
    return names


class Hosts:
    """Decides which values of the header Host are allowed: IP addresses, localhost, names without a dot, and `names`.

    Names without a dot are those of local networks, for example of containers. Nobody can register such a name.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._any = "*" in names
        self._names = names
        self._below = tuple(name[1:] for name in names if name.startswith("*."))
        self._remembered: dict[bytes, bool] = {}

    def allows(self, host: bytes) -> bool:
        """Return whether the value of a header Host is allowed. It may have a port."""
        allowed = self._remembered.get(host)
        if allowed is None:
            allowed = self._any or self._is_known(host.decode("latin-1").lower())
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[host] = allowed
        return allowed

    def _is_known(self, host: str) -> bool:
        name = re.sub(r":[0-9]*\Z", "", host)
        if "." not in name and ":" not in name:
            return True
        if name in self._names or name.endswith((".localhost", *self._below)):
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]").partition("%")[0])
        except ValueError:
            return False
        return True
