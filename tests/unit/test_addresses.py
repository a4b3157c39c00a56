"""Which address of this host others are told."""

from __future__ import annotations

import socket
import types

import psutil
import pytest

from clif.config import ConfigError
from clif.distributed import addresses


def test_the_address_towards_a_loopback_number_is_loopback():
    assert addresses.address_towards("127.0.0.1") == "127.0.0.1"
    assert addresses.address_towards("localhost") == "127.0.0.1"


def names(monkeypatch: pytest.MonkeyPatch, *numbers: str) -> None:
    """Let every name mean these addresses."""
    found = [(socket.AF_INET6 if ":" in n else socket.AF_INET, 0, 0, "", (n, 0)) for n in numbers]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)


def routes(monkeypatch: pytest.MonkeyPatch, **sources: str) -> None:
    """Let this host reach addresses by a family (v4, v6) from these of its own, and others not at all."""

    def source(target: str) -> str:
        family = "v6" if ":" in target else "v4"
        if family not in sources:
            raise OSError(101, "Network is unreachable")
        return sources[family]

    monkeypatch.setattr(addresses, "_source", source)


def test_a_host_that_calls_itself_loopback_looks_outward(monkeypatch):
    """Debian gives a host its own name as 127.0.1.1; the ranks of other hosts would connect to themselves."""
    names(monkeypatch, "127.0.1.1")
    monkeypatch.setattr(addresses, "outward_address", lambda: "10.0.0.1")
    assert addresses.address_towards("node01") == "10.0.0.1"


@pytest.mark.parametrize(
    ("numbers", "sources", "expected"),
    [
        (("fd00::1",), {"v6": "fd00::2"}, "fd00::2"),
        (("fd00::1", "10.0.0.1"), {"v4": "10.0.0.2", "v6": "fd00::2"}, "10.0.0.2"),
        (("10.0.0.1", "fd00::1"), {"v6": "fd00::2"}, "fd00::2"),
        (("127.0.1.1", "fd00::1"), {"v4": "127.0.0.1", "v6": "fd00::1"}, "fd00::1"),
        (("127.0.1.1",), {"v6": "fd00::1"}, "fd00::1"),
    ],
    ids=["v6 only", "v4 first", "no v4 here", "loopback passed over", "outward by v6"],
)
def test_the_address_is_of_a_family_that_reaches_the_master(monkeypatch, numbers, sources, expected):
    names(monkeypatch, *numbers)
    routes(monkeypatch, **sources)
    assert addresses.address_towards("node01") == expected


def test_a_master_without_a_route_is_an_error_that_names_it(monkeypatch):
    names(monkeypatch, "fd00::1")
    routes(monkeypatch)
    with pytest.raises(ConfigError, match=r"no way to MASTER_ADDR node01 \(fd00::1\)"):
        addresses.address_towards("node01")


def test_loopback_is_known_by_its_ipv6_number():
    assert addresses.address_towards("::1") == "::1"


@pytest.mark.parametrize("number", ["fe80::1", "fe80::1%eth0", "fd00::1%2"])
def test_an_address_of_one_cable_is_refused_with_what_to_set(number):
    with pytest.raises(ConfigError, match=rf"dist\.control_host={number} is an address of one cable.*fd00::/8"):
        addresses.refuse_link_local("dist.control_host", number)


@pytest.mark.parametrize("host", ["fd00::1", "::1", "169.254.0.1", "10.0.0.1", "node01"])
def test_any_other_address_is_taken(host):
    addresses.refuse_link_local("MASTER_ADDR", host)


def test_before_a_port_an_ipv6_number_stands_in_brackets():
    assert [addresses.in_url(h) for h in ("fd00::1", "10.0.0.1", "node01")] == ["[fd00::1]", "10.0.0.1", "node01"]


def test_an_unknown_master_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match=r"MASTER_ADDR no\.such\.host\.invalid"):
        addresses.address_towards("no.such.host.invalid")


def interfaces(*numbers: str) -> dict:
    def entry(number: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(family=socket.AF_INET6 if ":" in number else socket.AF_INET, address=number)

    return {f"eth{i}": [entry(n)] for i, n in enumerate(numbers)}


@pytest.mark.parametrize(
    ("numbers", "own"),
    [
        (("127.0.0.1", "10.0.0.1"), "10.0.0.1"),
        (("127.0.0.1", "::1", "fe80::1%eth2", "fd00::1"), "fd00::1"),
        (("10.0.0.1", "fd00::1", "fd00::2"), "10.0.0.1"),
    ],
)
def test_a_compute_node_without_default_route_has_its_only_address(monkeypatch, numbers, own):
    routes(monkeypatch)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces(*numbers))
    assert addresses.outward_address() == own


@pytest.mark.parametrize("numbers", [(), ("127.0.0.1", "fe80::1%eth1"), ("10.0.0.1", "10.1.0.1")])
def test_none_or_several_addresses_without_a_route_say_what_to_set(monkeypatch, numbers):
    routes(monkeypatch)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces(*numbers))
    with pytest.raises(ConfigError, match=r"set dist\.control_host and GLOO_SOCKET_IFNAME"):
        addresses.outward_address()


def test_an_address_belongs_to_the_interface_that_has_it():
    loopback = next(n for n, all in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in all))
    assert addresses.interface_of("127.0.0.1") == loopback
    assert addresses.interface_of("192.0.2.1") is None


@pytest.mark.parametrize(("address", "name"), [("fd00::1", "eth1"), ("fd00:0::1", "eth1"), ("fe80::2%eth2", "eth2")])
def test_an_interface_is_found_by_an_ipv6_address_however_it_is_written(monkeypatch, address, name):
    found = interfaces("10.0.0.1", "fd00::1", "fe80::2%eth2")
    found["eth1"].insert(0, types.SimpleNamespace(family=psutil.AF_LINK, address="06:5d:7e:b2:1f:1b"))
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    assert addresses.interface_of(address) == name


def test_a_free_port_can_be_listened_on():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", addresses.free_port()))
