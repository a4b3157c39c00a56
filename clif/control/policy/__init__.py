"""The decisions of the control plane: pure functions (now, view, config) -> (decision, reason). Free of torch.

A decision that is taken again and again gets the time, also where it does not need it: the signature is one. The reason
is stored or shown.
"""
