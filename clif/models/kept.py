"""The base model as a folder of the run, so that a restart need not read a GGUF file again.

transformers reads a GGUF file three times and in Python, and each rank does so: on few cores that is most of a restart.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
import transformers

from clif.models.loading import LoadedModel
from clif.text import ChatTokenizer

FOLDER = "base"
REASON = "as before the restart"


def worth_keeping(path: str) -> bool:
    """Whether a model (model.path) is slow to load."""
    return path.endswith(".gguf")


def keep(loaded: LoadedModel, run_dir: Path) -> None:
    """Write the model to RUN/base, as a whole or not at all. Raises OSError or safetensors.SafetensorError."""
    part = run_dir / f"{FOLDER}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    described = loaded.model.config.to_dict()
    # It says how the GGUF file was packed; these weights are plain.
    described.pop("quantization_config", None)
    (part / "config.json").write_text(json.dumps(described, default=str))
    safetensors.torch.save_model(loaded.model, str(part / "model.safetensors"), metadata={"format": "pt"})
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    os.replace(part, run_dir / FOLDER)


def load_kept(run_dir: Path, device: torch.device) -> LoadedModel | None:
    """The model that keep() wrote, with the tokenizer of the run; None if it is not there."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return None
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype="auto", attn_implementation="sdpa", local_files_only=True
    )
    model.eval().requires_grad_(False).to(device)
    return LoadedModel(model, ChatTokenizer.load(run_dir / "tokenizer"), device, model.dtype, REASON)


def drop(run_dir: Path) -> None:
    """The run is through: nothing will be restarted."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
