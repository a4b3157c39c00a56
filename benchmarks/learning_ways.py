"""The ways to learn of benchmarks/learning.py: rounds of CLIF replicas, and PEFT on all samples in one place.

Replicas take turns in this process: each step is that of a replica's trainer, moments and order of samples are its
own, and what a round does between replicas (the average by samples, the vote on held-out rows, the learning rate after
a vote against it) is computed here as the members of a round compute it. So a run needs one core and no launcher.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from learning_data import Example

from clif.adapters.peft_io import fit_folder
from clif.config import Config, config_from_tree
from clif.engine.engine import Engine
from clif.engine.jobs import Slices
from clif.models.dual_linear import SHADOW
from clif.models.weights.loading import LoadedModel, load_model
from clif.training.heldout import Heldout
from clif.training.outer_step import HALF, WHOLE, is_half_tried, outer_step
from clif.training.train_runner import TrainRunner
from clif.training.trainer import JobTraining, ShadowTrainer
from clif.types import Request, Sampling, TrainSample

CPU = torch.device("cpu")
TURN = 32
"""Requests of one batch of questions."""


@dataclass(frozen=True)
class Recipe:
    """How to learn. lr, rank, local_steps and micro_batch as in CLIF's configuration, whose defaults these are.

    patience: rounds in a row without a better version after which a run ends.
    """

    lr: float = 2e-3
    rank: int = 8
    alpha: float = 16.0
    epochs: int = 2
    local_steps: int = 20
    micro_batch: int = 4
    warmup_steps: int = 5
    patience: int = 3


@dataclass(frozen=True)
class Score:
    """On the rows of the report. loss: nats per answer token; exact: share of the answers that are the row's."""

    loss: float
    exact: float


@dataclass(frozen=True)
class Learnt:
    """An adapter [n], as the bank's shadow has it, after so many rounds, of which some made a better version.

    halved: better versions at half of the way.
    """

    adapter: torch.Tensor
    rounds: int
    promoted: int
    halved: int
    samples: int


def finish(work: Slices[Any]) -> Any:
    """A job from beginning to end; returns its result."""
    result = None
    while True:
        try:
            piece = work.send(result)
            result = piece.work(piece.units)
        except StopIteration as end:
            return end.value


def steps_of_round(left: int, samples: int, local_steps: int) -> int:
    """Steps of each member in the next round, of `samples` samples of all members each: no more than are left."""
    return max(1, min(local_steps, left // samples))


class Bench:
    """One engine, in which all ways are measured alike."""

    def __init__(self, model: str, dtype: str, recipe: Recipe) -> None:
        self.recipe, self.config = recipe, config_of(model, dtype, recipe)
        self.loaded: LoadedModel = load_model(self.config.model, CPU, 0)
        self.engine = Engine.from_config(self.config, self.loaded)
        self.bank, self.slots = self.engine.runner.bank, self.engine.scheduler.slots
        self.runner = TrainRunner(self.engine.runner)
        self._requests = 0

    def use(self, recipe: Recipe) -> None:
        """Train with another recipe, of the same rank."""
        train = {"lr": recipe.lr, "warmup_steps": recipe.warmup_steps}
        self.recipe = recipe
        self.config = self.config.model_copy(update={"train": self.config.train.model_copy(update=train)})

    def loss(self, examples: Sequence[Example], slot: int | None) -> float:
        """Nats per answer token under a slot of the bank; None: the base model."""
        held = Heldout(self.runner, [example.sample for example in examples], self.config.engine.eval_tokens)
        return float(finish(held.loss(slot))) / held.tokens

    def score(self, examples: Sequence[Example], adapter: torch.Tensor | None) -> Score:
        """Of an adapter [n]; None: of the base model."""
        version, slot = 0, None
        if adapter is not None:
            self.bank.load_shadow(adapter)
            slot, version = self.slots.free_slot(), self.slots.active + 1
            assert slot is not None
            self.bank.fill_slot(slot, self.bank.shadow_state())
            self.slots.promote(version, slot)
        answers = [
            a for start in range(0, len(examples), TURN) for a in self._answers(examples[start:][:TURN], version)
        ]
        right = sum(a.strip() == example.row.answer.strip() for a, example in zip(answers, examples, strict=True))
        return Score(self.loss(examples, slot), right / len(examples))

    def _answers(self, examples: Sequence[Example], version: int) -> list[str]:
        """Greedy ones, of one batch; a few tokens longer than the right one at most."""
        first = self._requests
        self._requests += len(examples)
        tokens: dict[int, list[int]] = {}
        for i, example in enumerate(examples):
            sample = example.sample
            sampling = Sampling(max_tokens=sample.targets + 4)
            prompt = sample.ids[: sample.target_start]
            self.engine.scheduler.add(Request(id=first + i, prompt=prompt, sampling=sampling, version=version), 0.0)
        while self.engine.serving:
            for event in self.engine.serve():
                tokens.setdefault(event.request_id, []).extend(event.tokens)
        ends = set(self.loaded.tokenizer.eos_ids)
        return [
            self.loaded.tokenizer.decode([t for t in tokens.get(first + i, ()) if t not in ends])
            for i in range(len(examples))
        ]

    def federated(
        self,
        parts: Sequence[Sequence[TrainSample]],
        gate: Sequence[Example],
        seed: int,
        base: torch.Tensor | None = None,
    ) -> Learnt:
        """Rounds of replicas with these samples. base: the adapter to begin from; None: a new one."""
        recipe, bank = self.recipe, self.bank
        if base is None:
            bank.reset(seed)
            base = bank.shadow.detach().clone()
        trainer = ShadowTrainer(self.runner, bank, [], self.config.train)
        members = [trainer.fresh(list(part), seed + i, "") for i, part in enumerate(parts)]
        best, total, done = self.gate(gate, base), recipe.epochs * sum(map(len, parts)), 0
        rounds = promoted = halved = missed = 0
        scale = 1.0
        while done < total and missed < recipe.patience:
            before = copy.deepcopy([member.moments for member in members])
            steps = steps_of_round(total - done, len(members) * recipe.micro_batch, recipe.local_steps)
            average, count = self._round(trainer, members, base, scale, steps)
            candidate, loss, step = self._judged(gate, base, best, average)
            done, rounds = done + count, rounds + 1
            promotes = loss <= best
            scale = min(1.0, 2 * scale) if promotes and step == WHOLE else scale / 2
            if promotes:
                base, best, promoted, missed = candidate, loss, promoted + 1, 0
                halved += step == HALF
                continue
            missed += 1
            for member, moments in zip(members, before, strict=True):
                member.moments = moments
        return Learnt(base, rounds, promoted, halved, done)

    def _round(
        self, trainer: ShadowTrainer, members: list[JobTraining], base: torch.Tensor, scale: float, steps: int
    ) -> tuple[torch.Tensor, int]:
        """The average of all members' shadows by samples, and how many samples they did."""
        recipe, mean, total = self.recipe, torch.zeros_like(base), 0
        for i, member in enumerate(members):
            idle = finish(trainer.exchange(member))
            self.bank.load_shadow(base)
            count = 0
            for _ in range(steps):
                count += finish(trainer.step(recipe.micro_batch, 1, scale)).samples
            trainer.commit()
            mean += count * self.bank.shadow.detach()
            total += count
            members[i] = finish(trainer.exchange(idle))
        return mean / total, total

    def _judged(
        self, gate: Sequence[Example], base: torch.Tensor, best: float, average: torch.Tensor
    ) -> tuple[torch.Tensor, float, float]:
        """What a round proposes, its loss, and the outer step. best: the loss of its base."""
        loss = self.gate(gate, average)
        if not is_half_tried(loss, best):
            return average, loss, WHOLE
        half = torch.lerp(base, average, HALF)
        loss_of_half = self.gate(gate, half)
        step = outer_step(loss, loss_of_half)
        return (half, loss_of_half, HALF) if step == HALF else (average, loss, WHOLE)

    def gate(self, gate: Sequence[Example], adapter: torch.Tensor) -> float:
        """Nats per answer token of an adapter [n], which the shadow has afterwards."""
        self.bank.load_shadow(adapter)
        return self.loss(gate, SHADOW)

    def adapter_of(self, folder: Path) -> torch.Tensor:
        """A PEFT folder's, as the bank has it."""
        return self.bank.flat(fit_folder(self.bank, folder))


def config_of(model: str, dtype: str, recipe: Recipe) -> Config:
    """Of an engine that serves, and trains with the recipe."""
    config = config_from_tree(
        {
            "model": {"path": model, "dtype": dtype, "device": "cpu", "max_context": 256},
            "adapter": {"r": recipe.rank, "lora_alpha": recipe.alpha},
            "engine": {"max_batch": TURN, "kv_tokens": 256 * TURN, "max_prefill_tokens": 1024},
            "train": {"enabled": False},
        }
    )
    train = config.train.model_copy(update={"enabled": True, "lr": recipe.lr, "warmup_steps": recipe.warmup_steps})
    return config.model_copy(update={"train": train})


class Central:
    """PEFT's adapter in transformers' model: all samples in one place, the same optimizer, the same batches."""

    def __init__(self, model: str, dtype: str, recipe: Recipe) -> None:
        import peft

        self.recipe = recipe
        base = load_model(config_of(model, dtype, recipe).model, CPU).model
        self._half = base.dtype != torch.float32
        lora = peft.LoraConfig(r=recipe.rank, lora_alpha=int(recipe.alpha), target_modules="all-linear")
        self.model = peft.get_peft_model(base, lora)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]

    def learn(self, samples: Sequence[TrainSample], gate: Sequence[Example], seed: int, folder: Path) -> int:
        """Train a new adapter and save it in a folder, that of the epoch with the least loss on the gate; its epoch."""
        self._reset(seed)
        optimizer = torch.optim.AdamW(self._trained, lr=self.recipe.lr, weight_decay=0.0, fused=True)
        best, steps, chosen = float("inf"), 0, 0
        for epoch in range(1, self.recipe.epochs + 1):
            for batch in self._batches(samples, seed, epoch):
                steps += 1
                for group in optimizer.param_groups:
                    group["lr"] = self.recipe.lr * min(1.0, steps / max(1, self.recipe.warmup_steps))
                (self._summed(batch) / sum(s.targets for s in batch)).backward()
                torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            loss = self._loss([example.sample for example in gate])
            if loss < best:
                best, chosen = loss, epoch
                self.model.save_pretrained(folder)
        return chosen

    def _batches(self, samples: Sequence[TrainSample], seed: int, epoch: int) -> Iterator[list[TrainSample]]:
        rng, size = torch.Generator().manual_seed(1000 * seed + epoch), self.recipe.micro_batch
        order = torch.randperm(len(samples), generator=rng).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield [samples[i] for i in order[start : start + size]]

    def _summed(self, batch: Sequence[TrainSample]) -> torch.Tensor:
        """Summed cross-entropy of the answers, right-padded."""
        longest = max(len(sample.ids) for sample in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        seen, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, sample in enumerate(batch):
            end = len(sample.ids)
            ids[i, :end], seen[i, :end] = torch.tensor(sample.ids), 1
            labels[i, sample.target_start : end] = ids[i, sample.target_start : end]
        with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
            logits = self.model(ids, attention_mask=seen).logits[:, :-1]
        chosen = labels[:, 1:] != -100
        return torch.nn.functional.cross_entropy(logits[chosen].float(), labels[:, 1:][chosen], reduction="sum")

    @torch.no_grad()
    def _loss(self, samples: Sequence[TrainSample]) -> float:
        size = self.recipe.micro_batch
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        return float(sum(self._summed(batch) for batch in batches)) / sum(s.targets for s in samples)

    def _reset(self, seed: int) -> None:
        torch.manual_seed(seed)
        for module in self.model.modules():
            for name in getattr(module, "lora_A", ()):
                module.reset_lora_parameters(name, True)
