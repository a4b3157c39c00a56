"""The contenders of benchmarks/engine.py: CLIF, transformers and PEFT at the same work, each in its best known form."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from turns import Ready

from clif.config import Config, config_from_tree
from clif.engine.engine import Engine
from clif.engine.jobs import Job
from clif.models.weights.loading import load_model
from clif.training.train_runner import TrainRunner
from clif.training.trainer import ShadowTrainer
from clif.types import Request, Sampling, TrainSample

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """A repeat of serving: requests at once of so many tokens; one of training: steps of so many samples."""

    model: str
    dtype: str
    requests: int = 32
    prompt: int = 48
    answer: int = 64
    steps: int = 3
    samples: int = 4
    length: int = 128
    targets: int = 64

    @property
    def kv_tokens(self) -> int:
        """Room for all requests at their longest, and as much again."""
        return 256 * max(1, -(-2 * self.requests * (self.prompt + self.answer) // 256))

    def config(self) -> Config:
        config = config_from_tree(
            {
                "model": {"path": self.model, "dtype": self.dtype, "device": "cpu", "max_context": 256},
                "engine": {"max_batch": self.requests, "kv_tokens": self.kv_tokens, "max_prefill_tokens": 2048},
                "train": {"enabled": False},
            }
        )
        # Without warm-up, as in PEFT's loop.
        return config.model_copy(update={"train": config.train.model_copy(update={"enabled": True, "warmup_steps": 0})})

    def prompts(self, repeat: int, vocab: int) -> list[list[int]]:
        """Token ids that no other repeat has, the same for all contenders. Special tokens, at the start, are left out.

        So no contender can reuse earlier results: prefix caches would serve a repeat from the previous one's prompts.
        """
        rng = random.Random(f"prompts of repeat {repeat}")
        return [rng.choices(range(100, vocab), k=self.prompt) for _ in range(self.requests)]

    def training(self, repeat: int, vocab: int) -> list[list[TrainSample]]:
        """Samples of a repeat, by step; they are new in each, and the same for all contenders."""
        rng = random.Random(f"samples of repeat {repeat}")
        start = self.length - self.targets
        return [
            [
                TrainSample(id=i, ids=tuple(rng.choices(range(100, vocab), k=self.length)), target_start=start)
                for i in range(self.samples)
            ]
            for _ in range(self.steps)
        ]


def clif_serving(work: Work) -> Ready:
    """Results of serving: the first token of each answer."""
    config = work.config()
    engine = Engine.from_config(config)
    runner, scheduler = engine.runner, engine.scheduler

    def turn(repeat: int) -> Any:
        sampling = Sampling(max_tokens=work.answer, ignore_eos=True)
        prompts = work.prompts(repeat, runner.stack.vocab_size)
        requests = [Request(id=i, prompt=tuple(ids), sampling=sampling) for i, ids in enumerate(prompts)]

        def run() -> list[int]:
            first: dict[int, int] = {}
            for request in requests:
                scheduler.add(request, 0.0)
            while engine.serving:
                for event in engine.serve():
                    first.setdefault(event.request_id, event.tokens[0])
            assert scheduler.reused_tokens == 0, "CLIF left out prompt tokens that the others compute"
            return [first[request.id] for request in requests]

        return run

    reuse = "on, and without anything to reuse" if config.engine.prefix_reuse else "off"
    return Ready(f"{_cache(work)}, 2048 tokens to prefill in a step; prefix reuse is {reuse}", turn)


def static_batch(work: Work) -> Ready:
    """transformers.generate on one batch; equal prompt lengths, so that nothing is padded."""
    model = load_model(work.config().model, CPU).model

    def turn(repeat: int) -> Any:
        ids = torch.tensor(work.prompts(repeat, model.config.vocab_size))
        length = {"max_new_tokens": work.answer, "min_new_tokens": work.answer}

        @torch.inference_mode()
        def run() -> list[int]:
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
            assert out.shape == (work.requests, work.prompt + work.answer)
            return out[:, work.prompt].tolist()

        return run

    return Ready("one batch under inference_mode, dynamic cache", turn)


def continuous_batch(work: Work) -> Ready:
    """transformers' own continuous batching, made once and kept. Left alone it sizes its cache by the free memory."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    model = load_model(work.config().model, CPU).model
    settings = transformers.GenerationConfig(
        max_new_tokens=work.answer, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    bounds = transformers.ContinuousBatchingConfig(
        page_size=256,
        num_blocks=max(work.kv_tokens // 256, work.requests),
        max_batch_tokens=2048,
        max_requests_per_batch=work.requests,
    )

    def turn(repeat: int) -> Any:
        prompts = work.prompts(repeat, model.config.vocab_size)

        def run() -> list[int]:
            out = model.generate_batch(prompts, settings, bounds, persistent_manager=True)
            assert sum(len(r.generated_tokens) for r in out.values()) == work.requests * work.answer
            found = {tuple(r.prompt_ids): r.generated_tokens[0] for r in out.values()}
            return [found[tuple(ids)] for ids in prompts]

        return run

    said = ", ".join(f"{name}={getattr(bounds, name)}" for name in ("num_blocks", "page_size", "max_batch_tokens"))
    return Ready(f"{said}, max_requests_per_batch={bounds.max_requests_per_batch}", turn)


def clif_training(work: Work) -> Ready:
    """Results of training: the mean loss of a repeat."""
    config = work.config()
    runner = Engine.from_config(config).runner
    trainer = ShadowTrainer(
        TrainRunner(runner), runner.bank, work.training(0, runner.stack.vocab_size)[0], config.train
    )

    def turn(repeat: int) -> Any:
        batches = work.training(repeat, runner.stack.vocab_size)

        def run() -> float:
            losses: list[float] = []

            def steps() -> Any:
                # An epoch of the trainer is a step.
                for trainer.samples in batches:
                    losses.append((yield from trainer.step(work.samples, 1)).loss)

            job = Job("steps", steps())
            while job.upcoming is not None:
                job.run()
            return sum(losses) / work.steps

        return run

    return Ready(f"r={config.adapter.r}, all linear layers, AdamW, clipping", turn)


def peft_training(work: Work) -> Ready:
    """A plain step: PEFT's adapters in float32 under autocast where the base is not, AdamW, clipping."""
    import peft

    config = work.config()
    model = load_model(config.model, CPU).model
    lora = peft.LoraConfig(r=config.adapter.r, lora_alpha=int(config.adapter.lora_alpha), target_modules="all-linear")
    wrapped = peft.get_peft_model(model, lora)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.train.lr, weight_decay=config.train.weight_decay, fused=True)
    half = model.dtype != torch.float32

    def step(ids: torch.Tensor) -> float:
        labels = ids.clone()
        labels[:, : work.length - work.targets] = -100
        with torch.autocast("cpu", model.dtype, enabled=half):
            loss = wrapped(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def turn(repeat: int) -> Any:
        steps = work.training(repeat, model.config.vocab_size)
        batches = [torch.tensor([sample.ids for sample in samples]) for samples in steps]
        return lambda: sum(map(step, batches)) / work.steps

    return Ready(f"r={config.adapter.r}, all linear layers, AdamW, clipping; autocast {'on' if half else 'off'}", turn)


def _cache(work: Work) -> str:
    return f"KV cache of {work.kv_tokens} tokens, {work.requests} requests in a batch"
