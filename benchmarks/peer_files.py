"""The files that peers read, made once: the same weights and the same adapters for all, each in its own format.

A GGUF file is the source. It may be quantised; all contenders get its weights rounded to bfloat16.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clif.config import config_from_tree
from clif.models.weights.loading import load_model

RANK, ALPHA = 8, 16
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class PeerFiles:
    """model: Hugging Face folder in bfloat16. gguf_bf16, gguf_f16: for llama.cpp and OpenVINO. ir: OpenVINO's own
    format, which this environment cannot write; "" if it has not been exported (peers/README.md).

    adapters: PEFT folders, float32, r=8 on all linear layers; their GGUF files are beside the weights, `lora.gguf`.
    """

    model: str
    gguf_bf16: str
    gguf_f16: str
    adapters: tuple[str, ...]
    ir: str = ""


def make_files(source: Path, folder: Path, adapters: int) -> PeerFiles:
    """Everything that peers need of a GGUF file; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    model, half, brain = (folder / f"{stem}{end}" for end in ("-bf16", "-f16.gguf", "-bf16.gguf"))
    _once(model, lambda path: _write_model(source, path))
    _once(half, lambda path: _write_gguf(source, path, "F16"))
    _once(brain, lambda path: _write_gguf(source, path, "BF16"))
    loras = [folder / f"{stem}-lora{i}" for i in range(adapters)]
    for i, path in enumerate(loras):
        _once(path, lambda part, seed=i: _write_adapter(model, part, seed))
    exported = folder / f"{stem}-openvino"
    ir = str(exported) if exported.is_dir() else ""
    return PeerFiles(str(model), str(brain), str(half), tuple(map(str, loras)), ir)


def _once(path: Path, write: Any) -> None:
    """Write it under another name first: an interrupted run leaves no half of it."""
    if not path.exists():
        part = path.with_name(f"part-{path.name}")
        shutil.rmtree(part, ignore_errors=True)
        write(part)
        part.rename(path)


def _write_model(source: Path, folder: Path) -> None:
    import transformers

    loaded = load_model(_bf16(str(source)), torch.device("cpu")).model
    fresh = transformers.AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def _bf16(path: str) -> Any:
    model = {"path": path, "dtype": "bfloat16", "device": "cpu"}
    return config_from_tree({"model": model, "train": {"enabled": False}}).model


def _write_gguf(source: Path, path: Path, dtype: str) -> None:
    """The same fields and tensors; matrices in another type, rounded to bfloat16 first; vectors in float32."""
    import gguf

    reader, kind = gguf.GGUFReader(source), gguf.GGMLQuantizationType[dtype]
    fields = {f.name: f for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture").contents())
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{dtype}"])
    fields.pop("general.file_type", None)
    for field in fields.values():
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        data = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if len(tensor.shape) > 1:
            rounded = torch.from_numpy(data.copy()).bfloat16().float().numpy()
            writer.add_tensor(tensor.name, gguf.quantize(rounded, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, data)
    _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_adapter(model: Path, folder: Path, seed: int) -> None:
    """A PEFT folder with random factors, B not zero, and the same adapter for llama.cpp."""
    import peft
    import transformers

    torch.manual_seed(seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(base, config)
    # As after some training: it changes the answers and does not drown them.
    for name, weight in wrapped.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(std=0.05)
    wrapped.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    state = peft.get_peft_model_state_dict(wrapped)
    _write_lora_gguf(state, base.config, folder / "lora.gguf")


def _write_lora_gguf(state: dict[str, torch.Tensor], config: Any, path: Path) -> None:
    """llama.cpp's format of an adapter. It orders the rotary halves of queries and keys in pairs."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ALPHA))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, factor in state.items():
        number, rest = name.split(".layers.")[1].split(".", 1)
        module, kind = rest.removesuffix(".weight").rsplit(".lora_", 1)
        data, stem = factor.float(), GGUF_NAMES[module]
        if kind == "B" and stem in heads:
            data = data.view(heads[stem], 2, -1, data.shape[1]).transpose(1, 2).reshape(data.shape)
        writer.add_tensor(f"blk.{number}.{stem}.weight.lora_{kind.lower()}", data.contiguous().numpy())
    _finish(writer)
