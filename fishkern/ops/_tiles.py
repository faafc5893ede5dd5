"""How the references of the operations on weight gradients cut a gradient ``[O, I]`` into tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

# One example's gradient of a tile and the running total should stay in the cache while the examples pass by. On a CPU
# tiles of 2 to 8 MiB are equally fast; smaller matrix products are slower on two cores, and larger ones leave the
# cache. A GPU needs more to be busy.
TILE_ENTRIES = 2**21
TILE_ENTRIES_ON_GPU = 2**23
# A CPU's matrix products of few positions take twice to four times as long per entry where the result is wider.
_TILE_COLUMNS = 768


def tiles(O: int, I: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cut a gradient into rows and columns.

    Args:
        O: Rows of the gradient.
        I: Columns of it.
        device: Where it is computed.

    Yields:
        The rows and the columns of each tile, none larger than the first.
    """
    if device.type == "cpu":
        # of few rows as many columns as make a quarter of a tile, since products of fewer entries are slower again
        entries, width = TILE_ENTRIES, max(_TILE_COLUMNS, TILE_ENTRIES // (4 * O + 1))
    else:
        entries, width = TILE_ENTRIES_ON_GPU, I
    if entries >= O * I and width >= I:
        yield slice(None), slice(None)
        return
    all_columns = list(spans(I, width))
    height = max(1, entries // (min(all_columns[0].stop, I) - all_columns[0].start))
    for columns in all_columns:  # of one height, although the last columns are fewer: their tiles are smaller
        for rows in spans(O, height):
            yield rows, columns


def spans(size: int, longest: int) -> Iterator[slice]:
    """Cut ``range(size)`` into parts of equal length, of which the last may be shorter.

    Args:
        size: At least 1.
        longest: About how long a part may be.

    Yields:
        The parts, in order.
    """
    step = math.ceil(size / math.ceil(size / longest))
    step = math.ceil(step / 16) * 16  # whole cache lines
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
