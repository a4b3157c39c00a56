"""Which address of this host others are told."""

from __future__ import annotations

import socket
import types

import psutil
import pytest

from clif import addresses
from clif.config import ConfigError


def test_the_address_towards_a_loopback_number_is_loopback():
    assert addresses.address_towards("127.0.0.1") == "127.0.0.1"
    assert addresses.address_towards("localhost") == "127.0.0.1"


def test_a_host_that_calls_itself_loopback_looks_outward(monkeypatch):
    """Debian gives a host its own name as 127.0.1.1; the ranks of other hosts would connect to themselves."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setattr(addresses, "outward_address", lambda: "10.0.0.1")
    assert addresses.address_towards("node01") == "10.0.0.1"


def test_an_unknown_master_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match=r"MASTER_ADDR no\.such\.host\.invalid"):
        addresses.address_towards("no.such.host.invalid")


def unreachable(target):
    raise OSError(101, "Network is unreachable")


def interfaces(*numbers: str) -> dict:
    family = socket.AF_INET
    return {f"eth{i}": [types.SimpleNamespace(family=family, address=n)] for i, n in enumerate(numbers)}


def test_a_compute_node_without_default_route_has_its_only_address(monkeypatch):
    monkeypatch.setattr(addresses, "_source", unreachable)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces("127.0.0.1", "10.0.0.1"))
    assert addresses.outward_address() == "10.0.0.1"


@pytest.mark.parametrize("numbers", [(), ("127.0.0.1",), ("10.0.0.1", "10.1.0.1")])
def test_none_or_several_addresses_without_a_route_say_what_to_set(monkeypatch, numbers):
    monkeypatch.setattr(addresses, "_source", unreachable)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces(*numbers))
    with pytest.raises(ConfigError, match=r"set dist\.control_host and GLOO_SOCKET_IFNAME"):
        addresses.outward_address()


def test_an_address_belongs_to_the_interface_that_has_it():
    loopback = next(n for n, all in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in all))
    assert addresses.interface_of("127.0.0.1") == loopback
    assert addresses.interface_of("192.0.2.1") is None


def test_a_free_port_can_be_listened_on():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", addresses.free_port()))
