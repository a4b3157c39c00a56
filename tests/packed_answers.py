"""What a model with packed weights is compared by with its plain one: greedy answers, and one training step."""

from __future__ import annotations

from typing import Any

import torch
from helpers import Rig, answer, finish, random_state, request

from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample

PROMPTS = [[7, 3, 9], [11, 5, 8, 2, 40, 41, 17], [5], list(range(20, 50)), [9, 9, 9, 1, 2, 3, 4]]


def answers(rig: Rig, **options: Any) -> list[list[int]]:
    requests = [request(i, prompt, max_tokens=9, ignore_eos=True) for i, prompt in enumerate(PROMPTS)]
    events = rig.run(requests, **options)
    return [answer(events[i]) for i in range(len(PROMPTS))]


def step(rig: Rig) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a training step."""
    samples = [TrainSample(id=i, ids=tuple(range(5 + i, 40 + 2 * i)), target_start=12) for i in range(3)]
    rig.bank.set_shadow(random_state(rig.bank, 5))
    config = rig.config.train.model_copy(update={"enabled": True, "lr": 0.01})
    loss = finish(ShadowTrainer(rig.train_runner, rig.bank, samples, config).step(2, 2)).loss
    return loss, rig.bank.gradient.clone()
