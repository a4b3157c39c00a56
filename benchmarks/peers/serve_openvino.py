"""OpenVINO GenAI's ContinuousBatchingPipeline on a GGUF file in float16, which it computes in bfloat16.

Latency mode of one stream with all cores, pinned, as its guide for CPUs recommends. An adapter, which needs an exported
model, is applied at run time: the default, with which requests may choose; fused into the weights it would be another
model.
"""

from __future__ import annotations

from typing import Any

from protocol import Work, answer_turns, first_tokens, versions


def prepare(job: dict[str, Any]) -> Any:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 2048, job["requests"]
    scheduler.cache_size, scheduler.enable_prefix_caching, scheduler.dynamic_split_fuse = 1, False, True
    properties: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": len(job["cores"]),
        "ENABLE_CPU_PINNING": True,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16",
        "KV_CACHE_PRECISION": "bf16",
        **job.get("options", {}),
    }
    adapters = [genai.Adapter(f"{folder}/adapter_model.safetensors") for folder in job["adapters"]]
    if adapters:
        properties["adapters"] = genai.AdapterConfig([(adapter, 2.0) for adapter in adapters])
        if not job["ir"]:
            raise ValueError("an adapter needs the exported model, see benchmarks/peers/README.md")
    path = job["ir"] if adapters else job["gguf_f16"]
    pipe = genai.ContinuousBatchingPipeline(path, scheduler, "CPU", properties)

    def turn(asked: dict[str, Any]) -> Work:
        prompts = [ov.Tensor(np.array([ids], dtype=np.int64)) for ids in asked["prompts"]]
        configs = []
        for i in asked["adapters"]:
            config = genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = job["answer"], True, False
            if adapters:
                config.adapters = genai.AdapterConfig(adapters[i], 2.0) if i >= 0 else genai.AdapterConfig()
            configs.append(config)

        def run() -> list[int]:
            results = pipe.generate(prompts, configs)
            return first_tokens([list(r.m_generation_ids[0]) for r in results], job["answer"])

        return run

    said = ", ".join(f"{k}={v}" for k, v in properties.items() if k != "adapters")
    kind = "exported model" if adapters else "GGUF in float16"
    return f"{versions('openvino-genai', 'openvino')}; {kind}; {said}", turn


if __name__ == "__main__":
    answer_turns(prepare)
