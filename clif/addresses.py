"""Addresses of this host that ranks on other hosts can reach. Free of torch; sends nothing."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from clif.errors import ConfigError

_ELSEWHERE = "198.51.100.1"
"""Of a block kept for documentation: the way to it is the way to the world."""


def address_towards(master: str) -> str:
    """The address of this host from which it reaches rank 0's host; on rank 0, the one where others reach it.

    master: MASTER_ADDR, name or number. Raises ConfigError when this host has no such address.
    """
    try:
        target = socket.gethostbyname(master)
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR {master} is no host that this one knows ({error}): correct it") from error
    if _is_loopback(target) and target != master and master != "localhost":
        # Debian's /etc/hosts gives a host its own name as 127.0.1.1: useless to the others, who see another number.
        return outward_address()
    return _source(target)


def outward_address() -> str:
    """The address from which this host reaches the world, or its only one that is not loopback. Raises ConfigError."""
    try:
        return _source(_ELSEWHERE)
    except OSError:
        # Compute nodes often have no way out.
        own = _own_addresses()
    if len(own) != 1:
        raise ConfigError(
            f"this host has no default route and the addresses {', '.join(own) or 'of loopback only'}: pass "
            "MASTER_ADDR as the number that other hosts reach, or set dist.control_host and GLOO_SOCKET_IFNAME"
        )
    return own[0]


def interface_of(address: str) -> str | None:
    """Name of the network interface that has the address; None if none of this host's does."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return name
    return None


def free_port() -> int:
    """A TCP port that nobody on this host listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _source(target: str) -> str:
    # Connecting a UDP socket only asks the kernel for the route.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((target, 9))
        return str(probe.getsockname()[0])


def _own_addresses() -> list[str]:
    found = [one.address for all in psutil.net_if_addrs().values() for one in all if one.family == socket.AF_INET]
    return [address for address in found if not _is_loopback(address)]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
