"The memory of a GPU that checks every access: it must be aligned, and inside of one buffer."

from __future__ import annotations

import numpy as np
import torch

APART = 40  # buffers are 2**40 bytes apart, so that no step out of one leads into another


class BadAccess(Exception):
    "An active lane reads or writes where it must not."


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    "View the bytes from the first to the last element of a tensor."
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    start, size = tensor.storage_offset() * tensor.itemsize, tensor.itemsize
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    return whole[start : start + (steps + 1) * size] if tensor.numel() else whole[:0]


class Memory:
    "Buffers at addresses of their own."

    def __init__(self):
        self.starts: list[int] = []
        self.buffers: list[np.ndarray] = []
        self.accesses = 0  # of lanes, checked

    def clear(self) -> None:
        "Forget the buffers."
        self.starts.clear()
        self.buffers.clear()

    def add(
        self,
        buffer: np.ndarray,  # bytes
        remainder: int = 0,  # of its true address, which says how it is aligned
    ) -> int:  # address
        "Add a buffer."
        self.starts.append((len(self.starts) << APART) + remainder)
        self.buffers.append(buffer)
        return self.starts[-1]

    def locate(
        self,
        addresses: np.ndarray,  # (lanes,) of active lanes
        dtype: np.dtype,
        what: str,  # the instruction
    ) -> tuple[np.ndarray, np.ndarray]:  # the buffer in this dtype, and indices into it
        "Check an access. Raises `BadAccess`."
        size = np.dtype(dtype).itemsize
        if (addresses % size).any():
            raise BadAccess(f"{what}: misaligned by {int((addresses % size).max())} bytes")
        number = int(addresses[0] >> APART)
        if not 0 <= number < len(self.starts):
            raise BadAccess(f"{what}: address {int(addresses[0])} is in no buffer")
        start, buffer = self.starts[number], self.buffers[number]
        offsets = addresses - start
        outside = (offsets < 0) | (offsets + size > len(buffer))
        if outside.any():
            first = int(offsets[outside][0])
            raise BadAccess(f"{what}: byte {first} of a buffer of {len(buffer)}, by {outside.sum()} lanes")
        self.accesses += len(addresses)
        skipped = -start % size
        whole = (len(buffer) - skipped) // size * size
        return buffer[skipped : skipped + whole].view(dtype), (offsets - skipped) // size

    def load(self, addresses: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
        "Read."
        buffer, index = self.locate(addresses, dtype, what)
        return buffer[index]

    def store(self, addresses: np.ndarray, values: np.ndarray, what: str) -> None:
        "Write."
        buffer, index = self.locate(addresses, values.dtype, what)
        buffer[index] = values

    def add_to(self, addresses: np.ndarray, values: np.ndarray, what: str) -> None:
        "Add atomically: also where two lanes have one address."
        buffer, index = self.locate(addresses, values.dtype, what)
        np.add.at(buffer, index, values)
