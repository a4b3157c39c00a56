"""What the ranks of one replica do in the tests of the head that they share. Importable by name."""

from __future__ import annotations

from typing import Any

import torch
from bodies_tp import SAMPLES, counted, list_slices, shared_rig, shared_step
from helpers import draws_of, request

from clif.distributed.topology import Topology
from clif.engine.draws import Draws
from clif.engine.sampling import draw_
from clif.models.causal import CausalSequences
from clif.models.dual_linear import LoraRows
from clif.models.head import Head
from clif.models.loss import head_loss
from clif.types import Constraint, Request, Sampling

VOCABULARY = 301
"""No number of ranks divides it."""
WIDTH = 16
GREEDY = Sampling()
DRAWN = [Sampling(temperature=0.8, seed=5), Sampling(temperature=1.3, top_k=40), Sampling(temperature=1.0, top_p=0.7)]


def exact_head(topology: Topology, tied: bool = False, broken: int | None = None) -> Head:
    """Of small whole numbers, so that nothing is rounded. Every row is there three times, far apart, so that the best
    columns of different ranks are equal. broken: a row of NaN."""
    rng = torch.Generator().manual_seed(1)
    rows = torch.randint(-3, 4, (VOCABULARY // 3, WIDTH), generator=rng).float()
    linear = torch.nn.Linear(WIDTH, VOCABULARY)
    linear.weight.data = torch.cat((rows, rows, rows, torch.ones(1, WIDTH)))
    linear.bias.data = torch.zeros(VOCABULARY)
    if broken is not None:
        linear.weight.data[broken] = float("nan")
    return Head(linear.requires_grad_(False).to(topology.device), VOCABULARY, tied, topology.tp_group)


def exact_rows(topology: Topology, broken: bool) -> torch.Tensor:
    """Six rows; zeros, for which all columns are equal, and if wanted NaN are among them."""
    rows = torch.randint(-3, 4, (6, WIDTH), generator=torch.Generator().manual_seed(2)).float()
    rows[4] = 0.0
    if broken:
        rows[2] = float("nan")
    return rows.to(topology.device)


def choose(head: Head, logits: torch.Tensor, draws: Draws | None) -> list[int]:
    tokens = head.best(logits)
    found: list[int] = (tokens if draws is None else draw_(head, tokens, logits, draws)).tolist()
    return found


def choices(topology: Topology) -> dict[str, Any]:
    """Tokens of greedy rows, with ties, NaN rows and NaN columns, and of rows that are drawn beside greedy ones."""
    found: dict[str, Any] = {}
    params = [GREEDY, DRAWN[0], GREEDY, DRAWN[1], GREEDY, DRAWN[2]]
    for tied in (False, True):
        head = exact_head(topology, tied)
        logits = head(exact_rows(topology, broken=False))
        found[f"greedy, tied {tied}"] = choose(head, logits, None)
        found[f"mixed, tied {tied}"] = [choose(head, logits, draws(topology, params, i)) for i in range(5)]
        found[f"NaN row, tied {tied}"] = choose(head, head(exact_rows(topology, True)), None)
        found[f"whole, tied {tied}"] = head.whole(logits).cpu()
        found[f"nobody, tied {tied}"] = choose(head, logits[:0], None)
    for broken in (0, VOCABULARY // 2, VOCABULARY - 1):
        head = exact_head(topology, broken=broken)
        found[f"NaN column {broken}"] = choose(head, head(exact_rows(topology, broken=False)), None)
    return found


def draws(topology: Topology, params: list[Sampling], position: int = 0) -> Draws | None:
    requests = [Request(id=i, prompt=(1,), sampling=p) for i, p in enumerate(params)]
    return draws_of(requests, VOCABULARY, position, topology.device.type)


def draw_from_nan(topology: Topology) -> list[int]:
    """Of a row from which nobody can draw, beside a greedy one."""
    head = exact_head(topology)
    return choose(head, head(exact_rows(topology, broken=True))[1:3], draws(topology, [GREEDY, DRAWN[0]]))


def losses(topology: Topology, tied: bool) -> dict[str, Any]:
    """Loss and gradient of rows whose targets are in every rank's share, and of a row of NaN."""
    rng = torch.Generator().manual_seed(3)
    linear = torch.nn.Linear(WIDTH, VOCABULARY)
    linear.weight.data = torch.randn(VOCABULARY, WIDTH, generator=rng)
    linear.bias.data = torch.randn(VOCABULARY, generator=rng)
    head = Head(linear.requires_grad_(False).to(topology.device), VOCABULARY, tied, topology.tp_group)
    targets = torch.tensor([0, 74, 75, 99, 100, 149, 150, 151, 200, 201, 226, 300], device=topology.device)
    # Large ones: exponentials without care would be infinite.
    normed = (torch.randn(len(targets), WIDTH, generator=rng) * 30).to(topology.device)
    loss, gradient = head_loss(head, normed, targets, 7.0)
    assert gradient is not None
    alone, nothing = head_loss(head, normed, targets)
    assert nothing is None and torch.equal(alone, loss), "an evaluation sees the loss of a training step"
    broken, _ = head_loss(head, normed.index_fill(0, targets[:1], float("nan")), targets)
    return {"loss": float(loss), "gradient": gradient.cpu(), "broken": float(broken), "held": head.base.shape[0]}


def guided(topology: Topology, model: str, overlap: bool) -> dict[int, Any]:
    """Tokens, ends and log-probabilities of answers with all that a request may ask for, beside plain ones."""
    rig = shared_rig(topology, model, overlap=overlap)
    asked: list[dict[str, Any]] = [
        {"constraint": Constraint("json_object"), "temperature": 2.0, "seed": 1, "logprobs": 2},
        {},
        {"presence_penalty": 1.0, "logit_bias": ((150, 4.0), (299, 3.0)), "logprobs": 0},
        {"temperature": 1.0, "min_p": 0.05, "seed": 2, "logprobs": 3, "prompt_logprobs": True},
        {"constraint": Constraint("json_schema", '{"$ref": "#"}')},
    ]
    requests = [request(i, [3 + i, 9], max_tokens=12, **kind) for i, kind in enumerate(asked)]
    events: dict[int, list[Any]] = {one.id: [] for one in requests}
    for one in requests:
        rig.engine.scheduler.add(one, 0.0)
    while rig.engine.serving:
        for event in shared_step(rig):
            events[event.request_id].append(event)
    return {
        i: {
            "tokens": [token for event in found for token in event.tokens],
            "end": found[-1].finish,
            "top": [[token for token, _ in report.top] for event in found for report in event.logprobs],
            "logprobs": torch.tensor(
                [report.logprob for event in found for report in (*event.prompt_logprobs, *event.logprobs)]
            ),
        }
        for i, found in events.items()
    }


@torch.no_grad()
def communication(topology: Topology, model: str) -> dict[str, Any]:
    """Collectives of this rank: of the layers alone, of whole steps, and of training by kind of slice."""
    rig, ids = shared_rig(topology, model), torch.arange(3, 30)
    stack, engine = rig.runner.stack, rig.engine
    rows = stack.sub_batch(LoraRows(len(ids)), ids, CausalSequences([len(ids)], topology.device))
    found: dict[str, Any] = {"layers": stack.num_layers}
    with counted() as calls:
        stack.layers(0, stack.num_layers, [stack.embed(ids)], [rows])
    found["forward alone"] = dict(calls)
    engine.scheduler.add(request(0, [5, 6], max_tokens=9, ignore_eos=True), 0.0)
    with counted() as calls:
        shared_step(rig)
    found["greedy step"] = dict(calls)
    engine.scheduler.add(request(1, [5, 6], max_tokens=9, ignore_eos=True, temperature=1.0), 0.0)
    with counted() as calls:
        shared_step(rig)
    found["step that draws"] = dict(calls)
    for name, work in (
        ("training", rig.train_runner.loss_and_gradients(SAMPLES, 1.0)),
        ("evaluation", rig.train_runner.loss(SAMPLES, None)),
    ):
        with counted() as calls:
            found[name] = list_slices(work, calls)
    return found
