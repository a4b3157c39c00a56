"""The profiles for GPUs as whole runs of one rank on a CPU: other model, device, sizes, and what a CPU can promise."""

from __future__ import annotations

import h5py
import pytest
import warm

SMALL = (
    "model.path=random:configs/models/tiny-llama.json", "model.device=cpu", "model.dtype=float32",
    "model.max_context=256", "engine.kv_tokens=2048", "engine.max_batch=8", "engine.activation_mib=256",
    "layout.replicas=1", "layout.tp_size=1", "load.rate_rps=2", "load.duration_s=20", "load.max_tokens=16",
    "slo.ttft_ms=60000", "slo.tpot_ms=10000",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["gpu1", "gpu8", "gpu8_tp2", "nodes2_70b"])
def test_a_profile_for_gpus_answers_requests_and_completes_rounds(tmp_path, profile):
    command = ["launch/run.py", "--config", f"configs/{profile}.yaml"]
    command += [f"run.out_dir={tmp_path}", "run.name=run", "run.status=plain", *SMALL]
    done = warm.run(command, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    with h5py.File(tmp_path / "run" / "run.h5") as file:
        answered = [r["finish"] for r in file["requests"][:] if r["purpose"] == b"user"]
        assert len(answered) > 10 and set(answered) <= {b"stop", b"length"}
        assert len(file["rounds"]) >= 1 and len(file["train_steps"]) >= 1
