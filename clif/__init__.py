"""CLIF serves a language model from replicas and fine-tunes it, federated, in their slack."""

__version__ = "0.1.0"
