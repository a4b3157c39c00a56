"""One whole decoder layer of the product in a decode step: with adapters in each way, without, and with four launches.

Model, layers, adapters, cache, buffers and kernels are those of the engine, for a model of few layers. Rows are on the
device, as in a captured step. What a way computes is checked against float64 before it is timed.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from checkout import REPO
from form_tiles import Machine
from four_launches import OWN, FourLaunches, RivalTiles, published
from kernel_cases import LayerCase
from kernel_goals import AUTO, FOUR, FOUR_PUBLISHED, READ, WITHOUT, Measured
from linear_line import launches
from timing import contest, read_time

from clif.adapters.bank import inject
from clif.config import Config, config_from_tree
from clif.engine import scheduler
from clif.engine.attention import KVCache, PagedLayout, PagedRows
from clif.engine.base import Base, build_base
from clif.engine.batch import segments_of
from clif.engine.decode_buffers import DecodeBuffers
from clif.engine.scheduler import Chunk
from clif.kernels.dual_lora_forms import DualLoraLinear
from clif.kernels.dual_lora_host import KernelLauncher, Tiling
from clif.kernels.dual_lora_reference import Segment
from clif.kernels.paged_decode_reference import PagedDecodeReference
from clif.models.dual_linear import DualLinear, LoraRows, SlotsOnDevice
from clif.models.layer import SubBatch
from clif.models.lora_factors import LoraFactors
from clif.models.stack import CausalStack
from clif.models.weights.loading import load_model
from clif.types import Request, Sampling

VOCABULARY, BLOCK = 512, 16
ALLOWED = 1.5
"""Of the relative error of torch's operators in the same type, which round between any two of them."""
Result = tuple[torch.Tensor, torch.Tensor]
"""Hidden states before the MLP, and what the MLP adds: what one layer hands to the next."""
Part = Mapping[str, Any]
"""What a linear layer has in place of its own attributes in one way."""


def measure_layer(case: LayerCase, machine: Machine) -> Measured:
    """All ways of the case, checked and timed. A form that cannot have its adapters as data has no way."""
    bench = LayerBench(case, machine.device, machine.dtype, machine.tilings)
    ways = bench.ways()
    faults = bench.faults(ways)
    timings, failed = contest(ways, case.layers, machine.repeats, machine.device)
    reading, note = read_time(bench.bytes, machine.device, machine.repeats)
    measured = Measured(timings | {READ: reading}, failed, faults, [note], bench.taken())
    if machine.device.type == "cuda":
        measured.launches = {name: len(launches(way)) for name, way in ways.items() if name in timings}
        counted = ", ".join(f"{count} {name}" for name, count in measured.launches.items())
        measured.notes.append(f"launches of a layer: {counted}")
    return measured


class LayerBench:
    """The layers of one model, ready for the same decode step in every way."""

    def __init__(
        self, case: LayerCase, device: torch.device, dtype: torch.dtype, tilings: Mapping[str, Tiling]
    ) -> None:
        """tilings: of the ways of CLIF, by name. That of AUTO is for a device where the product has no kernels."""
        self.case, self.dtype = case, dtype
        self._config, self.base = _base(case, device, dtype)
        self._layers = self.base.stack.decoder_layers
        self._linears = self.base.stack.linears
        rng = torch.Generator(device).manual_seed(0)
        runner = self.base.runner(self._config.engine)
        self._cache, self._paged = runner.cache, runner.paged
        self._fill(rng)
        shape = (2, case.rows, self.base.stack.spec.hidden_size)
        # Small, so that the layer's own part shows in what it adds them to.
        self._inputs = [0.02 * torch.randn(shape, generator=rng, device=device).to(dtype)[i] for i in range(2)]
        self._chunks = _chunks(case)
        self._buffers = _buffers(case, self._config, self._chunks, device)
        self._products = self._products_of(tilings)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return segments_of(self._chunks)

    @property
    def bytes(self) -> int:
        """Of a layer's weights, and of the keys and values that the rows see: what every way has to read."""
        weights = sum(linear.base.shape.numel() * linear.base.dtype.itemsize for linear in self._layers[0].linears)
        per_token = self._cache.layers[0][:, 0].nbytes
        return weights + self.case.rows * self.case.context * per_token

    @torch.no_grad()
    def _fill(self, rng: torch.Generator) -> None:
        """Adapters that weigh about half as much as the base, and a cache whose tokens differ."""
        for lora in map(_lora, self._linears):
            lora.a.normal_(0.0, lora.width**-0.5, generator=rng)
            for block in lora.blocks(lora.b):
                block.normal_(0.0, 0.1, generator=rng)
        for tensor in self._cache.layers:
            tensor.normal_(0.0, 1.0, generator=rng)

    def _products_of(self, tilings: Mapping[str, Tiling]) -> dict[str, list[DualLoraLinear]]:
        """For each way of CLIF the product of every linear layer; AUTO has the product's own if there are any."""
        own = [linear._captured for linear in self._linears]
        found: dict[str, list[Any]] = {}
        for name, tiling in tilings.items():
            launcher = KernelLauncher(self.base.loaded.device, tiling)
            for linear in self._linears:
                linear.use_kernels(None, launcher)
            found[name] = [linear._captured for linear in self._linears]
        if None not in own:
            found[AUTO] = own
        return {name: products for name, products in found.items() if self._takes_data(products)}

    def _takes_data(self, products: Sequence[DualLoraLinear]) -> bool:
        return all(_form(product, self.case.rows) != "separate" for product in products)

    def taken(self) -> str:
        """The forms of the first layer that AUTO takes."""
        if AUTO not in self._products:
            return ""
        groups = self.base.stack.spec.layer.linears
        products = self._products[AUTO][: len(groups)]
        found = zip(groups, products, strict=True)
        return ", ".join(f"{group.name} {_form(product, self.case.rows)}" for group, product in found)

    def ways(self) -> dict[str, Callable[[int], Result]]:
        """What computes a layer of this number, by way."""
        parts: dict[str, list[Part]] = {
            WITHOUT: [{"_by_slot": _base_alone(linear)} for linear in self._linears],
            **{name: [{"_captured": product} for product in products] for name, products in self._products.items()},
        }
        for name in (FOUR, FOUR_PUBLISHED):
            parts[name] = [{"_by_slot": self._four(linear, name == FOUR)} for linear in self._linears]
        return {name: self._way(own) for name, own in parts.items()}

    def _four(self, linear: DualLinear, own: bool) -> Callable[..., torch.Tensor]:
        merged = _lora(linear).as_merged(linear.base)  # type: ignore[arg-type]
        tiles: RivalTiles = OWN if own else published(self.case.rows, len(linear.names))
        compute = FourLaunches(merged, self.segments, tiles)
        return lambda x, rows: compute(merged, x)

    def _way(self, parts: Sequence[Part]) -> Callable[[int], Result]:
        sub_batch = self._captured_rows()

        @torch.no_grad()
        def way(index: int) -> Result:
            layer = self._layers[index]
            first = index * len(layer.linears)
            with replaced(layer.linears, parts[first : first + len(layer.linears)]):
                # As between two layers: this one's norm adds the residual, and the next one's what this one returns.
                hidden, added = layer([self._inputs[0]], [self._inputs[1]], [sub_batch])
            return hidden[0], added[0]

        return way

    def _captured_rows(self) -> SubBatch:
        """The rows as a captured step has them: adapters, slots and blocks are data (clif/engine/graphs.py)."""
        size, slots = self.case.rows, self._buffers.fields(self.case.rows).long()[4]
        rows = LoraRows(size, on_device=SlotsOnDevice(slots, self._buffers.tables(size)))
        return self._sub_batch(self.base.stack, rows, self._cache, self._paged)

    def _sub_batch(self, stack: CausalStack, rows: LoraRows, cache: KVCache, paged: Any) -> SubBatch:
        size = self.case.rows
        _, positions, cache_slots, _, _ = self._buffers.fields(size).long()
        layout = PagedLayout(size, cache_slots, self._buffers.decode_table(size), (), None)
        return stack.sub_batch(rows, positions, PagedRows(cache, layout, paged))

    def faults(self, ways: Mapping[str, Callable[[int], Result]]) -> list[str]:
        """What the ways compute wrongly in the first layer, in words."""
        exact = {adapted: self._by_torch(torch.float64, adapted) for adapted in (True, False)}
        eager = {adapted: self._by_torch(self.dtype, adapted) for adapted in (True, False)}
        effect, wrong = apart(exact[False], exact[True]), []
        for name, way in ways.items():
            adapted = name != WITHOUT
            allowed = ALLOWED * apart(eager[adapted], exact[adapted]) + torch.finfo(self.dtype).eps / 8
            try:
                error = apart(way(0), exact[adapted])
            except Exception as failure:  # noqa: BLE001 - whatever it was, it is a fault of this way alone
                wrong.append(f"{name}: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}")
                continue
            if not error <= allowed:
                wrong.append(f"{name}: relative error {error:.2e} of a layer, allowed {allowed:.2e}")
            if not effect > 10 * allowed:
                wrong.append(f"{name}: adapters change a layer by {effect:.2e}, too little to be seen")
        return wrong

    @torch.no_grad()
    def _by_torch(self, dtype: torch.dtype, adapted: bool) -> Result:
        """The first layer by torch's operators alone, from the same weights, adapters and cache."""
        stack, cache = self._first_layer(dtype)
        rows = LoraRows(self.case.rows, self.segments if adapted else ())
        sub_batch = self._sub_batch(stack, rows, cache, PagedDecodeReference())
        hidden, added = stack.decoder_layers[0](*([x.to(dtype)] for x in self._inputs), [sub_batch])
        return hidden[0], added[0]  # type: ignore[return-value]

    def _first_layer(self, dtype: torch.dtype) -> tuple[CausalStack, KVCache]:
        """The first layer's weights, adapters and cache in another type."""
        stack = CausalStack(copy.deepcopy(self.base.loaded.model).to(dtype))
        inject(stack, self._config.adapter)
        for lora, own in zip(
            map(_lora, stack.decoder_layers[0].linears), map(_lora, self._layers[0].linears), strict=True
        ):
            lora.hold(own.a.to(dtype), own.b.to(dtype))
        cache = copy.copy(self._cache)
        cache.layers = [self._cache.layers[0].to(dtype, copy=True)]
        return stack, cache


def apart(found: Result, expected: Result) -> float:
    """Relative difference of both results, the larger one."""
    return max(
        float((x.double() - y.double()).norm() / y.double().norm()) for x, y in zip(found, expected, strict=True)
    )


@contextmanager
def replaced(linears: Sequence[DualLinear], parts: Sequence[Part]) -> Iterator[None]:
    """Linear layers with other parts meanwhile: a product, or how they compute rows whose slots are on the device."""
    kept = [dict(vars(linear)) for linear in linears]
    for linear, part in zip(linears, parts, strict=True):
        vars(linear).update(part)
    try:
        yield
    finally:
        for linear, before in zip(linears, kept, strict=True):
            vars(linear).clear()
            vars(linear).update(before)


def _lora(linear: DualLinear) -> LoraFactors:
    assert linear.lora is not None
    return linear.lora


def _form(product: DualLoraLinear, rows: int) -> str:
    out, depth = product.merged.weight.shape
    return product._launcher.tiling.linear(rows, depth, out, product.merged.r, False).form


def _base_alone(linear: DualLinear) -> Callable[..., torch.Tensor]:
    return lambda x, rows: linear.base.forward(x)


def _base(case: LayerCase, device: torch.device, dtype: torch.dtype) -> tuple[Config, Base]:
    """A model of few layers with a small embedding and head, taken apart as for an engine."""
    tree = json.loads((REPO / "configs" / "models" / f"{case.model}.json").read_text())
    tree |= {"num_hidden_layers": case.layers, "vocab_size": VOCABULARY}
    with tempfile.TemporaryDirectory(prefix="clif-layer-") as folder:
        file = Path(folder) / "model.json"
        file.write_text(json.dumps(tree))
        config = config_from_tree(_config(case, file, device, dtype))
        return config, build_base(config, load_model(config.model, device))


def _config(case: LayerCase, file: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    context = _blocks(case) * BLOCK
    model = {"path": f"random:{file}", "device": device.type, "max_context": context}
    return {
        "model": {**model, "dtype": str(dtype).removeprefix("torch.")},
        # On a CPU, too, so that the interpreter runs what a GPU does.
        "engine": {
            "max_batch": case.rows,
            "kv_tokens": case.rows * context,
            "block_size": BLOCK,
            "decode_kernel": "triton",
            "prepack_weights": False,
        },
        "adapter": {"r": case.r},
        "train": {"enabled": False},
    }


def _blocks(case: LayerCase) -> int:
    """KV blocks of a row."""
    return -(-case.context // BLOCK)


def _chunks(case: LayerCase) -> list[Chunk]:
    """The next token of each sequence, sorted by slot; a sequence's blocks lie anywhere in the cache."""
    blocks = _blocks(case)
    order = torch.randperm(case.rows * blocks, generator=torch.Generator().manual_seed(0)).tolist()
    request = Request(id=0, prompt=(1,) * case.context, sampling=Sampling(max_tokens=1))
    slots = [slot for count, slot in case.lengths for _ in range(count)]
    chunks = []
    for slot in slots:
        own = order[len(chunks) * blocks : (len(chunks) + 1) * blocks]
        sequence = scheduler.Sequence(request, 0.0, [1] * case.context, slot=slot, blocks=own)
        chunks.append(Chunk(sequence, case.context - 1, case.context, True))
    return chunks


def _buffers(case: LayerCase, config: Config, chunks: list[Chunk], device: torch.device) -> DecodeBuffers:
    spare, slots = case.rows * _blocks(case), config.adapter.serving_slots + 1
    buffers = DecodeBuffers(case.rows, _blocks(case), BLOCK, spare, slots, device)
    buffers.fill(chunks, segments_of(chunks), case.rows)
    return buffers
