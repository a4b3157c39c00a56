"""Proof that the stack computes what a model's own forward does: embedding, each layer, norm and head, one by one.

Each stage starts from what the model's own stage before it put out, so that rounding is that of one stage, however deep
the model is. The model sees one sequence at a time, the stack all of them in one batch as in serving, and sequences
begin all over the context: a dependence on the position or on the rest of the batch shows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from clif.config import ConfigError
from clif.distributed.collectives import TpGroup
from clif.models.dual_linear import LoraRows
from clif.models.guard import reading
from clif.models.spec import SIZES, narrow_fields, spec_of
from clif.models.stack import CausalStack
from clif.models.weights.sharded_build import TensorShard, build

PROBE = 32
"""Tokens of a probe: enough that one outlier does not decide."""
EXACT = 1e-4
"""Relative difference of a stage in float32 that another order of sums accounts for."""
ROUNDED = 16
"""Relative difference of a stage of real weights, in units of the dtype's rounding: measured 1 to 2 in bfloat16 at
depths 4 and 32, where whole forwards are 2 to 20 apart. More is allowed because attention that looks at few tokens
multiplies the rounding of its scores; wrong architectures are found in float32 before."""


@dataclass(frozen=True)
class Expected:
    """What a model's own forward computes from probes.

    ids, positions: [rows], the sequences one after the other; lengths: of each. hidden: [rows, hidden size] before the
    first layer and after each; logits: [rows, vocabulary].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]
    hidden: list[torch.Tensor]
    logits: torch.Tensor


def probe_ids(count: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Tokens [count], spread over the vocabulary."""
    return torch.arange(1, count + 1, device=device) * 997 % vocab_size


def ask(model: Any, starts: Sequence[int], length: int) -> Expected:
    """Run a model's own forward, once for each sequence of `length` tokens that begins at one of `starts`."""
    device = model.get_input_embeddings().weight.device
    ids = probe_ids(length, model.config.vocab_size, device)
    positions = [torch.arange(start, start + length, device=device) for start in starts]
    runs = [_run(model, ids, each) for each in positions]
    hidden = [torch.cat(stage) for stage in zip(*(run[0] for run in runs), strict=True)]
    logits = torch.cat([run[1] for run in runs])
    return Expected(ids.repeat(len(runs)), torch.cat(positions), [length] * len(runs), hidden, logits)


def ask_ends(model: Any, max_context: int) -> Expected:
    """Run a model's own forward at the first and at the last positions of the context."""
    length = min(PROBE // 2, max_context)
    return ask(model, sorted({0, max_context - length}), length)


@torch.no_grad()
def _run(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states before the first layer and after each [rows, hidden size], and logits [rows, vocabulary]."""
    hidden: list[torch.Tensor] = []

    def seen(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not hidden:
            hidden.append((args[0] if args else kwargs["hidden_states"])[0])
        hidden.append((out[0] if isinstance(out, tuple) else out)[0])

    hooks = [layer.register_forward_hook(seen, with_kwargs=True) for layer in model.model.layers]
    try:
        with _capped_attention(model):
            logits = model(ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, logits


@contextmanager
def _capped_attention(model: Any) -> Iterator[None]:
    """Some releases of transformers (5.17) leave the soft cap of scores out of torch's fused attention."""
    chosen = model.config._attn_implementation
    if getattr(model.config, "attn_logit_softcapping", None) is None or chosen == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


@torch.no_grad()
def compare(stack: CausalStack, expected: Expected, bound: float | None = None) -> None:
    """Raises ConfigError where the stack computes something other than the model.

    bound: relative difference of a stage; None: what the dtype's rounding accounts for.
    """
    name, hidden = type(stack.model).__name__, expected.hidden
    rounding = torch.finfo(hidden[0].dtype).eps
    bound = bound or max(10 * EXACT, ROUNDED * rounding)
    if not bool(torch.isfinite(expected.logits).all()):
        raise ConfigError(
            f"{name} computes numbers that are not finite: its weights are damaged, or need a wider dtype"
        )

    def check(stage: str, got: torch.Tensor, wanted: torch.Tensor, before: torch.Tensor | None = None) -> None:
        change = wanted if before is None else wanted - before
        # What a layer adds is rounded together with what it is added to.
        allowed = bound * change.float().norm() + (rounding / 2 * wanted.float().norm() if before is not None else 0.0)
        apart = (got - wanted).float().norm()
        if not apart <= allowed:
            raise ConfigError(
                f"{name} computes more than embedding, layers, norm and head ({stage}: relative difference "
                f"{float(apart / change.float().norm()):.2g}): it is not supported, choose another model"
            )

    sub_batch = stack.sub_batch(LoraRows(len(expected.ids)), expected.positions, stack.sequences(expected.lengths))
    check("embedding", stack.embed(expected.ids), hidden[0])
    for i in range(stack.num_layers):
        (got,) = stack.layers(i, i + 1, [hidden[i]], [sub_batch])
        check(f"layer {i}", got, hidden[i + 1], hidden[i])
    check("norm and head", stack.logits(stack.norm(hidden[-1])), expected.logits)


def check_architecture(config: Any, max_context: int) -> None:
    """Prove an architecture by a narrow float32 model as deep as the real one, before anything large is read or drawn.

    config: of a transformers model. Raises ConfigError for a model that computes something other than the stack at one
    of several positions all over the context.
    """
    name = getattr(config, "model_type", "") or type(config).__name__
    sizes = {size: getattr(config, size, None) for size in SIZES}
    missing = [size for size, value in sizes.items() if not isinstance(value, int) or value < 1]
    if missing:
        raise ConfigError(f"{name} is not a Llama-style model (its config.json gives no {', '.join(missing)})")
    length = min(PROBE, max_context)
    starts = sorted({(max_context - length) * share // 8 for share in (0, 1, 2, 4, 8)})
    with reading(f"a narrow {name} model, which is to prove that CLIF computes it rightly,"):
        model = build(_narrowed(config), _noise(), torch.float32, torch.device("cpu"), TpGroup()).eval()
        compare(CausalStack(model), ask(model, starts, length), EXACT)


def _narrowed(config: Any) -> Any:
    narrow = copy.deepcopy(config)
    narrow.update(narrow_fields(spec_of(config)))
    narrow.update({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
    return narrow


def _noise() -> Any:
    """A source of weights that are neither zero nor one, and so large that every layer counts."""
    rng = torch.Generator().manual_seed(0)

    def source(name: str, shape: torch.Size, part: TensorShard) -> torch.Tensor:
        tensor = torch.empty(shape).normal_(0.0, 0.2, generator=rng)
        return tensor + 1 if tensor.dim() == 1 and "norm" in name else tensor

    return source
