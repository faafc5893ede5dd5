"""What an error says where memory does not suffice: how much the sums take, and the ways out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from fishkern.statistics.pass_plan import bytes_in_words
from fishkern.statistics.plan import plan
from fishkern.statistics.request import Options, Request

_ALLOCATORS = ("can't allocate memory", "not enough memory")  # how torch's of the CPU say it, in a RuntimeError


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory does not suffice.

    Args:
        error: Any.

    Returns:
        Whether it does, on whatever device.
    """
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATORS)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


@contextmanager
def saying_what_sums_take(request: Request, options: Options) -> Iterator[None]:
    """Add to an error of too little memory what the sums take, and what to do.

    Args:
        request: What is asked for.
        options: The arguments in force.

    Yields:
        Nothing.
    """  # noqa: DOC501 - what is raised again is not its own
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            error.add_note(_what_sums_take(request, options))
        raise


def _what_sums_take(request: Request, options: Options) -> str:
    ways = (
        "Three ways out: keep the sums elsewhere (accumulate_on='cpu' for a model on a GPU, or a folder on a disk); "
        "take them in parts, a pass over the data for each (parts=fishkern.plan(model, batch).parts('8GB'), and "
        "results_on= for what is done); or make the batches smaller, if they take the most. fishkern.plan(model, "
        "batch) says what each of these takes."
    )
    with suppress(Exception):  # it may need memory as well
        planned = plan(
            request.model, None, request.estimator, parameters=options.parameters, parts=options.parts, check=False
        )
        sums = bytes_in_words(planned.accumulator_bytes)
        bases = f" and their bases {bytes_in_words(planned.basis_bytes)}" if planned.basis_bytes else ""
        entries = sum(info.shape.numel() for info in request.infos.values())
        places = ", ".join(sorted({info.device.type for info in request.infos.values()}))
        weights = bytes_in_words(planned.weight_bytes)
        a_pass = " of a pass" if planned.passes > 1 else ""
        return (
            f"The sums{a_pass} take {sums}{bases} on {places} (of {entries:,} entries of {len(request.infos)} "
            f"parameters), beside {weights} of weights and what a batch takes. {ways}"
        )
    return ways
