"""Which address of this host others are told."""

from __future__ import annotations

import socket

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


def test_no_way_out_says_what_to_set(monkeypatch):
    def unreachable(target):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(addresses, "_source", unreachable)
    with pytest.raises(ConfigError, match=r"set dist\.control_host .* GLOO_SOCKET_IFNAME"):
        addresses.outward_address()


def test_an_address_belongs_to_the_interface_that_has_it():
    loopback = next(n for n, all in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in all))
    assert addresses.interface_of("127.0.0.1") == loopback
    assert addresses.interface_of("192.0.2.1") is None


def test_a_free_port_can_be_listened_on():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", addresses.free_port()))
