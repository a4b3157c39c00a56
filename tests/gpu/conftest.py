"""What several tests on a GPU need."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import make_rig
from said_at_once import pytest_runtest_logreport as pytest_runtest_logreport


@pytest.fixture(scope="module")
def model(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights that were drawn on a CPU: a GPU draws others from the same seed, and nothing could be compared."""
    folder = tmp_path_factory.mktemp("model")
    drawn = make_rig(f"random:{tiny_config}").loaded
    drawn.model.save_pretrained(folder)
    drawn.tokenizer.save(folder)
    return str(folder)
