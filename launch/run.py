#!/usr/bin/env python3
"""Start one rank: torchrun --standalone --nproc-per-node N launch/run.py --config configs/X.yaml [key=value ...]"""

from __future__ import annotations

from clif.run import app

if __name__ == "__main__":
    app()
