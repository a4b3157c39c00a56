"""GPU stage: what failed on the first GPU, in eight lines.

python benchmarks/gpu_regressions.py [--dry]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
from gpu_bench import DRY, FULL, Bench, add_job, launches, run_step, samples, scale_of
from gpu_checks import Check, run_checks

from clif.config import config_from_tree
from clif.distributed.collectives import WeightedMean
from clif.distributed.launch_env import RankEnv
from clif.distributed.topology import make_topology
from clif.engine.engine import Engine
from clif.kernels.dual_lora_forms import DualLoraLinear
from clif.kernels.dual_lora_host import KernelLauncher
from clif.kernels.dual_lora_reference import SHADOW
from clif.kernels.paged_decode_host import PagedDecode
from clif.kernels.testing.dual_lora_specification import computed, random_batch, random_layer, violations
from clif.kernels.testing.paged_decode_specification import random_decode
from clif.kernels.testing.paged_decode_specification import violations as decode_violations
from clif.kernels.tuning import Defaults, Fixed
from clif.models.weights.loading import load_model
from clif.training.train_runner import TrainRunner
from clif.training.trainer import ShadowTrainer

DRY_RUN = "--dry" in sys.argv
DEVICE = "cpu" if DRY_RUN else "cuda"
KINDS = ((13, 0), (5, None), (40, 1), (71, SHADOW)) if not DRY_RUN else ((3, 0), (2, None), (4, SHADOW))


def defaults() -> Defaults:
    if DRY_RUN:
        return Defaults(4, 80)
    major, minor = torch.cuda.get_device_capability()
    return Defaults(torch.cuda.get_device_properties(0).multi_processor_count, 10 * major + minor)


def launcher() -> KernelLauncher:
    return KernelLauncher(torch.device(DEVICE), defaults())


def zero_rows() -> str:
    batch = random_batch(random_layer([64], 64, 8, dtype=torch.bfloat16, device=DEVICE), ((0, 0),))
    y, _ = DualLoraLinear(batch.merged, launcher()).forward(batch.x, batch.segments)
    return "" if tuple(y.shape) == (0, 64) else f"shape {tuple(y.shape)}"


def float32_products() -> str:
    sizes, depth = ([512, 256], 1024) if not DRY_RUN else ([32, 16], 32)
    layer = random_layer(sizes, depth, 16, dtype=torch.float32, device=DEVICE, bias=True)
    batch = random_batch(layer, KINDS)
    return "; ".join(violations(batch, computed(batch, DualLoraLinear(batch.merged, launcher()))))


def one_kernel_per_linear() -> str:
    """The form of one launch is one: no fill beside it."""
    if DRY_RUN:
        return ""
    batch = random_batch(random_layer([4096], 4096, 16, dtype=torch.bfloat16, device=DEVICE), ((48, 0), (16, 1)))
    fused = Fixed(defaults().tiles("fused", 64, 4096, 4096, 16))
    layer = DualLoraLinear(batch.merged, KernelLauncher(torch.device(DEVICE), fused))
    layer.forward(batch.x, batch.segments)
    found = launches(lambda: layer.forward(batch.x, batch.segments))
    return "" if sum(count for count, _ in found.values()) == 1 else f"{found}"


def odd_heads() -> str:
    lengths = (700, 1, 16, 17, 256, 257, 3000, 64, 5) if not DRY_RUN else (7, 1, 16)
    batch = random_decode(lengths, 21, 7, 80, 12, dtype=torch.float32, device=DEVICE, shared=1)
    out = batch.q.new_zeros(batch.q.shape).flatten(1)
    PagedDecode(torch.device(DEVICE)).attend(batch.q, batch.cache, batch.table(), batch.scale, out)
    return "; ".join(decode_violations(batch, out))


def large_model() -> str:
    """The proof at the start accepts a deep model in bfloat16."""
    Bench("tiny-llama" if DRY_RUN else "llama-8b", DRY if DRY_RUN else FULL)
    return ""


def same_on_both_devices() -> str:
    """Equal weights on both devices must give equal tokens and gradients."""
    with tempfile.TemporaryDirectory() as folder:
        shape = Path(__file__).resolve().parents[1] / "configs" / "models" / "tiny-llama.json"
        tree = {"model": {"path": f"random:{shape}", "dtype": "float32", "device": "cpu", "max_context": 256}}
        config = config_from_tree({**tree, "train": {"enabled": False}})
        drawn = load_model(config.model, torch.device("cpu"), seed=3)
        drawn.model.save_pretrained(folder)
        drawn.tokenizer.save(Path(folder))
        found = [_gradient(folder, device) for device in ("cpu", DEVICE)]
    error = float((found[0] - found[1]).norm() / found[0].norm())
    return "" if error < 1e-4 else f"gradients differ by {error:.1e}"


def _gradient(folder: str, device: str) -> torch.Tensor:
    tree = {"model": {"path": folder, "dtype": "float32", "device": device, "max_context": 256}}
    config = config_from_tree({**tree, "train": {"enabled": False}})
    config = config.model_copy(update={"train": config.train.model_copy(update={"enabled": True, "clip_norm": 1e9})})
    # Each device has its own random numbers, which decide the first A: it is taken from the CPU.
    engine = Engine.from_config(config, load_model(config.model, torch.device(device), seed=3))
    runner, bank = engine.runner, engine.runner.bank
    rng = torch.Generator().manual_seed(5)
    with engine.streams.training():
        bank.set_shadow({k: torch.randn(v.shape, generator=rng) * 0.2 for k, v in bank.shadow_state().items()})
        trainer = ShadowTrainer(TrainRunner(runner), bank, samples(runner.stack.vocab_size, 3, 40), config.train)
        run_step(engine, trainer, 3)
        return bank.gradient.cpu()


def nccl_average() -> str:
    tree = {"model": {"path": "none", "device": DEVICE}, "train": {"enabled": False}}
    topology = make_topology(config_from_tree(tree), RankEnv(0, 1, 0, 1), dist.HashStore())
    group = topology.combined_group(((0,), (0,)), 1).result()
    mean = WeightedMean(torch.full((5,), 3.0, device=DEVICE), 2, group)
    while not mean.done():
        time.sleep(0.001)
    average, total = mean.result()
    dist.destroy_process_group()
    return "" if average.tolist() == [3.0] * 5 and float(total) == 2 else f"{average.tolist()}, weight {float(total)}"


def full_batch_trains() -> str:
    """Requests fill the whole batch, and none is close to its SLO: training must progress."""
    scale = scale_of(sys.argv)
    bench = Bench(scale.shapes[0], scale)
    engine = bench.engine()
    trainer = bench.trainer(engine, 4, 32 if DRY_RUN else 128)
    add_job(engine, trainer.step(4, 1))
    until = time.perf_counter() + (5 if DRY_RUN else 2)
    while engine.jobs and time.perf_counter() < until:
        bench.top_up(engine)
        engine.step()
    # On the slow cores of a dry run it is chance whether a step fits into the gaps.
    return "not one training step in 2 s beside a full batch" if engine.jobs and not DRY_RUN else ""


CHECKS: tuple[tuple[str, Check], ...] = (
    ("a batch of no rows", zero_rows),
    ("float32 products within the specification", float32_products),
    ("one kernel for each linear layer", one_kernel_per_linear),
    ("decode attention, 21 heads on 7, d=80, blocks of 12, float32", odd_heads),
    ("equal weights give equal gradients on CPU and GPU", same_on_both_devices),
    ("the average of a round on NCCL, one rank", nccl_average),
    ("training beside a full batch", full_batch_trains),
    ("an 8B shape in bfloat16 passes the proof at the start", large_model),
)


if __name__ == "__main__":
    sys.exit(run_checks("What failed before", CHECKS))
