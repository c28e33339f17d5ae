"""Compares experts by their weights and by whom they serve together: similarity."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron.trainer.checkpoint import CheckpointReader
from megatron.trainer.errors import CheckpointError, DataError, UserError, printable
from megatron.trainer.hf_files import HFDirectory
from moe_app.analyze.collection import Collection
from moe_app.analyze.hf_source import hash_model, hf_pieces, read_piece
from moe_app.analyze.measures import Measured
from moe_app.analyze.tables import Table, from_rows, joined
from moe_ext.analysis.arrays import Floats
from moe_ext.analysis.coactivation import JointCounts

logger = logging.getLogger("analyze")

KEYS = {
    "moe": {
        "router": "decoder.layers.mlp.router.weight",
        "gate and up": "decoder.layers.mlp.experts.weight1",
        "down": "decoder.layers.mlp.experts.weight2",
    },
    "moa": {
        "router": "decoder.layers.self_attention.router.weight",
        "query": "decoder.layers.self_attention.experts.weight_q",
        "output": "decoder.layers.self_attention.experts.weight_o",
    },
}
"""Native tensors [layers, e, ...] by kind of router; [e, ...] with the layer's number in the name
where layers are not alike."""
_LAYERS = "decoder.layers."
_BLOCK = 1 << 22


class Weights(Protocol):
    """Reads the weights of one layer's experts."""

    def read(self, key: str, layer: int) -> Tensor:
        """Return [e, ...] of a native tensor."""
        ...


class NativeWeights:
    """Reads a native checkpoint; see `Weights`. Use it in a `with` statement."""

    def __init__(self, path: Path) -> None:
        self._reader = CheckpointReader(path)

    def __enter__(self) -> "NativeWeights":
        self._reader.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__()

    def read(self, key: str, layer: int) -> Tensor:
        """Return [e, ...] of a native tensor.

        Raises:
            CheckpointError: the checkpoint has no such layer.
        """
        numbered = key.replace(_LAYERS, f"{_LAYERS}{layer}.", 1)
        own = self._reader.tensors.get(numbered)
        if own is not None:  # not all layers have experts, and each is by itself
            return self._reader.read(numbered, (0,) * len(own.shape), own.shape)
        stored = self._reader.tensors.get(key)
        if stored is None or not 0 <= layer < stored.shape[0]:
            raise CheckpointError(
                f"{self._reader.path} has no {key} of layer {layer}; its weights are not those of"
                " the collection; give the checkpoint that the routing was collected with"
            )
        offset = (layer, *[0] * (len(stored.shape) - 1))
        return self._reader.read(key, offset, (1, *stored.shape[1:]))[0]


class HFWeights:
    """Reads a Hugging Face directory; see `Weights`. Use it in a `with` statement."""

    def __init__(self, path: Path) -> None:
        self._source = HFDirectory(path)
        self._pieces = list(hf_pieces(self._source))

    def __enter__(self) -> "HFWeights":
        return self

    def __exit__(self, *_: object) -> None:
        self._source.__exit__()

    def read(self, key: str, layer: int) -> Tensor:
        """Return [e, ...] of a native tensor.

        Raises:
            CheckpointError: the directory has no such layer.
        """
        mine = [piece for piece in self._pieces if piece.key == key and piece.offset[0] == layer]
        if not mine:
            raise CheckpointError(
                f"{self._source.path} has no {key} of layer {layer}; its weights are not those of"
                " the collection; give the checkpoint that the routing was collected with"
            )
        whole = torch.empty(mine[0].shape[1:])
        for piece in mine:
            window = tuple(
                slice(start, start + size)
                for start, size in zip(piece.offset[1:], piece.block[1:], strict=True)
            )
            whole[window] = read_piece(self._source, piece, torch.float32)[0]
        return whole


def open_weights(collection: Collection, path: Path | None) -> NativeWeights | HFWeights:
    """Open the weights that a collection was made with, or those of `path`.

    Raises:
        CheckpointError: they are not there, or not the collection's.
    """
    place = path or Path(collection.manifest.source)
    if not place.is_dir():
        raise CheckpointError(
            f"{place}, which the routing was collected with, is not there; similarity compares its"
            " weights; say with --weights where it is now"
        )
    is_hf = (place / "config.json").is_file()
    _require_own(collection, place, is_hf=is_hf)
    return HFWeights(place) if is_hf else NativeWeights(place)


def _require_own(collection: Collection, place: Path, *, is_hf: bool) -> None:
    """Refuse other weights than the routing was collected with; warn where that cannot be told."""
    manifest = collection.manifest
    if is_hf != (manifest.source_kind == "hf"):
        logger.warning(
            "%s is in another format than %s, which the routing was collected with; that its"
            " weights are the same is not checked",
            printable(str(place)),
            printable(manifest.source),
        )
        return
    try:
        found = hash_model(place, is_hf=is_hf)
    except OSError as error:
        raise CheckpointError(
            f"{place} cannot be read as the checkpoint of {collection.directory}:"
            f" {error.strerror or error}; say with --weights where it is: an iter_... directory, or"
            " a Hugging Face one"
        ) from error
    if found != manifest.model_hash:
        raise CheckpointError(
            f"{place} has other weights ({found[:12]}...) than the routing in"
            f" {collection.directory} was collected with ({manifest.model_hash[:12]}...); give the"
            " checkpoint itself with --weights, or collect the routing again"
        )


def cosines(weights: Tensor) -> Floats:
    """Compute the cosines [e, e] between experts' weights [e, ...]; NaN where one is all 0."""
    rows = weights.reshape(len(weights), -1)
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, rows.shape[1], max(1, _BLOCK // len(rows))):
        part = rows[:, start : start + max(1, _BLOCK // len(rows))].double()
        products += part @ part.T
    lengths = products.diagonal().sqrt()
    found: Floats = (products / (lengths[:, None] * lengths[None, :])).numpy()
    return found


def measure_similarity(
    collection: Collection, *, weights: Path | None = None, may_lack: bool = False
) -> Measured:
    """Compare experts by the cosine of their weights, and attention with feed-forward routing.

    Args:
        collection: the routing.
        weights: the checkpoint; None takes the one that the collection names.
        may_lack: leave out what needs the weights if those that the collection names cannot be
            used, and say so in the result.

    Raises:
        CheckpointError: the weights are not there, or not the collection's.
    """
    tables: list[Table] = []
    missing = ""
    try:
        tables += _of_weights(collection, weights)
    except UserError as error:
        if not may_lack or weights is not None:
            raise
        missing = str(error)
    return Measured(tables=[*tables, *_between_routers(collection)], missing=missing)


def _of_weights(collection: Collection, weights: Path | None) -> list[Table]:
    tables: list[Table] = []
    means: list[tuple[object, ...]] = []
    with open_weights(collection, weights) as source:
        for router in collection.routers():
            for what, key in KEYS[router.kind].items():
                tensor = source.read(key, router.layer)
                if len(tensor) != router.num_experts:
                    raise DataError(
                        f"{key} of layer {router.layer} has {len(tensor)} experts, but the routing"
                        f" is of {router.num_experts}; give the checkpoint it was collected with"
                    )
                values = cosines(tensor.float())
                tables.append(_table(router.kind, router.layer, what, values))
                spread = 1 / math.sqrt(tensor[0].numel())
                means.append((router.kind, router.layer, what, *_summary(values), spread))
    head = ["kind", "layer", "weights"]
    return [
        joined("similarity", tables),
        from_rows("similarity_mean", [*head, "mean", "highest", "random_deviation"], means),
    ]


def _table(kind: str, layer: int, what: str, values: Floats) -> Table:
    rows, columns = np.triu_indices(len(values), 1)
    count = len(rows)
    return Table(
        name="similarity",
        columns={
            "kind": np.repeat(kind, count),
            "layer": np.repeat(np.int32(layer), count),
            "weights": np.repeat(what, count),
            "i": rows.astype(np.int32),
            "j": columns.astype(np.int32),
            "cosine": values[rows, columns],
        },
    )


def _summary(values: Floats) -> tuple[float, float]:
    pairs = values[np.triu_indices(len(values), 1)]
    if not pairs.size:
        return math.nan, math.nan
    return float(pairs.mean()), float(pairs.max())


def _between_routers(collection: Collection) -> Iterator[Table]:
    """Yield how attention and feed-forward routing of the same layer depend on each other."""
    layers = sorted(
        {router.layer for router in collection.routers("moa")}
        & {router.layer for router in collection.routers("moe")}
    )
    if not layers:
        return
    pairs = {
        layer: tuple(
            next(each for each in collection.routers(kind) if each.layer == layer)
            for kind in ("moa", "moe")
        )
        for layer in layers
    }
    counts = {
        layer: JointCounts(*(router.num_experts for router in pair))
        for layer, pair in pairs.items()
    }
    names = [f"{router.name}.experts" for pair in pairs.values() for router in pair]
    for arrays in collection.tokens(*names):
        for layer, pair in pairs.items():
            counts[layer].add(*(arrays[f"{router.name}.experts"] for router in pair))
    rows = [
        (layer, i, j, float(value))
        for layer, joint in counts.items()
        for (i, j), value in np.ndenumerate(joint.conditional())
    ]
    yield from_rows("similarity_routers", ["layer", "moa_expert", "moe_expert", "share"], rows)
    yield from_rows(
        "similarity_information",
        ["layer", "mutual_information", "most"],
        [
            (layer, joint.mutual_information(), math.log(min(joint.together.shape)))
            for layer, joint in counts.items()
        ],
    )
