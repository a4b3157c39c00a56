"""This rank's part of a packed weight."""

from __future__ import annotations

from clif.distributed.layout import LayoutError
from clif.kernels.quantised import QuantisedMatrix
from clif.models.weights.sharded_build import TensorShard


def columns_of(matrix: QuantisedMatrix, name: str, part: TensorShard) -> QuantisedMatrix:
    """The inputs of a part that is cut by inputs; otherwise all. Raises LayoutError where a scale cannot be cut."""
    if part is None or part[0] == "out":
        return matrix
    shard = part[1]
    try:
        return matrix.cut(shard.start, shard.stop)
    except ValueError as error:
        raise LayoutError(
            f"ranks of a replica cannot share the packed {name} ({error}): lower layout.tp_size"
        ) from error
