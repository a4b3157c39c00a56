"""vLLM on a CPU: `LLM.generate` in one process, with what its installation guide for CPUs recommends.

torch.compile stays on, the threads are bound by vLLM itself, and prefix caching is off, since no prompt comes again.
"""

from __future__ import annotations

import os
from typing import Any

from protocol import Work, answer_turns, first_tokens, versions


def prepare(job: dict[str, Any]) -> Any:
    cores = job["cores"]
    os.environ.pop("GOMP_CPU_AFFINITY", None)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ |= job.get("environment", {})
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

    said = ", ".join(f"{k}={v}" for k, v in settings.items())
    return f"{versions('vllm-cpu', 'torch')}; LLM({said}), torch.compile on, VLLM_CPU_OMP_THREADS_BIND", turn


if __name__ == "__main__":
    answer_turns(prepare)
