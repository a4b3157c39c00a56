"""Every rank belongs to exactly one replica, or the error says what to change."""

from __future__ import annotations

import os

import pytest
import warm
from hypothesis import given
from hypothesis import strategies as st

from clif.distributed.layout import LayoutError, check_divisible, check_hosts, make_layout
from clif.metrics.provenance import gpu_names


@given(tp=st.integers(1, 8), replicas=st.integers(1, 16))
def test_every_rank_belongs_to_exactly_one_replica(tp, replicas):
    layout = make_layout(tp * replicas, tp)
    assert layout.world_size == tp * replicas
    for rank in range(layout.world_size):
        assert layout.replicas[layout.replica_of(rank)][layout.tp_rank_of(rank)] == rank
    members = tuple(range(0, replicas, 2))
    groups = [layout.data_parallel_ranks(members, i) for i in range(tp)]
    assert sorted(r for group in groups for r in group) == sorted(r for m in members for r in layout.replicas[m])


@given(data=st.data(), tp=st.integers(1, 4), replicas=st.integers(1, 6))
def test_ranks_named_in_any_order_average_each_shard_once(data, tp, replicas):
    """Promise 8 needs it: the groups of two shards never share a rank, whichever replicas are members."""
    ranks = data.draw(st.permutations(range(tp * replicas)))
    gpus = tuple(tuple(ranks[i * tp : (i + 1) * tp]) for i in range(replicas))
    layout = make_layout(tp * replicas, tp, replicas, gpus)
    members = tuple(sorted(data.draw(st.sets(st.integers(0, replicas - 1), min_size=1))))
    groups = [layout.data_parallel_ranks(members, i) for i in range(tp)]
    assert sorted(r for group in groups for r in group) == sorted(r for m in members for r in gpus[m])
    assert all(group == tuple(sorted(group)) for group in groups), "all members must name the group alike"
    assert all(layout.tp_rank_of(r) == i for i, group in enumerate(groups) for r in group)


def test_explicit_replicas_keep_their_order():
    layout = make_layout(4, replica_gpus=((3, 0), (1, 2)))
    assert layout.tp_rank_of(3) == 0 and layout.tp_rank_of(0) == 1 and layout.replica_of(2) == 1
    assert layout.data_parallel_ranks((0, 1), 0) == (1, 3)


def test_replicas_of_different_sizes_are_read():
    assert make_layout(3, replica_gpus=((0, 1), (2,))).replicas == ((0, 1), (2,))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"world_size": 3, "tp_size": 2}, "tp_size 2 does not divide the 3 ranks"),
        ({"world_size": 4, "tp_size": 2, "replicas": 3}, "needs 6 ranks, but 4 were started"),
        ({"world_size": 4, "replica_gpus": ((0, 1), (2,))}, r"must name each of the ranks 0\.\.3 exactly once"),
        ({"world_size": 3, "replica_gpus": ((0, 1), (1,))}, "exactly once"),
        ({"world_size": 2, "replica_gpus": ((0,), (1,)), "replicas": 3}, "lists 2 replicas"),
        ({"world_size": 2, "replica_gpus": ((0, 1), ())}, "a replica without ranks: give it at least one or remove it"),
        ({"world_size": 3, "replica_gpus": ((0, 1), (2,)), "tp_size": 2}, r"replicas of \[1, 2\] ranks"),
    ],
)
def test_wrong_layouts_say_what_to_change(arguments, sentence):
    """Promise 7: what cannot be honoured is an error."""
    with pytest.raises(LayoutError, match=sentence):
        make_layout(**arguments)


def test_a_replica_spans_hosts_only_if_that_is_wanted():
    layout = make_layout(8, 4)
    check_hosts(layout, 4, across_hosts=False)
    with pytest.raises(
        LayoutError, match=r"replica 0 would have its ranks \[0, 1, 2, 3\] on hosts \[0, 1\]: .*across_hosts=true"
    ):
        check_hosts(layout, 2, across_hosts=False)
    check_hosts(layout, 2, across_hosts=True)


@pytest.mark.parametrize("profile", ["gpu1", "gpu8", "gpu8_tp2", "nodes2_70b", "tp_cpu", "demo", "smoke", "launch"])
def test_every_profile_is_laid_out_by_a_dry_run(profile):
    command = ["launch/run.py", "--dry-run", "--config", f"configs/{profile}.yaml"]
    if profile in ("demo", "tp_cpu"):
        # Model and data are fetched, and may not be here.
        command += ["model.path=random:configs/models/tiny-llama.json", "data.path=configs/data/words.jsonl"]
        command += ["layout.tp_size=2", *(["quality.exact_match_rows=8"] if profile == "demo" else [])]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = warm.run(command, environment)
    if profile.startswith(("gpu", "nodes")) and not gpu_names():
        assert done.returncode == 2 and done.stderr.count("error: model.device is cuda, but this host shows no") == 1
    else:
        assert done.returncode == 0, done.stderr
    assert "replica 0: ranks [0" in done.stdout
    # A GPU of 80 GB holds what the profiles for GPUs ask for.
    if profile.startswith(("gpu", "nodes")):
        size = float(done.stdout.split(" on a GPU: about ")[1].split(" MiB")[0].replace(",", ""))
        assert 16_000 < size < 75_000


@pytest.mark.parametrize(
    ("sizes", "ranks", "what"),
    [
        ((4, 2, 96), 3, "4 attention heads"),
        ((12, 3, 96), 2, "3 key/value heads"),
        ((4, 2, 97), 2, "97 MLP columns"),
    ],
)
def test_a_model_that_ranks_cannot_share_is_refused_with_what_to_change(sizes, ranks, what):
    with pytest.raises(LayoutError, match=f"{ranks} ranks cannot share the model's {what} evenly: change layout.tp"):
        check_divisible(*sizes, ranks)
    # Fewer KV heads than ranks are held several times.
    check_divisible(8, 2, 96, 4)


def test_a_dry_run_refuses_a_model_that_ranks_cannot_share():
    command = ["launch/run.py", "--dry-run", "--config", "configs/smoke.yaml", "layout.tp_size=3"]
    done = warm.run(command)
    assert done.returncode == 2 and "3 ranks cannot share the model's 4 attention heads" in done.stderr
