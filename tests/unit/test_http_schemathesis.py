"""The server answers as its own OpenAPI document says, whatever is sent: cases are made by schemathesis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from http_run import HttpRun, http_run
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
LONGEST_S = 20
ENDLESS = "/admin/live"
"""Its answer has no end."""
ROWS = b'{"prompt": "a", "completion": "b"}\n' * 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    sections: dict[str, dict[str, Any]] = {
        "run": {"drain_s": 0.5},
        "train": {"enabled": True, "lr": 0.01},
        "federation": {"rounds": None, "local_steps": 1, "min_members": 1},
        "jobs": {"allow_feedback": True, "max_files": 20, "max_jobs": 5},
        "serve": {"http": {"port": 0, "timeout_s": 3.0, "default_max_tokens": 8, "max_tokens": 64}},
    }
    with http_run(tmp_path_factory.mktemp("schemathesis"), **sections) as run:
        yield run


def post(run: HttpRun, path: str, **options: Any) -> Any:
    return httpx.post(f"{run.url}{path}", timeout=LONGEST_S, **options).json()


def things(run: HttpRun) -> dict[str, str]:
    """A file and a job that are there, by the names of parameters."""
    file = post(run, "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", ROWS)})["id"]
    body = {"model": "clif", "training_file": file, "hyperparameters": {"n_epochs": 1000}}
    job = post(run, "/v1/fine_tuning/jobs", json=body)["id"]
    return {"file_id": file, "job_id": job, "model": "base"}


def aim(case: Any, known: dict[str, str], number: int) -> None:
    """Every other case is about things that are there."""
    if number % 2:
        for name in (case.path_parameters or {}).keys() & known.keys():
            case.path_parameters[name] = known[name]
        if isinstance(case.body, dict):
            case.body.update({name: value for name, value in (("model", "base"),) if name in case.body})
            case.body.update({"training_file": known["file_id"]} if "training_file" in case.body else {})


def attack(run: HttpRun, operation: Any, known: dict[str, str], examples: int) -> list[int]:
    """Statuses of the answers. Raises what schemathesis objects to."""
    found: list[int] = []

    @seed(0)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(case=operation.as_strategy())
    def one(case: Any) -> None:
        aim(case, known, len(found))
        response = case.call(timeout=LONGEST_S)
        found.append(response.status_code)
        case.validate_response(response, checks=CHECKS)

    one()
    return found


def operations(run: HttpRun) -> Iterator[Any]:
    schema = schemathesis.openapi.from_url(f"{run.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path != ENDLESS:
            yield operation


def attack_all(run: HttpRun, examples: int) -> Counter[int]:
    known, found = things(run), Counter[int]()
    for operation in operations(run):
        found.update(attack(run, operation, known, examples))
        # What an operator did to the run is taken back, so that the others find it at work.
        for path in ("/admin/replicas/0/undrain", "/admin/training/resume"):
            post(run, path)
    return found


def test_every_answer_is_one_that_the_servers_own_document_names(run: HttpRun):
    found = attack_all(run, 2)
    assert sum(found.values()) >= 60 and found[200] >= 10
    assert run.get("/ready").status_code == 200 and not run.dispatcher.outstanding


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thousands_of_cases_are_answered_as_the_document_says(run: HttpRun):
    """Slow: 2,000 requests and more."""
    found = attack_all(run, 60)
    assert sum(found.values()) >= 2000 and not found[500]
    assert run.get("/ready").status_code == 200
