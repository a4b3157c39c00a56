"""The contenders of benchmarks/engine.py in CLIF's own environment: CLIF, transformers and PEFT, each in its best form.

Others have environments of their own: benchmarks/rival_engines.py.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from turns import Ready, Turn

from clif.adapters.cache import AdapterCache
from clif.config import Config, config_from_tree
from clif.engine.engine import Engine
from clif.engine.jobs import Job
from clif.models.weights.loading import load_model
from clif.training.train_runner import TrainRunner
from clif.training.trainer import ShadowTrainer
from clif.types import Request, Sampling, TrainSample

CPU = torch.device("cpu")
RANK, ALPHA = 8, 16
"""Of all adapters, served and trained."""


@dataclass(frozen=True)
class Work:
    """A turn of serving: requests at once of so many tokens; one of training: steps of so many samples.

    requests: the most at once. adapters: PEFT folders, by version; empty for the base model. instance: which of the
    instances of a contender this is; they share the requests of a turn.
    """

    model: str
    dtype: str
    requests: int = 32
    prompt: int = 48
    answer: int = 64
    steps: int = 3
    samples: int = 4
    length: int = 128
    targets: int = 64
    adapters: tuple[str, ...] = ()
    instance: int = 0
    instances: int = 1

    @property
    def at_once(self) -> int:
        """The most requests of this instance."""
        return -(-self.requests // self.instances)

    @property
    def kv_tokens(self) -> int:
        """Room for all requests at their longest, and as much again."""
        return 256 * max(1, -(-2 * self.at_once * (self.prompt + self.answer) // 256))

    def config(self) -> Config:
        """Adapters of rank 8 on all linear layers. Training goes without warm-up, as in PEFT's loop."""
        config = config_from_tree(
            {
                "model": {"path": self.model, "dtype": self.dtype, "device": "cpu", "max_context": 256},
                "adapter": {"r": RANK, "lora_alpha": ALPHA},
                "engine": {"max_batch": self.at_once, "kv_tokens": self.kv_tokens, "max_prefill_tokens": 2048},
                "train": {"enabled": False},
            }
        )
        return config.model_copy(update={"train": config.train.model_copy(update={"enabled": True, "warmup_steps": 0})})

    def prompts(self, turn: Turn, vocab: int) -> list[list[int]]:
        """Token ids that no other turn has, the same for all contenders. Special tokens, at the start, are left out.

        So no contender can reuse earlier results: prefix caches would serve a repeat from the previous one's prompts.
        """
        rng = random.Random(f"prompts of {tuple(turn)}")
        drawn = [rng.choices(range(100, vocab), k=self.prompt) for _ in range(sum(turn.rows))]
        return drawn[self.instance :: self.instances]

    def versions(self, turn: Turn) -> list[int]:
        """The adapter of each prompt by its number, or -1 for the base model."""
        numbers = [number for number, count in enumerate(turn.rows) for _ in range(count)]
        random.Random(f"versions of {tuple(turn)}").shuffle(numbers)
        return [number if self.adapters else -1 for number in numbers][self.instance :: self.instances]

    def training(self, turn: Turn, vocab: int) -> list[list[TrainSample]]:
        """Samples of a repeat, by step; they are new in each, and the same for all contenders."""
        rng = random.Random(f"samples of repeat {turn.repeat}")
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
    folders = [Path(folder) for folder in work.adapters]
    cache = AdapterCache(runner.bank, scheduler.slots)
    loaded = cache.versions_of(folders)

    def turn(turn: Turn) -> Any:
        sampling = Sampling(max_tokens=work.answer, ignore_eos=True)
        prompts = work.prompts(turn, runner.stack.vocab_size)
        versions = [None if number < 0 else loaded[folders[number]] for number in work.versions(turn)]
        requests = [
            Request(id=i, prompt=tuple(ids), sampling=sampling, version=version)
            for i, (ids, version) in enumerate(zip(prompts, versions, strict=True))
        ]

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
    model = _with_adapter(work)

    def turn(turn: Turn) -> Any:
        ids = torch.tensor(work.prompts(turn, model.config.vocab_size))
        length = {"max_new_tokens": work.answer, "min_new_tokens": work.answer}

        @torch.inference_mode()
        def run() -> list[int]:
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
            assert out.shape == (len(ids), work.prompt + work.answer)
            return out[:, work.prompt].tolist()

        return run

    return Ready(f"one batch under inference_mode, dynamic cache{_peft(work)}", turn)


def continuous_batch(work: Work) -> Ready:
    """transformers' own continuous batching, made once and kept. Left alone it sizes its cache by the free memory."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    model = _with_adapter(work)
    settings = transformers.GenerationConfig(
        max_new_tokens=work.answer, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    bounds = transformers.ContinuousBatchingConfig(
        page_size=256,
        num_blocks=max(work.kv_tokens // 256, work.at_once),
        max_batch_tokens=2048,
        max_requests_per_batch=work.at_once,
    )

    def turn(turn: Turn) -> Any:
        prompts = work.prompts(turn, model.config.vocab_size)

        def run() -> list[int]:
            out = model.generate_batch(prompts, settings, bounds, persistent_manager=True)
            assert sum(len(r.generated_tokens) for r in out.values()) == len(prompts) * work.answer
            found = {tuple(r.prompt_ids): r.generated_tokens[0] for r in out.values()}
            return [found[tuple(ids)] for ids in prompts]

        return run

    said = ", ".join(f"{name}={getattr(bounds, name)}" for name in ("num_blocks", "page_size", "max_batch_tokens"))
    return Ready(f"{said}, max_requests_per_batch={bounds.max_requests_per_batch}{_peft(work)}", turn)


def clif_training(work: Work) -> Ready:
    """Results of training: the mean loss of a repeat."""
    config = work.config()
    runner = Engine.from_config(config).runner
    trainer = ShadowTrainer(
        TrainRunner(runner), runner.bank, work.training(Turn(0), runner.stack.vocab_size)[0], config.train
    )

    def turn(turn: Turn) -> Any:
        batches = work.training(turn, runner.stack.vocab_size)

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

    def turn(turn: Turn) -> Any:
        steps = work.training(turn, model.config.vocab_size)
        batches = [torch.tensor([sample.ids for sample in samples]) for samples in steps]
        return lambda: sum(map(step, batches)) / work.steps

    return Ready(f"r={config.adapter.r}, all linear layers, AdamW, clipping; autocast {'on' if half else 'off'}", turn)


def _cache(work: Work) -> str:
    return f"KV cache of {work.kv_tokens} tokens, {work.at_once} requests in a batch"


def _with_adapter(work: Work) -> Any:
    """The model of transformers; with the first adapter, if there is one, in PEFT's layers."""
    model = load_model(work.config().model, CPU).model
    if work.adapters:
        # Beside weights in bfloat16: PEFT keeps float32 by default, and converts each input to it.
        model.load_adapter(work.adapters[0], autocast_adapter_dtype=False)
        model.eval().requires_grad_(False).to(model.dtype)
    return model


def _peft(work: Work) -> str:
    return ", the adapter in PEFT's layers" if work.adapters else ""
