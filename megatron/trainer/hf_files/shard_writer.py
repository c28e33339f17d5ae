"""Writes safetensors files, rows of any tensor in any order."""

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron.trainer.hf_files.directory import Region
from megatron.trainer.hf_files.header import build_header
from megatron.trainer.hf_files.plan import INDEX_NAME, ShardPlan, index_text
from megatron.trainer.io.atomic_write import write_durably


class HFWriter:
    """Writes the weight files of a checkpoint in place.

    Headers are written at once, for names, shapes and the type are known; then rows in any order;
    `finish` checks that nothing is missing and forces all to disk. Use it in a `with` statement.

    Args:
        directory: exists and is empty of these files.
        plans: the files to be.
        dtype: of every tensor.
    """

    def __init__(self, directory: Path, plans: Sequence[ShardPlan], dtype: torch.dtype) -> None:
        self._directory, self._plans, self._dtype = directory, plans, dtype
        self._regions: dict[str, Region] = {}
        self._shapes = {name: shape for plan in plans for name, shape in plan.tensors.items()}
        self._missing: dict[str, int] = {}
        self._descriptors: list[int] = []
        with contextlib.ExitStack() as stack:
            for plan in plans:
                self._open(plan, stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> "HFWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, name: str, start: int, rows: torch.Tensor) -> Region | None:
        """Write rows of a tensor, the first of them number `start`.

        Args:
            name: of the tensor.
            start: index of its leading axis.
            rows: [n, ...], of the writer's type. No row may be written twice.

        Returns:
            The tensor's place in its file, once all of its rows are there.
        """
        shape, region = self._shapes[name], self._regions[name]
        if rows.shape[1:] != shape[1:] or start + rows.shape[0] > shape[0]:
            raise ValueError(
                f"rows {start} on of shape {tuple(rows.shape)} do not fit tensor {name} of shape"
                f" {shape}; its other axes must agree"
            )
        if rows.dtype is not self._dtype:
            raise ValueError(f"tensor {name} is {rows.dtype}; the files hold {self._dtype}")
        data = rows.contiguous().view(-1).view(torch.uint8).numpy().data
        row_bytes = region.num_bytes // shape[0] if shape[0] else 0
        write_at(region.descriptor, data, region.begin + start * row_bytes)
        self._missing[name] -= len(data)
        return region if self._missing[name] == 0 else None

    def finish(self) -> None:
        """Write the index, if there are several files, and fsync all files.

        Raises:
            ValueError: rows of some tensor were not written, or written twice.
        """
        wrong = [name for name, missing in self._missing.items() if missing]
        if wrong:
            raise ValueError(
                f"{len(wrong)} tensors were not written once and in full, {wrong[0]} for example;"
                " every row must be written exactly once"
            )
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        if len(self._plans) > 1:
            write_durably(self._directory / INDEX_NAME, index_text(self._plans, self._dtype))

    def _open(self, plan: ShardPlan, stack: contextlib.ExitStack) -> None:
        file = stack.enter_context((self._directory / plan.name).open("xb+", buffering=0))
        header = build_header(plan.tensors, self._dtype)
        write_at(file.fileno(), memoryview(header), 0)
        self._descriptors.append(file.fileno())
        begin = len(header)
        for name, shape in plan.tensors.items():
            num_bytes = math.prod(shape) * self._dtype.itemsize
            self._regions[name] = Region(descriptor=file.fileno(), begin=begin, num_bytes=num_bytes)
            self._missing[name] = num_bytes
            begin += num_bytes


def write_at(descriptor: int, data: memoryview, begin: int) -> None:
    """Write all of `data` at an offset of a file."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], begin + done)
