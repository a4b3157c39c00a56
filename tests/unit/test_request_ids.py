"""No two requests of a run's folder have the same id, whoever asks them and in whichever start."""

from __future__ import annotations

from pathlib import Path

from control_run import make_config
from scripted_replica import make_tokenizer

from clif.control.durability.journal import Accepted, Began
from clif.control.durability.recovery import Recorded, add_up, recover
from clif.control.quality import QualityCheck
from clif.data.instruct import read_rows
from clif.data.load import ScheduledRequest
from clif.types import ID_SPACE, Request, Sampling


def ask(id: int) -> Request:
    return Request(id=id, prompt=(1,), sampling=Sampling())


def probe_ids(tmp_path: Path, start: int) -> set[int]:
    config = make_config(tmp_path)
    assert config.data.path is not None
    quality = QualityCheck(config, read_rows(config.data.path), make_tokenizer(), start)
    return {probe.id for _ in range(2) for probe in quality.begin([])}


def test_a_folder_with_millions_of_requests_gives_no_user_the_id_of_a_probe(tmp_path: Path) -> None:
    probes = [probe_ids(tmp_path, start) for start in range(3)]
    assert len(set.union(*probes)) == 3 * 4, "two measurements of two probes in each of three starts"
    for answered in (999_999, 1_999_999, 2_999_999):
        last = Accepted(request=ask(answered), arrival_unix=0.0, at_s=0.0)
        past = add_up([Began(load="another", first_id=0, continued=False), last])
        load = [ScheduledRequest(at_s=0.0, request=ask(i)) for i in range(4)]
        found = recover(past, load, False, frozenset(), Recorded())
        given = {scheduled.request.id for scheduled in found.load}
        assert given == {answered + 1 + i for i in range(4)}
        assert not given & set.union(*probes)


def test_the_ids_of_a_thousand_starts_fit_where_they_are_written() -> None:
    """The tables hold them as 64-bit integers; a reader may turn them into doubles."""
    assert 1001 * ID_SPACE < 2**53
