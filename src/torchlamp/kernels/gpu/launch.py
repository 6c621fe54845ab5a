"""What every launch needs: whether Triton interprets, tiles, and the device that runs."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

#: Rows and columns of a tile: 1024 sums for 128 threads.
TILE_ROWS, TILE_COLUMNS = 16, 64


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def launch_options() -> dict[str, bool]:
    """What kernels are launched with: no product and sum may become one operation that the source doesn't name.

    The interpreter, which takes no options, has no such operation.
    """
    return {} if interpreted() else {"enable_fp_fusion": False}


@contextlib.contextmanager
def device_of(tensor: Tensor) -> Iterator[None]:
    """The tensor's CUDA device is the current one; nothing for the CPU."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield
