"""Files and training jobs, as the openai client sees them, and who sees what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from http_run import HttpRun, eventually, http_run

from clif.data import uploads
from clif.data.uploads import UploadedRows, WrongRows
from clif.errors import InputError
from clif.jobs.samples import pieces, samples_path, sweep_files, write_samples
from clif.models.bytes_tokenizer import byte_tokenizer
from clif.storage.api_keys import ApiKey, hash_of, line_of, new_key

ME, YOU, BOSS, NARROW = new_key(), new_key(), new_key(), new_key()
"""The last one may use the model `mine` alone."""
ROLES = {ME: ("me", "user"), YOU: ("you", "user"), BOSS: ("boss", "admin")}


def chat(question: str, answer: str = "yes") -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


ROWS = "".join(chat(f"question {number}") + "\n" for number in range(30)).encode()


def read(tmp_path: Path, content: bytes, max_tokens: int = 64, max_rows: int = 100) -> UploadedRows:
    """Raises what reading the rows raises."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    rows = UploadedRows(path, byte_tokenizer(512), max_tokens, max_rows)
    write_samples(tmp_path / "rows.samples", rows.samples())
    return rows


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_of_every_accepted_kind_become_samples(tmp_path):
    kinds = [
        chat("a"),
        "",
        json.dumps({"prompt": "a", "completion": "b"}),
        json.dumps({"instruction": "a", "input": "b", "output": "c"}),
    ]
    rows = read(tmp_path, b"\xef\xbb\xbf" + "\r\n".join(kinds).encode())
    found = [sample for piece in pieces(tmp_path / "rows.samples") for sample in piece]
    assert rows.rows == len(found) == 3 and rows.tokens == sum(len(sample.ids) for sample in found)
    assert rows.longest == max(len(sample.ids) for sample in found)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (b"nonsense", "line 2: not valid JSON"),
        (b"[1]", "line 2: a list instead of an object"),
        (b'{"prompt": "a", "completion": "\xff"}', r"line 2: not UTF-8 text \(byte 32\)"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', 'line 2: the key "prompt" stands twice'),
        (b'{"prompt": "a", "completion": "\\ud800"}', "line 2: .*half of a character"),
        (b'{"prompt": "a"}', r"line 2: unknown kind of row \(keys found: prompt\)"),
        (b'{"prompt": "a", "completion": " "}', "line 2: row without an answer"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "line 2: row without an answer"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "line 2: row without a prompt"),
        (b'{"messages": [{"role": "user", "content": null}]}', 'line 2: "content" must be text'),
        (b'{"prompt": "a", "completion": "' + b"b" * 80 + b'"}', "line 2: 83 tokens exceed 64"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_line(tmp_path, row, sentence):
    with pytest.raises(WrongRows, match=sentence) as caught:
        read(tmp_path, chat("a").encode() + b"\n" + row + b"\n" + chat("b").encode())
    assert len(caught.value.errors) == 1
    assert not (tmp_path / "rows.samples").exists()


def test_so_many_mistakes_are_listed_and_no_more(tmp_path):
    with pytest.raises(WrongRows, match="only the first 20 mistakes are listed") as caught:
        read(tmp_path, b"nonsense\n" * 50)
    assert len(caught.value.errors) == 20 and caught.value.errors[-1].startswith("line 20: ")


def test_a_file_without_rows_with_too_many_or_with_an_endless_line_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="holds no rows"):
        read(tmp_path, b"\n\n")
    with pytest.raises(InputError, match=r"more than 100 rows \(jobs\.max_rows\)"):
        read(tmp_path, (chat("a").encode() + b"\n") * 101)
    monkeypatch.setattr(uploads, "LONGEST_LINE", 1000)
    with pytest.raises(InputError, match="line 1: longer than"):
        read(tmp_path, b"x" * 5000)


def test_what_no_file_claims_is_removed(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("file-1.jsonl", "file-1.samples", "file-2.jsonl", ".file-1.samples.tmp"):
        (folder / name).write_text("")
    sweep_files(tmp_path, {"file-1"})
    assert sorted(path.name for path in folder.iterdir()) == ["file-1.jsonl", "file-1.samples"]


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    keys = folder / "keys.jsonl"
    made = [ApiKey(name=name, sha256=hash_of(key), role=role) for key, (name, role) in ROLES.items()]
    made.append(ApiKey(name="narrow", sha256=hash_of(NARROW), models=("mine",)))
    keys.write_text("\n".join(map(line_of, made)))
    keys.chmod(0o600)
    sections: dict[str, dict[str, Any]] = {
        "train": {"enabled": True, "lr": 0.01},
        "federation": {"rounds": None, "local_steps": 2, "min_members": 1},
        "data": {"path": None},
        "run": {"drain_s": 0.5},
        "jobs": {"max_files": 4, "max_rows": 50, "own_weight": 0.001},
        "serve": {"http": {"port": 0, "keys_file": str(keys), "max_file_mib": 1}},
    }
    with http_run(folder, **sections) as run:
        yield run


def client(run: HttpRun, key: str = ME) -> openai.OpenAI:
    return run.client().with_options(api_key=key)


def call(run: HttpRun, method: str, path: str, key: str = ME, **options: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.request(method, f"{run.url}{path}", headers=headers, timeout=20, **options)


def upload(run: HttpRun, content: bytes = ROWS, key: str = ME, name: str = "rows.jsonl") -> str:
    return client(run, key).files.create(file=(name, content), purpose="fine-tune").id


@pytest.fixture
def file(run: HttpRun):
    """A file of ME."""
    id = upload(run)
    yield id
    call(run, "DELETE", f"/v1/files/{id}", BOSS)


def refused(make: Callable[[], Any], kind: type[openai.APIStatusError] = openai.BadRequestError) -> Any:
    with pytest.raises(kind) as caught:
        make()
    return caught.value.body


def test_a_file_is_uploaded_listed_read_and_deleted(run: HttpRun):
    files = client(run).files
    made = files.create(file=("a/b\\rows.jsonl", ROWS), purpose="fine-tune")
    assert (made.filename, made.bytes, made.status, made.purpose) == ("rows.jsonl", len(ROWS), "processed", "fine-tune")
    assert files.retrieve(made.id) == made and [f.id for f in files.list()] == [made.id]
    assert files.content(made.id).read() == ROWS
    folder = run.config.run_dir / "files"
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert sum(len(piece) for piece in pieces(samples_path(run.config.run_dir, made.id))) == 30
    assert files.delete(made.id).deleted
    assert not [*folder.iterdir()]
    assert refused(lambda: files.retrieve(made.id), openai.NotFoundError)["message"] == f"there is no file {made.id}"


def test_a_wrong_upload_is_refused_with_its_reason_and_leaves_nothing(run: HttpRun):
    error = refused(lambda: upload(run, b'{"prompt": "a", "completion": "b"}\nnonsense\n'))
    assert "line 2: not valid JSON" in error["message"] and (error["param"], error["code"]) == ("file", "invalid_file")
    error = refused(lambda: client(run).files.create(file=("a", ROWS), purpose="batch"))
    assert error["param"] == "purpose"
    extra = refused(lambda: client(run).files.create(file=("a", ROWS), purpose="fine-tune", extra_body={"foo": 1}))
    assert extra["message"] == "unknown parameter: foo"
    for body in ({"data": {"purpose": "fine-tune"}}, {"json": {}}, {"files": {"file": ("a", b"")}}):
        assert call(run, "POST", "/v1/files", **body).status_code == 400
    assert not [*(run.config.run_dir / "files").iterdir()]


def test_a_file_that_is_too_long_is_refused_while_it_comes(run: HttpRun):
    refused_at = call(run, "POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", b"x" * 2**21)})
    assert refused_at.status_code == 413 and "exceeds 1.0625 MiB" in refused_at.json()["error"]["message"]


def test_no_more_files_are_kept_than_may(run: HttpRun):
    files = [upload(run, name=f"{number}.jsonl") for number in range(4)]
    error = refused(lambda: upload(run), openai.RateLimitError)
    assert "4 files are kept, as many as jobs.max_files allows" in error["message"]
    kept = {path.name.partition(".")[0] for path in (run.config.run_dir / "files").iterdir()}
    assert kept == set(files), "nothing lies there of the file that was refused"
    page = client(run).files.list(limit=3)
    assert [f.id for f in page.data] == files[:0:-1] and page.has_more
    assert [f.id for f in page] == files[::-1], "the client asks for the next part by itself"
    for id in files:
        client(run).files.delete(id)


def test_each_key_sees_what_it_has_created_and_an_admin_everything(run: HttpRun, file: str):
    yours = upload(run, key=YOU)
    assert [f.id for f in client(run).files.list()] == [file] and [f.id for f in client(run, YOU).files.list()] == [
        yours
    ]
    assert {f.id for f in client(run, BOSS).files.list()} == {file, yours}
    for attempt in (client(run).files.retrieve, client(run).files.delete, client(run).files.content):
        refused(lambda attempt=attempt: attempt(yours), openai.NotFoundError)
    jobs = client(run).fine_tuning.jobs
    error = refused(lambda: jobs.create(model="clif", training_file=yours))
    assert error["param"] == "training_file" and f"there is no file {yours}" in error["message"]
    client(run, BOSS).files.delete(yours)


def test_a_job_trains_an_adapter_of_its_own_that_answers_by_its_name(run: HttpRun, file: str):
    jobs = client(run).fine_tuning.jobs
    made = jobs.create(
        model="base", training_file=file, suffix="support", seed=7, metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "max_rounds": 2}}},
    )  # fmt: skip
    assert made.object == "fine_tuning.job" and made.status == "validating_files" and made.organization_id == "me"
    assert made.hyperparameters.n_epochs == 2 and made.metadata == {"team": "a"} and made.seed == 7
    eventually(lambda: jobs.retrieve(made.id).status == "succeeded")
    done = jobs.retrieve(made.id)
    assert done.fine_tuned_model.startswith("support@v") and done.trained_tokens > 0 and done.finished_at
    events = list(jobs.list_events(made.id, limit=4))
    assert len(events) > 4 and events[-1].message.startswith("the job is created")
    assert {event.type for event in events} == {"message", "metrics"}
    checkpoints = list(jobs.checkpoints.list(made.id, limit=1))
    assert checkpoints[0].fine_tuned_model_checkpoint == done.fine_tuned_model and len(checkpoints) > 1
    assert checkpoints[0].step_number > checkpoints[1].step_number > 0 and checkpoints[0].metrics.valid_loss > 0
    answer = client(run).chat.completions.create(model="support", messages=[{"role": "user", "content": "a"}])
    assert answer.model == done.fine_tuned_model
    assert [job.id for job in jobs.list()] == [made.id] and not client(run, YOU).fine_tuning.jobs.list().data
    error = refused(lambda: jobs.create(model="base", training_file=file, suffix="support"))
    assert "the adapter support is there already: name the model support" in error["message"]


def test_a_job_is_paused_resumed_and_cancelled(run: HttpRun, file: str):
    jobs = client(run).fine_tuning.jobs
    made = jobs.create(model="clif", training_file=file, hyperparameters={"n_epochs": 1000})
    eventually(lambda: jobs.retrieve(made.id).status == "running")
    assert jobs.pause(made.id).status == "paused"
    assert jobs.resume(made.id).status == "queued"
    error = refused(lambda: client(run).files.delete(file), openai.ConflictError)
    assert f"the job {made.id} needs the file" in error["message"]
    refused(lambda: client(run, YOU).fine_tuning.jobs.cancel(made.id), openai.NotFoundError)
    assert jobs.cancel(made.id).status == "cancelled"
    assert "cannot become" in refused(lambda: jobs.resume(made.id), openai.ConflictError)["message"]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"model": "gpt-4o"}, "model", "without a suffix a job goes on from clif"),
        ({"model": "clif", "suffix": "new"}, "model", "a new adapter begins from base"),
        ({"suffix": "Not A Name", "model": "base"}, "suffix", "should match pattern"),
        ({"suffix": "base", "model": "base"}, None, "cannot name an adapter"),
        ({"training_file": "file-0"}, "training_file", "there is no file file-0"),
        ({"validation_file": "file-0"}, "validation_file", "there is no file file-0"),
        ({"integrations": []}, "integrations", "integrations is not offered: nothing is sent elsewhere"),
        ({"foo": 1}, "foo", "unknown parameter: foo"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "n_epochs"),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta", "unknown parameter"),
        ({"method": {"type": "dpo"}}, "method.type", "supervised"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "supervised training is what there is"),
    ],
)
def test_a_job_that_cannot_be_is_refused_by_the_name_of_what_is_wrong(run: HttpRun, file: str, body, param, said):
    answer = call(run, "POST", "/v1/fine_tuning/jobs", json={"model": "clif", "training_file": file, **body})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and said in error["message"]


def test_only_an_admin_takes_rounds_from_other_jobs(run: HttpRun, file: str):
    body = {"model": "clif", "training_file": file, "priority": 9}
    assert call(run, "POST", "/v1/fine_tuning/jobs", json=body).status_code == 403
    made = call(run, "POST", "/v1/fine_tuning/jobs", BOSS, json=body)
    assert made.status_code == 200 and made.json()["priority"] == 9
    assert client(run, BOSS).fine_tuning.jobs.cancel(made.json()["id"]).status == "cancelled"


def test_a_key_of_some_models_trains_no_other(run: HttpRun):
    id = upload(run, key=NARROW)
    jobs = client(run, NARROW).fine_tuning.jobs
    for asked in ({"model": "clif"}, {"model": "base", "suffix": "other"}):
        error = refused(lambda asked=asked: jobs.create(training_file=id, **asked), openai.PermissionDeniedError)
        assert error["code"] == "model_not_allowed"
    asked = {"training_file": id, "model": "base", "suffix": "mine"}
    # There may be no slot for one more adapter.
    assert call(run, "POST", "/v1/fine_tuning/jobs", NARROW, json=asked).status_code in (200, 409)


def test_unknown_ids_and_parameters_are_refused(run: HttpRun):
    for path in ("jobs/x", "jobs/x/events", "jobs/x/checkpoints", "jobs?after=x"):
        assert call(run, "GET", f"/v1/fine_tuning/{path}").status_code == 404
    for path in ("jobs?foo=1", "jobs?limit=0", "jobs?limit=many", "jobs/x/checkpoints?after=x"):
        assert call(run, "GET", f"/v1/fine_tuning/{path}").status_code in (400, 404)
    for path in ("/v1/files?purpose=batch", "/v1/files?order=asc", "/v1/files?limit=0"):
        assert call(run, "GET", path).status_code == 400
    for path in ("/v1/files/..%2Fconfig.json", "/v1/files/%2e%2e/content", "/v1/files/config/content"):
        assert call(run, "GET", path).status_code == 404


def test_a_run_that_does_not_train_takes_no_files_and_no_jobs(tmp_path):
    with http_run(tmp_path) as run:
        error = refused(lambda: upload(run, key="none"), openai.ConflictError)
        assert "this run does not train" in error["message"]
        body = {"model": "clif", "training_file": "file-0"}
        assert run.post("/v1/fine_tuning/jobs", body).status_code == 409
