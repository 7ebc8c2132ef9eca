"""Decide whether an IP address may belong to a public web server.

The service must not be used to reach the network in which it runs, so it connects only to public addresses. Python's
`is_global` is not enough: it is true for some multicast addresses, for addresses of NAT64 that stand for a private
IPv4 address, and its tables differ between versions of Python. So the tables are here. They follow IANA's registries of
special-purpose addresses.

An IPv6 address may stand for an IPv4 address. Two such forms occur for ordinary web servers: IPv4-mapped addresses, and
the well-known prefix of NAT64 (RFC 6052). The embedded IPv4 address decides about them. The other forms are not used
for web servers and are refused, whatever they embed: IPv4-compatible and IPv4-translated addresses, 6to4, Teredo,
ISATAP, and the prefix of NAT64 for local use (RFC 8215), in which the position of the IPv4 address is unknown.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

_SPECIAL_IPV4: Final = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # carrier-grade NAT; clouds put metadata services here
            "127.0.0.0/8",  # loopback
            "168.63.129.16/32",  # Azure's platform services, although the address looks public
            "169.254.0.0/16",  # link-local; clouds put metadata services here
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocols of the IETF
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # AS112
            "192.52.193.0/24",  # AMT
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private
            "192.175.48.0/24",  # AS112
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and broadcast
        ),
    )
)
_UNICAST_IPV6: Final = IPv6Network("2000::/3")
"""The only part of IPv6 from which public addresses are allocated. Loopback, link-local, unique local and multicast
addresses are outside it."""
_SPECIAL_IPV6: Final = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocols of the IETF, Teredo among them
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4
            "2620:4f:8000::/48",  # AS112
            "3fff::/20",  # documentation
        ),
    )
)
_IPV4_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_NAT64: Final = IPv6Network("64:ff9b::/96")
_ISATAP: Final = frozenset({0x00005EFE, 0x02005EFE})
"""The third quarter of an ISATAP address. The last quarter is an IPv4 address."""


def why_not_public(text: str) -> str | None:
    """Return why the service must not connect to the IP address `text`, or None if the address is public.

    Raises:
        ValueError: `text` is not an IP address.
    """
    address = ip_address(text)
    if isinstance(address, IPv4Address):
        return _special(address, _SPECIAL_IPV4)
    if address.scope_id is not None:
        return f"{address} has a zone"
    for carrier in (_IPV4_MAPPED, _NAT64):
        if address in carrier:
            reason = _special(IPv4Address(int(address) & 0xFFFFFFFF), _SPECIAL_IPV4)
            return reason and f"{address} stands for an IPv4 address: {reason}"
    if address not in _UNICAST_IPV6:
        return f"{address} is not in {_UNICAST_IPV6}"
    if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        return f"{address} is an address of ISATAP"
    return _special(address, _SPECIAL_IPV6)


def _special(
    address: IPv4Address | IPv6Address, networks: tuple[IPv4Network, ...] | tuple[IPv6Network, ...]
) -> str | None:
    """Return a text that names the network in `networks` that contains `address`, or None if there is none."""
    network = next((network for network in networks if address in network), None)
    return None if network is None else f"{address} is in {network}"
