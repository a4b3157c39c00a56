"""The decisions of the control plane: pure functions (now, view, config) -> (decision, reason). Free of torch.

All of them take the time, also those that do not need it: the signature is one. The reason is stored or shown.
"""
