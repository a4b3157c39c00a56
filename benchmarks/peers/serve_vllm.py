"""vLLM on a CPU: `LLM.generate`, with what its installation guide for CPUs recommends.

torch's OpenMP and tcmalloc, where there is one, are loaded before all else; torch.compile stays on, the threads are
bound by vLLM itself, and prefix caching is off, since no prompt comes again. The engine is in the driver's process, so
that it and the worker do not wait for each other on the same cores; job.environment may say otherwise.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from protocol import Work, answer_turns, first_tokens, versions


def prepare(job: dict[str, Any]) -> Any:
    cores = job["cores"]
    os.environ.pop("GOMP_CPU_AFFINITY", None)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.update(job.get("environment", {}))
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = [LoRARequest(f"lora{i}", i + 1, path) for i, path in enumerate(job["adapters"])]
    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": 8} if adapters else {}
    settings = {
        "dtype": "bfloat16",
        "max_num_seqs": job["requests"],
        "max_model_len": 256,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
        **lora,
        **job.get("options", {}),
    }
    llm = LLM(job["model"], **settings)
    sampling = SamplingParams(temperature=0, max_tokens=job["answer"], ignore_eos=True, detokenize=False)

    def turn(asked: dict[str, Any]) -> Work:
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        chosen = [adapters[i] if i >= 0 else None for i in asked["adapters"]] if adapters else None

        def run() -> list[int]:
            outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=chosen)
            return first_tokens([list(o.outputs[0].token_ids) for o in outputs], job["answer"])

        return run

    loaded = ", ".join(Path(path).name for path in os.environ["LD_PRELOAD"].split(":"))
    said = ", ".join([*(f"{k}={v}" for k, v in settings.items()), *job.get("environment", {})])
    return f"{versions('vllm-cpu', 'torch')}; LLM({said}), torch.compile {'off' if adapters else 'on'}; {loaded}", turn


def preload() -> None:
    """Start again with torch's own OpenMP, and tcmalloc, loaded first: LD_PRELOAD counts only for a new process."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    openmp = sorted([*torch.glob("lib/libgomp*.so*"), *torch.parent.glob("torch.libs/libgomp*.so*")])
    allocator = sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.*"))
    os.environ["LD_PRELOAD"] = ":".join(str(path) for path in (*allocator[:1], *openmp[:1]))
    os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    if "LD_PRELOAD" not in os.environ:
        preload()
    answer_turns(prepare)
