"""`clif eval`: stored versions of a run answer a file, here or on a server, and are scored."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import finish, make_rig, random_state
from http_run import HttpRun, http_config
from typer.testing import CliRunner

from clif.adapters.peft_io import config_json, write_weights
from clif.adapters.store import AdapterStore
from clif.cli import app
from clif.clients.evaluate import choose_metrics, choose_rows, choose_versions, read_run, with_test_command
from clif.config import config_from_tree
from clif.data.instruct import DataError, encode_samples, read_rows
from clif.errors import InputError
from clif.llm import LLM
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
    split = write_rows(tmp_path / "split", *({"split": "test" if i % 2 else "train"} for i in range(10)))
    assert [row.id for row in choose_rows(split, None, None, 0)] == [1, 3, 5, 7, 9]
    assert [row.id for row in choose_rows(split, "train", None, 0)] == [0, 2, 4, 6, 8]
    some = choose_rows(split, None, 3, 0)
    assert some == choose_rows(split, None, 3, 0) and len(some) == 3
    assert len(choose_rows(write_rows(tmp_path / "plain", {}, {}), None, None, 0)) == 2
    with pytest.raises(DataError, match='no row has the split "dev"'):
        choose_rows(split, "dev", None, 0)


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
