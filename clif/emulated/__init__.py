"""Replicas that compute nothing: they speak the wire protocol and answer with a fixed text. Free of torch."""
