"""`clif eval`: stored versions of a run answer a file, here or on a server, and are scored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import finish, make_rig, random_state
from http_run import HttpRun, http_config
from typer.testing import CliRunner

from clif import llm
from clif.adapters.peft_io import config_json, write_weights
from clif.adapters.store import AdapterStore
from clif.cli import app
from clif.clients.evaluate import (
    choose_metrics,
    choose_rows,
    choose_versions,
    choose_weights,
    read_run,
    with_test_command,
)
from clif.config import config_from_tree
from clif.data.heldout import heldout_parts, probe_rows, read_data
from clif.data.instruct import DataError, encode_samples, read_rows
from clif.errors import InputError
from clif.llm import LLM
from clif.models.weights import loading
from clif.types import AdapterVersion, Sampling

RUNNER = CliRunner()


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps({"prompt": "ask", "completion": "yes", **row}) for row in rows))
    return path


@pytest.fixture
def stored(tmp_path: Path, tiny_config: Path) -> Path:
    """A run with versions 1 and 2 of random adapters, the second one active."""
    model = f"random:{tiny_config}"
    tree = {"run": {"out_dir": str(tmp_path)}, "train": {"enabled": False}, "adapter": {"r": 4}}
    config = config_from_tree(
        {**tree, "model": {"path": model, "dtype": "float32", "device": "cpu", "max_context": 256}}
    )
    config.run_dir.mkdir()
    (config.run_dir / "config.json").write_text(config.model_dump_json())
    rig, store = make_rig(model, adapter={"r": 4}), AdapterStore(config.run_dir)
    for number in (1, 2):
        version = AdapterVersion(number=number, round_id=number, heldout_loss=1.0)
        store.write(version, config_json(rig.bank, "m"), write_weights(random_state(rig.bank, number)))
    return config.run_dir


def test_versions_are_answered_as_by_the_library_and_written_as_json(stored: Path, tmp_path: Path) -> None:
    prompts = [f"What is {n}?" for n in range(3)]
    config = read_run(stored)
    with LLM(
        config.model.path, model={"dtype": "float32", "device": "cpu", "max_context": 256}, adapter={"r": 4}
    ) as llm:
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        known = [one.text for one in llm.generate(messages, Sampling(max_tokens=8), AdapterStore(stored).path(2))]
    data = write_rows(
        tmp_path / "d", *({"prompt": p, "completion": f"{t}."} for p, t in zip(prompts, known, strict=True))
    )
    said = RUNNER.invoke(
        app, ["eval", str(stored), "--data", str(data), "--metrics", "loss,exact_match,chrf", "--max-tokens", "8"]
    )
    assert said.exit_code == 0, said.output
    assert "chrf" in said.output and "95 % interval" in said.output
    result = json.loads((stored / "eval.json").read_text())
    base, active = result["versions"]
    assert (base["version"], active["version"], result["rows"]) == (0, 2, 3)
    loss = active["scores"]["loss"]
    assert loss["low"] < loss["value"] < loss["high"]
    rig = make_rig(config.model.path, seed=config.run.seed)
    samples = encode_samples(read_rows(data), rig.loaded.tokenizer, 256)[0]
    total, tokens = float(finish(rig.train_runner.loss(samples, None))), sum(sample.targets for sample in samples)
    assert base["scores"]["loss"]["value"] == pytest.approx(total / tokens, rel=1e-4), "as training computes it"
    assert base["scores"]["loss"]["count"] == tokens
    assert active["scores"]["chrf"]["value"] > 80 > base["scores"]["chrf"]["value"]


def test_what_cannot_be_evaluated_is_refused_before_the_model_is_loaded(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'blue' is no metric: choose among loss, perplexity, .*, pass_rate"):
        choose_metrics(["bleu,blue"])
    with pytest.raises(InputError, match=r"version 9 is not stored in .*: 0 is the base, and there are 1, 2"):
        choose_versions(stored, [1, 9])
    with pytest.raises(InputError, match=r"is not the folder of a run: its config\.json cannot be read"):
        read_run(tmp_path)
    tests = write_rows(tmp_path / "tests", {"test": "assert True"})
    said = RUNNER.invoke(app, ["eval", str(stored), "--data", str(tests), "--metrics", "pass_rate"])
    assert "name the command that may run it" in str(said.exception)
    with pytest.raises(InputError, match="names no file of the answer"):
        with_test_command(read_run(stored), "python -I")
    with pytest.raises(InputError, match="is no command"):
        with_test_command(read_run(stored), 'python "')
    assert with_test_command(read_run(stored), "python {program}").quality.test_command == ("python", "{program}")


def test_the_choice_of_metrics_versions_and_rows(stored: Path, tmp_path: Path) -> None:
    assert choose_metrics(["bleu, chrf", "bleu"]) == ("bleu", "chrf")
    assert choose_versions(stored, []) == [0, 2] and choose_versions(stored, [2, 1, 2]) == [2, 1]
    config = read_run(stored)
    split = write_rows(tmp_path / "split", *({"split": "test" if i % 2 else "train"} for i in range(10)))
    assert [row.id for row in choose_rows(split, config, None, None, 0)] == [1, 3, 5, 7, 9]
    assert [row.id for row in choose_rows(split, config, "train", None, 0)] == [0, 2, 4, 6, 8]
    some = choose_rows(split, config, None, 3, 0)
    assert some == choose_rows(split, config, None, 3, 0) and len(some) == 3
    assert len(choose_rows(write_rows(tmp_path / "plain", {}, {}), config, None, None, 0)) == 2
    with pytest.raises(DataError, match='no row has the split "dev"'):
        choose_rows(split, config, "dev", None, 0)
    assert choose_weights([], config) == ("auto",) and choose_weights(["int8,auto", "int4"], config) == (
        "int8",
        "auto",
        "int4",
    )
    with pytest.raises(InputError, match=r"--weight-dtype 'int2' is not known: choose among auto, .*int8, int4"):
        choose_weights(["int2"], config)


def test_without_a_file_the_rows_are_those_that_the_runs_quality_is_measured_on(stored: Path, tmp_path: Path) -> None:
    config = read_run(stored)
    with pytest.raises(InputError, match=r"no data of its own \(data.path\): name a file of rows with --data"):
        choose_rows(None, config, None, None, 0)
    rows = [{"prompt": f"ask {i}", "split": "test" if i % 2 else "train"} for i in range(40)]
    data = {"path": write_rows(tmp_path / "own", *rows), "heldout_rows": 8}
    tree = {"model": {"path": config.model.path}, "data": data, "quality": {"exact_match_rows": 3}}
    own = config_from_tree(tree)
    measured = probe_rows(read_data(own), own)
    assert choose_rows(None, own, None, None, 0) == sorted(measured, key=lambda row: row.id) and len(measured) == 3
    unasked = config_from_tree({**tree, "quality": {}})
    report = heldout_parts(read_data(unasked), unasked).report
    assert choose_rows(None, unasked, None, None, 0) == sorted(report, key=lambda row: row.id) and len(report) == 4
    assert len(choose_rows(None, own, "train", None, 0)) == 20


def test_the_base_is_judged_with_weights_of_each_type_on_the_same_rows(stored: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d", *({"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(3)))
    command = ["eval", str(stored), "--data", str(data), "--max-tokens", "8", "--metrics", "loss,exact_match"]
    said = RUNNER.invoke(app, [*command, "--weight-dtype", "auto,int8,int4", "--json", str(tmp_path / "all.json")])
    assert said.exit_code == 0, (said.output, said.exception)
    lines = json.loads((tmp_path / "all.json").read_text())["versions"]
    kinds = [(line["version"], line["weights"]) for line in lines]
    assert kinds == [(version, kind) for version in (0, 2) for kind in ("float32", "int8", "int4")]
    dense, eight, four = (line["scores"]["loss"]["value"] for line in lines[3:])
    assert dense != eight and 0 < abs(eight - dense) < abs(four - dense), "each type was taken"
    assert RUNNER.invoke(app, command).exit_code == 0
    alone = json.loads((stored / "eval.json").read_text())["versions"]
    assert alone == [lines[0], lines[3]], "the model that was loaded once is whole for each type"


def test_weights_as_their_file_has_them_are_loaded_by_themselves(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def load(config: Any) -> Any:
        asked.append(config.model.weight_dtype)
        return loading.load_model(config.model.model_copy(update={"weight_dtype": "auto"}), torch.device("cpu"))

    monkeypatch.setattr(llm, "_load", load)
    pairs = list(llm.load_for(read_run(stored), ["auto", "file", "int8", "int4"]))
    assert asked == ["auto", "file"] and len({id(loaded.model) for _, loaded in pairs}) == 4
    assert [config.model.weight_dtype for config, _ in pairs] == ["auto", "file", "int8", "int4"]


def test_a_row_that_does_not_fit_is_left_out_and_told(stored: Path, tmp_path: Path) -> None:
    long = {"prompt": "word " * 60, "completion": "yes"}
    data = write_rows(tmp_path / "d", {}, long, {"completion": "word " * 60}, {"prompt": "ask me"})
    command = ["eval", str(stored), "--data", str(data), "--max-tokens", "8", "--metrics", "loss,exact_match"]
    said = RUNNER.invoke(app, command)
    assert said.exit_code == 0, (said.output, said.exception)
    assert "rows left out: 2; row 1 (from 0): its prompt of " in said.output
    result = json.loads((stored / "eval.json").read_text())
    assert result["rows"] == 2 and len(result["left_out"]) == 2
    assert all(line["scores"]["exact_match"]["count"] == 2 for line in result["versions"])
    said = RUNNER.invoke(app, [*command[:2], "--data", str(write_rows(tmp_path / "e", long)), *command[4:]])
    assert "none of the 1 rows can be scored; row 0 (from 0): its prompt of" in str(said.exception)


@pytest.mark.parametrize(("name", "why"), [("no/such.json", "is no folder: make it"), ("", "is a folder: name a file")])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(stored: Path, tmp_path: Path, name: str, why: str):
    for command in (["eval", str(stored)], ["loadtest", "http://127.0.0.1:9"]):
        said = RUNNER.invoke(app, [*command, "--json", str(tmp_path / name)])
        assert isinstance(said.exception, InputError) and why in str(said.exception)


def test_a_server_answers_by_the_names_of_its_versions(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows", {"prompt": "ask now"}, {"prompt": "ask"})
    with HttpRun(http_config(tmp_path)) as run:
        command = ["eval", str(run.config.run_dir), "--data", str(data), "--url", run.url, "--max-tokens", "8"]
        said = RUNNER.invoke(app, [*command, "--metrics", "exact_match,loss"])
        assert said.exit_code == 0, (said.output, said.exception)
        result = json.loads((run.config.run_dir / "eval.json").read_text())
        (base,) = result["versions"]
        # The emulated replica is certain of every token of a prompt.
        assert base["scores"]["exact_match"]["count"] == 2 and base["scores"]["loss"]["value"] == 0.0
