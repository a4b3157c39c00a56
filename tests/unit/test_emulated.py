"""An emulated engine: the real protocol and the real scheduler, and nothing that computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import transformers
from control_run import make_config
from scripted_replica import make_tokenizer

from clif.adapters.peft_files import config_flaw, describe, weights_flaw
from clif.config import Config, ConfigError, MetricsConfig
from clif.emulated.member import shapes
from clif.emulated.replica import EmulatedReplica, EmulatedSupervisor, text_ids
from clif.emulated.step_times import FixedTimes, MeasuredTimes, step_times
from clif.emulated.tokenizer import read_tokenizer
from clif.metrics.schema import TABLES
from clif.replica.records import RankRecords
from clif.tokenizer import from_transformers
from clif.types import FinishReason, Request, RoundPlan, Sampling, TokenLogprob
from clif.wire import messages as m

REPO = Path(__file__).resolve().parents[2]
NO_TORCH = "import sys; sys.modules.update(torch=None, transformers=None, peft=None)"
"""As sitecustomize: an import of one of these raises ImportError."""


def emulated_config(tmp_path: Path, **engine: Any) -> Config:
    return make_config(
        tmp_path, train={"enabled": False}, federation={"rounds": None}, engine={"emulated": 0, **engine}
    )


def request(id: int, max_tokens: int = 5, prompt: int = 3) -> Request:
    return Request(id=id, prompt=(2,) * prompt, sampling=Sampling(max_tokens=max_tokens))


class Line:
    """What a replica sent, and a replica that sends into it."""

    def __init__(self, tmp_path: Path) -> None:
        self.config, self.sent = emulated_config(tmp_path), list[m.Up]()
        self.records = RankRecords(tmp_path, 0, MetricsConfig(), {})

    def build(self, steps: int = 0) -> EmulatedReplica:
        parts = FixedTimes(0.0), make_tokenizer(), self.records
        return EmulatedReplica(self.config, 0, *parts, self.sent.append, steps=steps)

    def answer_to(self, id: int) -> list[int]:
        events = [e for message in self.sent if isinstance(message, m.Tokens) for e in message.events]
        return [token for event in events if event.request_id == id for token in event.tokens]

    def ends(self) -> dict[int, FinishReason]:
        events = [e for message in self.sent if isinstance(message, m.Tokens) for e in message.events]
        return {event.request_id: event.finish for event in events if event.finish}


# --- one replica ---------------------------------------------------------------------------------


def test_every_answer_is_the_text_as_long_as_was_asked_for(tmp_path):
    line = Line(tmp_path)
    replica, text = line.build(), text_ids(make_tokenizer())
    replica.step([m.Submit(request=request(1)), m.Submit(request=request(2, len(text) + 3, prompt=40))])
    while replica.wait_s() == 0:
        replica.step(())
    assert line.answer_to(1) == [text[i % len(text)] for i in range(5)]
    assert line.answer_to(2) == [*text, *text[:3]]
    assert line.ends() == {1: FinishReason.LENGTH, 2: FinishReason.LENGTH}
    assert replica.scheduler.pool.used_tokens == 0


def test_log_probabilities_are_made_up_where_they_are_asked_for(tmp_path):
    line = Line(tmp_path)
    replica = line.build()
    asked = Request(id=1, prompt=(2,), sampling=Sampling(max_tokens=3, logprobs=1))
    replica.step([m.Submit(request=asked), m.Submit(request=request(2))])
    while replica.wait_s() == 0:
        replica.step(())
    events = [e for message in line.sent if isinstance(message, m.Tokens) for e in message.events]
    reports = [report for event in events if event.request_id == 1 for report in event.logprobs]
    assert reports == [TokenLogprob(token, 0.0, ((token, 0.0),)) for token in line.answer_to(1)]
    assert not any(event.logprobs for event in events if event.request_id == 2)


def test_the_events_of_a_step_are_one_message(tmp_path):
    line = Line(tmp_path)
    replica = line.build()
    replica.step([m.Submit(request=request(id)) for id in range(4)])
    assert [len(message.events) for message in line.sent if isinstance(message, m.Tokens)] == [4]


def test_a_cancelled_request_frees_its_blocks_at_once(tmp_path):
    line = Line(tmp_path)
    replica = line.build()
    replica.step([m.Submit(request=request(1, 500))])
    assert replica.scheduler.pool.used_tokens > 0
    replica.step([m.Cancel(request_id=1)])
    assert replica.scheduler.pool.used_tokens == 0 and line.ends() == {1: FinishReason.CANCELLED}


def test_an_answer_that_another_replica_began_goes_on_where_it_was(tmp_path):
    line = Line(tmp_path)
    replica, text = line.build(), text_ids(make_tokenizer())
    replica.step([m.Submit(request=request(1), output_ids=text[:2], version=0)])
    while replica.wait_s() == 0:
        replica.step(())
    assert line.answer_to(1) == [text[i % len(text)] for i in range(2, 5)]


def test_an_installed_version_answers_new_requests(tmp_path):
    line = Line(tmp_path)
    replica = line.build()
    replica.step([m.Install(version=3, weights=b"", round_id=2)])
    replica.step([m.Submit(request=request(1, 1))])
    assert line.sent[:2] == [m.Settled(replica=0, round_id=2, version=3, step=0), m.Held(replica=0, versions=(3,))]
    (answer,) = (message for message in line.sent if isinstance(message, m.Tokens))
    assert answer.events[0].version == 3


def test_versions_are_kept_read_and_rolled_back_as_they_are_asked_for(tmp_path):
    line = Line(tmp_path)
    replica = line.build()
    replica.step([m.Keep(versions=(1, 2)), m.Install(version=1, weights=b""), m.Install(version=2, weights=b"")])
    assert replica.scheduler.slots.held == (1, 2)
    replica.step([m.Activate(version=1), m.Keep(versions=()), m.Submit(request=request(1, 1))])
    assert replica.scheduler.slots.held == (1,) and replica.scheduler.slots.active == 1


def plan(round_id: int, base: int = 0) -> RoundPlan:
    return RoundPlan(
        round_id=round_id, members=(0,), incarnations=(0,), local_steps=10, micro_batch=4, accumulation=1,
        base_version=base,
    )  # fmt: skip


def test_a_round_goes_through_and_each_version_is_better_than_the_one_before(tmp_path):
    line = Line(tmp_path)
    replica = line.build()
    for number in (1, 2):
        line.sent.clear()
        replica.step([m.BeginRound(plan=plan(number, number - 1), group=0)])
        replica.step([m.FinishSteps(round_id=number)])
        replica.step([m.Aggregate(round_id=number)])
        replica.step([m.Settle(round_id=number, commit=True, version=number, publish=True)])
        done, voted, published, settled, held = (message for message in line.sent if not isinstance(message, m.Report))
        assert 1 <= done.result.steps <= 10 and done.result.samples == 4 * done.result.steps
        assert voted.vote.candidate_loss < voted.vote.active_loss
        adapter = line.config.adapter
        assert not config_flaw(published.config_json, adapter.r, adapter.lora_alpha)
        assert not weights_flaw(published.weights, describe(shapes(adapter)))
        assert (settled.version, held.versions) == (number, (number,))
    line.sent.clear()
    replica.step([m.Evaluate()])
    assert line.sent[0].result.loss == voted.vote.candidate_loss


def test_a_discarded_round_leaves_the_version_as_it_was(tmp_path):
    line = Line(tmp_path)
    replica = line.build()
    replica.step([m.BeginRound(plan=plan(1), group=0), m.FinishSteps(round_id=1), m.Aggregate(round_id=1)])
    replica.step([m.Settle(round_id=1, commit=False, version=0)])
    assert replica.scheduler.slots.active == 0 and replica.member.micro_batch == 0


def test_a_replica_that_was_declared_lost_forgets_its_requests_and_what_was_sent_before_its_welcome(tmp_path):
    line, hellos = Line(tmp_path), list[int]()
    supervisor = EmulatedSupervisor(line.build, lambda _, incarnation: hellos.append(incarnation))
    encode = msgspec.msgpack.encode
    supervisor.step([encode(m.Submit(request=request(1, 500))), encode(m.Rebuild(reason="silent"))])
    supervisor.step([encode(m.Submit(request=request(2)))])
    assert hellos == [0, 1] and not supervisor.replica.scheduler.sequences
    supervisor.step([encode(m.Welcome(incarnation=1)), encode(m.Submit(request=request(3)))])
    assert [s.request.id for s in supervisor.replica.scheduler.sequences] == [3]


# --- times of steps ------------------------------------------------------------------------------


def ticks(*rows: tuple[int, int, float]) -> Any:
    """Rows of `ticks`: (decode_rows, prefill_tokens, seconds)."""
    table = np.full(len(rows), TABLES["ticks"].fill, dtype=TABLES["ticks"].dtype)
    for row, (decode_rows, prefill_tokens, seconds) in zip(table, rows, strict=True):
        row["decode_rows"], row["prefill_tokens"], row["seconds"] = decode_rows, prefill_tokens, seconds
        row["regime"] = b"alone"
    return table


def test_times_drawn_from_a_run_are_those_of_steps_of_this_size():
    decode = [(n, 0, (0.010 + 0.001 * n) * spread) for n in range(1, 33) for spread in (0.9, 1.0, 1.1)]
    prefill = [(0, n, 0.02 + 0.0001 * n) for n in range(64, 512, 8)]
    times = MeasuredTimes(ticks(*decode, *prefill), "run")
    eight = [times.step_s(8, 0) for _ in range(100)]
    assert 0.015 < min(eight) < 0.018 < max(eight) < 0.021, (min(eight), max(eight))
    assert times.step_s(0, 256) == pytest.approx(0.0456, rel=0.1)
    # Twice the largest batch that was measured.
    assert times.step_s(64, 0) == pytest.approx(0.074, rel=0.2)


def test_times_of_steps_beside_training_and_of_idle_steps_are_left_out():
    table = ticks((4, 0, 0.01), (4, 0, 9.0), (4, 0, 0.0))
    table["regime"][1] = b"concurrent"
    assert MeasuredTimes(table, "run").step_s(4, 0) == pytest.approx(0.01)
    with pytest.raises(ConfigError, match="run holds no serving step: name a run that has served"):
        MeasuredTimes(table[1:2], "run")


def test_a_number_is_milliseconds_and_default_is_a_small_step():
    assert step_times(20, 0).step_s(1, 0) == 0.02
    assert step_times(0, 0).step_s(64, 512) == 0
    assert step_times("default", 0).step_s(1, 0) == 0.01


# --- tokenizer and configuration -----------------------------------------------------------------


def test_the_tokenizer_of_a_folder_is_the_one_that_transformers_reads(stories):
    ours = read_tokenizer(str(stories))
    other = transformers.AutoTokenizer.from_pretrained(str(stories))
    theirs = from_transformers(other, [2])
    assert (ours.template, ours.eos_ids, ours.special) == (theirs.template, theirs.eos_ids, theirs.special)
    chat = [{"role": "user", "content": "Once upon a time"}]
    assert ours.encode_chat(chat) == theirs.encode_chat(chat)
    assert ours.encode_text("a dog") == theirs.encode_text("a dog")


def test_a_template_is_read_from_its_own_file_or_from_a_list(tmp_path):
    make_tokenizer().save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 0}')
    settings = {"chat_template": [{"name": "default", "template": "listed"}], "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    read = read_tokenizer(str(tmp_path))
    assert (read.template, read.eos_ids, read.special) == ("listed", (0,), {"eos_token": "</s>"})
    (tmp_path / "chat_template.jinja").write_text("of the file")
    assert read_tokenizer(str(tmp_path)).template == "of the file"


def test_a_model_whose_tokenizer_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        read_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="holds no tokenizer that can be read"):
        read_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match=r"takes the tokenizer of a folder, and model\.path some/name is none"):
        read_tokenizer("some/name")


@pytest.mark.parametrize("given", ["default", 0.0, 20.0, Path(__file__)])
def test_what_is_emulated_survives_the_runs_config_json(tmp_path, given):
    config = emulated_config(tmp_path, emulated=given)
    assert Config.model_validate_json(config.model_dump_json()).engine.emulated == given


def test_impossible_emulations_are_refused_with_what_to_change(tmp_path):
    with pytest.raises(ConfigError, match=r"engine\.emulated nowhere is no run and no run\.h5: correct it"):
        emulated_config(tmp_path, emulated="nowhere")
    with pytest.raises(ConfigError, match=r"engine\.emulated is -1: it must be default, milliseconds from 0"):
        emulated_config(tmp_path, emulated=-1)


# --- a whole run ---------------------------------------------------------------------------------


def clif_run(tmp_path: Path, *overrides: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`clif run smoke` without torch."""
    (tmp_path / "sitecustomize.py").write_text(NO_TORCH)
    command = [sys.executable, "-P", "-m", "clif.cli", "run", "smoke", f"run.out_dir={tmp_path}", "run.status=plain"]
    brief = ["federation.rounds=1", "quality=null", "load.rate_rps=100", "load.duration_s=1.5", "control.hold_s=0.1"]
    return subprocess.run(
        [*command, "engine.emulated=0", *brief, *overrides], cwd=REPO, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(tmp_path), **environ},
    )  # fmt: skip


def test_a_run_needs_neither_torch_nor_weights_nor_a_launcher_and_says_that_it_was_emulated(tmp_path):
    done = clif_run(tmp_path, "layout.replicas=2")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "smoke/summary.json").read_text())
    assert summary["run"]["engine"] == "emulated" and "| engine                 | emulated" in done.stdout
    assert summary["run"]["sources"] == ["control", "rank-00000", "rank-00001"]
    requests = summary["requests"]
    assert requests["submitted"] == requests["finished"]["length"] > 50 and requests["unfinished"] == 0
    assert summary["training"]["rounds_completed"] == 1


def test_a_launcher_is_refused_with_the_command_that_does_it(tmp_path):
    done = clif_run(
        tmp_path, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="h", MASTER_PORT="1"
    )
    assert done.returncode == 2
    assert "engine.emulated is one process: start it without torch's environment" in done.stderr
