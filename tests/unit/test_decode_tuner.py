"""Splits of the paged decode kernel: candidates that fit a multiprocessor, one for each shape, measured and read."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import tune_decode
from halving import Heats
from tune_decode import SHAPES, DecodeJob, summary

from clif.kernels.paged_decode_candidates import decode_candidates, items, most_programs, step_bytes, steps_in_flight
from clif.kernels.paged_decode_config import DecodeConfig, DecodeShape, default_config
from clif.kernels.paged_decode_host import INTERPRET
from clif.kernels.tile_file import DecodeEntry, Spread, Stamp, TileFile
from clif.kernels.tuning import load_decode
from clif.models.backends import choose_decode

STAMP = Stamp("2026-11-27", "a GPU", "2.11", "3.6", "0123456789ab")
SPLIT = DecodeConfig(block_kv=32, least=96)
ENTRY = DecodeEntry(SHAPES[0], SPLIT, Spread(1.0, 2.0, 3.0), Spread(2.0, 3.0, 4.0), {"64 x 384": 9.5}, STAMP)


@pytest.mark.parametrize("capability", [80, 89, 90, 123])
@pytest.mark.parametrize("shape", [*SHAPES, DecodeShape(21, 7, 80, 4), DecodeShape(8, 8, 8, 4)], ids=str)
def test_candidates_are_few_and_fit_a_multiprocessor_the_default_first(shape: DecodeShape, capability: int) -> None:
    found = decode_candidates(shape, capability)
    assert found[0] == default_config(shape) and 8 <= len(found) <= 32 and len(set(found)) == len(found)
    for config in found[1:-3]:
        assert 1 <= config.programs <= most_programs(config, shape, capability)
        assert config.programs * steps_in_flight(config) * step_bytes(config, shape) < 227 << 10


def test_short_contexts_of_a_full_batch_fill_the_gpu_evenly_by_default() -> None:
    """64 requests of 384 tokens: one round of equal items on 132 multiprocessors; long ones have many rounds."""
    shape = SHAPES[0]
    config = default_config(shape)
    room = 132 * config.programs
    assert 0.9 < items(config, shape, [384] * 64) / room <= 1
    assert items(config, shape, [8192] * 64) > 10 * room
    assert len(set(config.part_lengths(384))) == 1


def test_a_table_keeps_splits_and_one_without_any_is_read(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert load_decode(path) == {}
    TileFile(decode={ENTRY.shape: ENTRY}).write(path)
    assert TileFile.read(path).decode == {ENTRY.shape: ENTRY}
    assert load_decode(path) == {ENTRY.shape: ENTRY.config}
    tree = json.loads(path.read_text())
    del tree["decode"]
    path.write_text(json.dumps(tree))
    assert load_decode(path) == {}
    tree["decode"] = [{"shape": {}}]
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="write it again with make tune-gpu"):
        load_decode(path)


def test_the_engine_takes_the_measured_split_of_its_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    TileFile(decode={ENTRY.shape: ENTRY}).write(tmp_path / "gpu.json")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("clif.models.backends.table_path", lambda name: tmp_path / "gpu.json")
    kernel = choose_decode("auto", torch.device("cuda"), torch.bfloat16)
    assert kernel is not None and kernel.config(ENTRY.shape) == ENTRY.config
    assert kernel.config(SHAPES[1]) == default_config(SHAPES[1])


@pytest.mark.skipif(not INTERPRET, reason="the kernel is compiled in this process")
def test_the_tuner_measures_checks_and_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_decode, "DRY_SHAPES", tune_decode.DRY_SHAPES[:1])
    monkeypatch.setattr(tune_decode, "DRY_BATCHES", ((2, 20),))
    file, asked = TileFile(), list[DecodeJob]()

    def ask(job: DecodeJob) -> Future[float]:
        asked.append(job)
        future: Future[float] = Future()
        if len(asked) == 2:
            future.set_exception(RuntimeError("too much shared memory"))
        else:
            future.set_result(0.0)
        return future

    def tune(**options: Any) -> dict[str, int]:
        late = options.pop("late", lambda: False)
        heats = Heats(1, 1, least=1)
        return tune_decode.tune_decode(file, STAMP, 90, torch.device("cpu"), ask, late, heats, dry=True, **options)

    assert tune(late=lambda: True) == {"not measured": 1} and not file.decode and not asked
    assert tune() == {"measured": 1} and len(asked) == 3
    (entry,) = file.decode.values()
    assert entry.left_out == {"too much shared memory": 1} and entry.config in {asked[0].config, asked[2].config}
    assert entry.batches.keys() == {"2 x 20"} and "4 heads on 2, d=16, 16 bits" in summary(file)[-1]
    assert tune() == {"known": 1} and len(asked) == 3
    monkeypatch.setattr(tune_decode.DecodeRig, "wrong", lambda self, config: "not finite")
    assert tune(again=True) == {"not measured": 1}
