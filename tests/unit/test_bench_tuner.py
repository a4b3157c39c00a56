"""The tuner: finds what is fastest with few questions, leaves a valid table whenever it is ended, and continues."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import torch
import tune_gpu
from compile_ahead import CompileJob, CompilePool, segments_of
from halving import Heats, Ranking, fastest, rank
from timing import Timing
from tune_gpu import load
from tune_plan import LAYERS, RANKS, SHADOW, Gpu, Task, candidates_of, first_of_each, group_of, tasks
from tune_rig import Rig
from tune_session import Session, summary

from clif.kernels.candidates import linear_candidates
from clif.kernels.dual_lora_forms import DualLoraLinear
from clif.kernels.dual_lora_reference import SHADOW as SHADOW_SLOT
from clif.kernels.testing.dual_lora_specification import random_layer
from clif.kernels.tile_file import Stamp, TileFile
from clif.kernels.tiles import GradTiles, LinearTiles

REPO = Path(__file__).resolve().parents[2]
H100 = Gpu(132, 90)
STAMP = Stamp("2026-11-27", "a GPU", "2.11", "3.6", "0123456789ab")


class Simulated:
    """Costs by name, with noise, on a clock that each sample moves. group: the name's first letter."""

    def __init__(self, costs: dict[str, float], noise: float = 0.0) -> None:
        self.costs, self.noise, self.now = costs, noise, 0.0
        self.asked: Counter[str] = Counter()
        self._random = random.Random(0)

    def cost(self, name: str, count: int) -> Sequence[float]:
        if self.costs[name] == float("inf"):
            raise RuntimeError("out of resources\nand more")
        self.asked[name] += count
        self.now += count
        return [self.costs[name] * (1 + self.noise * self._random.random()) for _ in range(count)]

    def rank(self, until: float = float("inf")) -> Ranking[str]:
        return rank(list(self.costs), lambda name: name[0], self.cost, lambda: self.now >= until)


def costs(count: int) -> dict[str, float]:
    return {f"{'abc'[i % 3]}{i}": 100.0 + (37 * i) % count for i in range(count)}


def test_the_cheapest_of_many_is_found_and_most_are_asked_in_the_first_heat_only() -> None:
    world = Simulated(costs(30), noise=0.02)
    ranking = world.rank()
    best = min(world.costs, key=lambda name: world.costs[name])
    assert min(ranking.times, key=lambda name: ranking.times[name].median) == best and ranking.complete
    again = {name for name, count in world.asked.items() if count > Heats().first}
    assert again == set(ranking.times) and len(again) <= 30 * Heats().kept + 3
    assert all(count in (Heats().first, Heats().first + Heats().second) for count in world.asked.values())
    spread = ranking.times[best]
    assert spread.p10 <= spread.median <= spread.p90


def test_the_best_of_every_group_is_timed_to_the_end_however_slow() -> None:
    world = Simulated({"a1": 1.0, "a2": 1.1, "a3": 1.2, "b1": 50.0, "b2": 40.0, "c1": 99.0})
    assert {"a1", "b2", "c1"} <= set(world.rank().times)
    assert "b1" not in world.rank().times


def test_equal_candidates_are_asked_once() -> None:
    world = Simulated({"a": 1.0})
    rank(["a", "a"], lambda name: name, world.cost, lambda: False)
    assert world.asked["a"] == Heats().first + Heats().second


def test_a_candidate_that_fails_is_left_out_and_said() -> None:
    ranking = Simulated({"a1": 2.0, "a2": float("inf"), "b1": float("inf")}).rank()
    assert set(ranking.times) == {"a1"} and ranking.complete
    assert ranking.left_out == {name: "RuntimeError: out of resources" for name in ("a2", "b1")}


@pytest.mark.parametrize("until", range(0, 200, 7))
def test_whenever_time_is_up_the_choice_is_one_that_was_measured(until: int) -> None:
    world = Simulated(costs(30))
    ranking = world.rank(until)
    assert world.now < until + Heats().first
    assert set(ranking.times) <= set(world.asked)
    assert ranking.complete == ({name[0] for name in world.asked} == {"a", "b", "c"})
    assert ranking.cut_short == (world.now >= until)
    choice = fastest(ranking.times, world.costs, lambda name: None, ranking.left_out)
    assert (choice is not None) == bool(world.asked)
    if choice:
        assert world.costs[choice] <= 1.01 * min(world.costs[name] for name in world.asked)


def test_every_group_has_a_time_before_any_group_has_a_second_candidate() -> None:
    world = Simulated({f"a{i}": 1.0 for i in range(9)} | {"b": 1.0, "c": 1.0})
    world.rank(3 * Heats().first)
    assert {name[0] for name in world.asked} == {"a", "b", "c"}


def timing(median: float, width: float) -> Timing:
    return Timing(median - width, median, median + width)


def test_within_the_spread_the_simpler_one_is_chosen_and_beyond_it_the_faster() -> None:
    times = {"simple": timing(100.5, 1), "fast": timing(100, 1)}
    assert fastest(times, ["simple", "fast"], lambda name: None, {}) == "simple"
    # Nearer than 1 %, but beyond what the fastest one varies by.
    times = {"simple": timing(100.5, 0.1), "fast": timing(100, 0.1)}
    assert fastest(times, ["simple", "fast"], lambda name: None, {}) == "fast"
    # Within the spread, but that is wide.
    times = {"simple": timing(104, 10), "fast": timing(100, 10)}
    assert fastest(times, ["simple", "fast"], lambda name: None, {}) == "fast"


def test_what_computes_something_else_is_never_chosen_whatever_its_speed() -> None:
    times, left_out = {"wrong": timing(1, 0), "right": timing(9, 0)}, {}
    wrong = {"wrong": "y: relative error 1.0"}
    assert fastest(times, times, wrong.get, left_out) == "right" and left_out == wrong
    assert fastest(times, ["wrong"], wrong.get, {}) is None


def test_the_plan_has_every_shape_of_both_models_and_begins_with_the_goals() -> None:
    plan = list(tasks(dry=False))
    assert len(set(plan)) == len(plan) == len({(t.what, t.shape()) for t in plan})
    for r in RANKS:
        rows = Counter((t.what, t.shape().rows) for t in plan if t.r == r)
        forward = {("forward", n): len(LAYERS) for n in (1, 16, 64, 256, 2048, 2112)}
        assert rows == forward | {("backward", 2048): len(LAYERS), ("grads", 2048): len(LAYERS)}
    assert [t.sizes for t in plan[:4]] == [(4096,), (2048,), (1024,), (4096, 1024, 1024)]
    assert {t.r for t in plan[:60]} == {16} and SHADOW == SHADOW_SLOT


def test_a_backward_is_looked_up_by_the_widths_that_the_kernel_sees() -> None:
    task = Task((4096, 1024), 2048, 16, ((2048, SHADOW),), "backward")
    assert (task.shape().depth, task.shape().out, task.shape().backward) == (5120, 2048, True)
    factors = replace(task, what="grads").shape()
    assert (factors.depth, factors.out, factors.backward) == (2048, 5120, True)


def test_shapes_share_kernels_so_that_an_hour_of_compiling_is_not_needed() -> None:
    jobs, keys = 0, set()
    for task in tasks(dry=False):
        if task.r != 8:
            for tiles in candidates_of(task, H100, TileFile()):
                backward = task.what == "backward"
                jobs += 1
                keys.add(CompileJob(task.sizes, task.depth, task.r, task.lengths, backward, tiles).key())
    assert jobs > 2.5 * len(keys) and len(keys) < 1500


US = {"base": 10.0, "torch": 30.0, "fused": 15.0, "pair": 14.0, "three": 13.0, "branches": 12.5, "separate": 12.0}


class FakeRig:
    """Costs by form, the same for all tiles of it; a broken one computes something else."""

    def __init__(self, world: World, task: Task) -> None:
        self.world, self.beside = world, ("torch",) if task.what == "grads" else ("base", "torch")

    def cost(self, candidate: Any, count: int) -> Sequence[float]:
        self.world.now += count
        return [US.get(group_of(candidate), 5.0)] * count

    def wrong(self, candidate: Any) -> str | None:
        return "y is not finite" if group_of(candidate) in self.world.broken else None


class World:
    """A tuner of three tasks on a virtual clock. end_s: when time is up."""

    def __init__(
        self, path: Path, broken: tuple[str, ...] = (), uncompiled: tuple[str, ...] = (), crashed: tuple[str, ...] = ()
    ) -> None:
        self.path, self.broken, self.uncompiled, self.crashed, self.now = path, broken, uncompiled, crashed, 0.0
        learn = ((2048, SHADOW),)
        self.tasks = [
            Task((4096,), 4096, 16, ((48, 0), (16, 1)), "forward"),
            Task((4096,), 4096, 16, learn, "backward"),
            Task((4096,), 4096, 16, learn, "grads"),
            Task((4096,), 4096, 8, ((48, 0), (16, 1)), "forward"),
        ]
        self.asked: list[Task] = []

    def session(self, end_s: float = float("inf"), again: bool = False, stamp: Stamp = STAMP) -> Session:
        file = load([self.path], again)

        def rig(task: Task) -> FakeRig:
            return FakeRig(self, task)

        def save() -> None:
            file.write(self.path)

        return Session(file, stamp, H100, Heats(), rig, self.ask, save, end_s, lambda: self.now, again)

    def ask(self, task: Task, candidates: Sequence[Any]) -> dict[Any, Future[float]]:
        self.asked.append(task)
        futures: dict[Any, Future[float]] = {tiles: Future() for tiles in candidates}
        for tiles, future in futures.items():
            if group_of(tiles) in self.uncompiled:
                future.set_exception(RuntimeError("PTXASError: too much"))
            elif group_of(tiles) in self.crashed:
                future.set_exception(BrokenExecutor("it is gone"))
            else:
                future.set_result(0.0)
        return futures


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "gpu.json")


def test_an_entry_has_the_fastest_tiles_of_each_form_and_the_two_choices(world: World) -> None:
    session = world.session()
    session.run(world.tasks)
    assert session.counts == {"measured": 4}
    found = TileFile.read(world.path)
    forward = found.linear[world.tasks[0].shape()]
    assert (forward.chosen, forward.captured, forward.stamp) == ("separate", "branches", STAMP)
    assert {name: us.median for name, us in (forward.us | forward.beside).items()} == US
    assert set(forward.tiles) == {"fused", "pair", "three", "branches", "separate"}
    assert found.grads[world.tasks[2].shape()].us.median == 5.0
    assert any("| 64 rows 4096->4096 r=16 | 10.0 | 30.0 |" in line for line in summary(found))


def test_what_is_waited_for_first_can_be_compiled_while_something_else_is_measured(world: World) -> None:
    world.session().run(world.tasks[:1])
    world.asked.clear()
    world.session().ask_first(world.tasks)
    assert world.asked == world.tasks[1:]


def test_a_rank_of_8_measures_the_winners_of_16(world: World) -> None:
    session = world.session()
    session.run(world.tasks[:1])
    tiles = session.file.linear[world.tasks[0].shape()].tiles
    assert candidates_of(world.tasks[3], H100, session.file) == tuple(tiles.values())
    assert len(candidates_of(world.tasks[3], H100, TileFile())) > 15


def test_forms_that_are_wrong_or_do_not_compile_are_in_no_entry_and_the_entry_says_why(tmp_path: Path) -> None:
    world = World(tmp_path / "gpu.json", broken=("separate", "pair"), uncompiled=("branches",))
    world.session().run(world.tasks[:1])
    entry = TileFile.read(world.path).linear[world.tasks[0].shape()]
    assert set(entry.tiles) == {"fused", "three"} and (entry.chosen, entry.captured) == ("three", "three")
    assert entry.left_out["branches: PTXASError: too much"] == 3
    assert entry.left_out["separate: y is not finite"] == 2


def test_a_shape_that_a_crash_of_the_compiler_reached_is_measured_by_the_next_call(tmp_path: Path) -> None:
    world = World(tmp_path / "gpu.json", crashed=("branches",))
    first = world.session()
    first.run(world.tasks[:1])
    assert first.counts == {"not measured": 1} and TileFile.read(world.path).linear == {}
    again = world.session()
    again.run(world.tasks[:1])
    assert again.counts == {"measured": 1} and again.file.unfinished == []
    assert set(again.file.linear[world.tasks[0].shape()].tiles) == {"fused", "pair", "three", "separate"}


def test_a_second_call_measures_what_the_first_did_not_reach_and_nothing_else(world: World) -> None:
    first = world.session(end_s=250.0)
    first.run(world.tasks)
    # The second one is cut short, and no entry is made of half of its heats.
    assert first.counts == {"measured": 1, "not measured": 1, "not measured, time was up": 2}
    measured = set(TileFile.read(world.path).linear)
    world.asked.clear()
    second = world.session()
    second.run(world.tasks)
    assert second.counts == {"known": 1, "measured": 3}
    assert not any(task.shape() in measured for task in world.asked if task.what != "grads")


@pytest.mark.parametrize("end_s", range(0, 500, 37))
def test_the_table_is_valid_whenever_time_is_up(world: World, end_s: int) -> None:
    session = world.session(end_s=end_s)
    session.run(world.tasks)
    assert sum(session.counts.values()) == len(world.tasks)
    if world.path.exists():
        for entry in TileFile.read(world.path).linear.values():
            assert set(entry.tiles) == {"fused", "pair", "three", "branches", "separate"}


def test_what_hung_or_broke_the_device_comes_last_in_the_next_call(world: World) -> None:
    class Hangs(FakeRig):
        def cost(self, candidate: Any, count: int) -> Sequence[float]:
            raise KeyboardInterrupt("it hangs")

    session = world.session()
    session.rig = lambda task: Hangs(world, task)
    with pytest.raises(KeyboardInterrupt, match="it hangs"):
        session.run(world.tasks)
    again = world.session()
    assert again.file.unfinished == [str(world.tasks[0])]
    assert again.in_order(world.tasks) == [*world.tasks[1:], world.tasks[0]]
    again.run(world.tasks)
    assert TileFile.read(world.path).unfinished == [] and again.counts == {"measured": 4}


def test_a_task_of_which_no_candidate_works_comes_last_too_and_the_others_go_on(tmp_path: Path) -> None:
    world = World(tmp_path / "gpu.json", broken=("fused", "pair", "three", "branches", "separate"))
    session = world.session()
    session.run(world.tasks)
    assert session.counts == {"measured": 1, "not measured": 3}
    assert world.session().in_order(world.tasks)[0] == world.tasks[2]


def test_other_versions_and_again_measure_what_the_table_has(world: World) -> None:
    world.session().run(world.tasks[:1])
    for session in (world.session(stamp=replace(STAMP, kernels="other")), world.session(again=True)):
        session.run(world.tasks[:1])
        assert session.counts == {"measured": 1}
    known = world.session(stamp=replace(STAMP, date="2030-01-01"))
    known.run(world.tasks[:1])
    assert known.counts == {"known": 1}


def test_a_table_of_the_earlier_format_stops_the_tuner_unless_all_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    file.write_text('{"about": {}, "linear": [], "grads": []}')
    with pytest.raises(ValueError, match="AGAIN=1"):
        load([file], again=False)
    assert load([file], again=True) == TileFile()


def test_a_lent_machine_s_copy_is_continued_where_no_table_is(world: World, tmp_path: Path) -> None:
    world.session().run(world.tasks[:1])
    assert load([tmp_path / "none.json", world.path], again=False).linear


def test_a_dry_run_has_one_candidate_of_every_form() -> None:
    candidates = linear_candidates(9, 32, 48, 8, False, 4, 80)
    few = first_of_each(candidates)
    assert [tiles.form for tiles in few] == ["fused", "three", "branches", "separate"]
    assert all(tiles.block_n == next(c for c in candidates if c.form == tiles.form).block_n for tiles in few)


def test_entries_are_old_once_the_kernels_source_is_another(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    source = folder / "dual_lora_host.py"
    source.write_text("one")
    monkeypatch.setattr(tune_gpu, "table_path", lambda name: folder / "tuned" / name)
    before = tune_gpu.digest_of_kernels()
    source.write_text("two")
    assert tune_gpu.digest_of_kernels() != before and len(before) == 12


def test_jobs_that_compile_the_same_kernels_are_done_once() -> None:
    tiles, lengths = LinearTiles("three", programs=1), ((48, 0), (16, 1))
    job = CompileJob((4096,), 4096, 16, lengths, False, tiles)
    with CompilePool(None) as pool:
        done = pool.submit(job)
        for same in (replace(job, sizes=(2048,), depth=8192), replace(job, tiles=replace(tiles, form="branches"))):
            assert pool.submit(same) is done
        other = [replace(job, r=8), replace(job, backward=True), replace(job, sizes=(64, 64))]
        other += [replace(job, tiles=t) for t in (replace(tiles, form="fused"), replace(tiles, slices=3), GradTiles())]
        # Columns that are not full, and widths that are no multiple of 16, are other kernels.
        other += [replace(job, sizes=(4000,)), replace(job, sizes=(4104,)), replace(job, depth=4104)]
        assert all(pool.submit(another) is not done for another in other)
        assert done.result() == 0.0
    assert segments_of(((3, 0), (2, None), (4, -1))) == ((0, 3, 0), (5, 9, -1))


SMALL = LinearTiles("three", 16, 32, 32, slices=1, shrinkers=1)
FACTORS = GradTiles(32, 16, 1)


@pytest.mark.parametrize(
    ("what", "tiles", "method", "place", "named"),
    [
        ("forward", SMALL, "forward", 0, "y: "),
        # h is what the gradient of B is made of.
        ("forward", SMALL, "forward", 1, "grad_b: "),
        ("backward", SMALL, "through", 0, "grad_x: "),
        ("backward", SMALL, "through", 1, "grad_a: "),
        ("grads", FACTORS, "factor_gradients", 0, "grad_a: "),
    ],
)
def test_each_result_of_a_candidate_is_compared_with_the_specification(
    monkeypatch: Any, what: Any, tiles: Any, method: str, place: int, named: str
) -> None:
    lengths = ((5, 0), (4, SHADOW)) if what == "forward" else ((4, SHADOW),)
    layer = random_layer((32,), 32, 8, dtype=torch.bfloat16)
    rig = Rig(Task((32,), 32, 8, lengths, what), [layer], torch.device("cpu"))
    assert rig.wrong(tiles) is None
    right = getattr(DualLoraLinear, method)

    def off(*arguments: Any) -> tuple[torch.Tensor, ...]:
        results = list(right(*arguments))
        results[place] = results[place] * 1.05
        return tuple(results)

    monkeypatch.setattr(DualLoraLinear, method, off)
    assert named in (rig.wrong(tiles) or "")


COMPILES = """
import glob, os
from compile_ahead import CompileJob, Fixed, KernelLauncher, DualLoraLinear, compile_only, run_job, torch
from clif.kernels.candidates import grads_candidates, linear_candidates
from clif.kernels.testing.dual_lora_specification import random_batch, random_layer
from clif.kernels.tiles import LinearTiles

def kernels():
    return len(glob.glob(os.environ["TRITON_CACHE_DIR"] + "/*/*.cubin"))

compile_only(90)
learn = ((64, 0), (2048, -1))
candidates = linear_candidates(2112, 4096, 4096, 8, False, 132, 90)
layer = random_layer((512, 256), 256, 8, dtype=torch.bfloat16)
batch = random_batch(layer, learn)
for form in ("pair", "separate"):
    tiles = next(tiles for tiles in candidates if tiles.form == form)
    run_job(CompileJob((4096, 4096), 4096, 8, learn, False, tiles))
    before = kernels()
    DualLoraLinear(layer, KernelLauncher(torch.device("cpu"), Fixed(tiles))).forward(batch.x, batch.segments)
    print(form, before, kernels() - before)
tiles = grads_candidates(2048, 4096, 4096, 8, 132, 90)[0]
run_job(CompileJob((4096, 4096), 4096, 8, ((2048, -1),), False, tiles))
before, hidden = kernels(), torch.zeros(2048, 16, dtype=torch.bfloat16)
real = DualLoraLinear(layer, KernelLauncher(torch.device("cpu"), Fixed(LinearTiles(), tiles)))
real.factor_gradients(batch.grad, batch.x[64:], hidden, hidden)
print("grads", before, kernels() - before)
"""


@pytest.mark.slow  # It compiles five kernels.
@pytest.mark.timeout(240)
def test_layers_without_memory_compile_what_real_layers_of_other_widths_launch(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO / "benchmarks")}
    done = subprocess.run([sys.executable, "-P", "-c", COMPILES], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["pair", "2", "0", "separate", "4", "0", "grads", "5", "0"], done.stdout + done.stderr


@pytest.mark.slow  # It imports torch in three processes, and compiles.
@pytest.mark.timeout(240)
def test_a_machine_without_a_gpu_compiles_what_the_tuner_launches() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/compile_ahead.py", "--jobs", "1"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"1 of them: [12] kernels", done.stdout), done.stdout
