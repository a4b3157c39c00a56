"""Addresses of this host that ranks on other hosts can reach, IPv4 or IPv6. Free of torch; sends nothing.

Where a host has both, IPv4 comes first: gloo, too, takes the IPv4 address of an interface that has one.
"""

from __future__ import annotations

import ipaddress
import socket

import psutil

from clif.errors import ConfigError

_ELSEWHERE = ("198.51.100.1", "2001:db8::1")
"""Addresses reserved for documentation: the kernel routes them like any address outside of this network."""
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def address_towards(master: str) -> str:
    """The address of this host from which it reaches rank 0's host; on rank 0, the one where others reach it.

    master: MASTER_ADDR, name or number. Raises ConfigError when this host has no such address.
    """
    refuse_link_local("MASTER_ADDR", master)
    try:
        targets = _numbers(master)
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR {master} is no host that this one knows ({error}): correct it") from error
    if not (_is_number(master) or master == "localhost"):
        # Debian's /etc/hosts maps a host's own name to 127.0.1.1, which other hosts cannot reach.
        targets = [target for target in targets if not ipaddress.ip_address(target).is_loopback]
    source = _first_source(targets) if targets else outward_address()
    if source is None:
        raise ConfigError(f"this host has no way to MASTER_ADDR {master} ({', '.join(targets)}): correct it")
    return source


def outward_address() -> str:
    """This host's address on its default route, or else its only one that others can reach. Raises ConfigError."""
    source = _first_source(_ELSEWHERE)
    if source is not None:
        return source
    # Compute nodes often have no default route.
    own = _own_addresses(socket.AF_INET) or _own_addresses(socket.AF_INET6)
    if len(own) != 1:
        raise ConfigError(
            f"this host has no default route and the addresses {', '.join(own) or 'of loopback only'}: pass "
            "MASTER_ADDR as the number that other hosts reach, or set dist.control_host and GLOO_SOCKET_IFNAME"
        )
    return own[0]


def interface_of(address: str) -> str | None:
    """Name of the network interface that has the address; None if none of this host's does."""
    wanted = ipaddress.ip_address(address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family in _FAMILIES and ipaddress.ip_address(one.address) == wanted for one in addresses):
            return name
    return None


def free_port() -> int:
    """A TCP port that no process on this host uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def in_url(host: str) -> str:
    """The host as a URL has it before the port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def refuse_link_local(what: str, host: str) -> None:
    """Raises ConfigError for an IPv6 address such as fe80::1%eth0. what: where it is set."""
    number = ipaddress.ip_address(host) if _is_number(host) else None
    if isinstance(number, ipaddress.IPv6Address) and (number.is_link_local or number.scope_id):
        raise ConfigError(
            f"{what}={host} is an address of one cable, and its interface has another name on other hosts: "
            "give the hosts addresses that all can reach (fd00::/8 will do) and set one of these"
        )


def _numbers(host: str) -> list[str]:
    """All addresses of a host, IPv4 before IPv6. Raises OSError."""
    found = {(entry[0] == socket.AF_INET6, entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    return [str(number) for _, number in sorted(found)]


def _first_source(targets: list[str] | tuple[str, ...]) -> str | None:
    for target in targets:
        try:
            return _source(target)
        except OSError:
            # This host may lack the address family; the next address may work.
            continue
    return None


def _source(target: str) -> str:
    # Connecting a UDP socket only asks the kernel for the route.
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((target, 9))
        return str(probe.getsockname()[0])


def _own_addresses(family: socket.AddressFamily) -> list[str]:
    found = [one.address for all in psutil.net_if_addrs().values() for one in all if one.family == family]
    numbers = [ipaddress.ip_address(address) for address in found]
    return [str(n) for n in numbers if not (n.is_loopback or n.is_link_local)]


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
