"""From options to a model and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.commands.options import Inputs
from fishkern.commands.output import note, waiting
from fishkern.integrations import data, hub, models, processors
from fishkern.integrations.columns import CANDIDATES, Head, choose_columns, read_head, task_of_labels, unused_label
from fishkern.integrations.data import Rows
from fishkern.integrations.examples import Encoder, Example, pad_token
from fishkern.integrations.models import Source
from fishkern.integrations.tasks import TASKS, task_of_config
from fishkern.names import listed
from fishkern.statistics import Energies, Likelihood, Statistics
from fishkern.statistics.out_of_memory import is_out_of_memory

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
BATCH_SIZE = {"cpu": 8}  # a guess, halved while memory does not suffice
BATCH_SIZE_ELSEWHERE = 32

Result = TypeVar("Result")
Estimated = TypeVar("Estimated", Statistics, Energies)


@dataclass(frozen=True)
class Prepared:
    """A model, and examples of its task.

    Attributes:
        model: On its device.
        encoder: Makes batches of the examples.
        examples: Longest first, so that a lack of memory shows at the start.
        described: Where model and examples come from, as plain values for the provenance.
    """

    model: nn.Module
    encoder: Encoder
    examples: list[Example]
    described: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Make padded batches.

        Args:
            size: Examples in each.

        Returns:
            Keyword arguments of the model, one mapping for each batch.
        """
        starts = range(0, len(self.examples), size)
        return [self.encoder.collate(self.examples[start : start + size]) for start in starts]


def prepare(work: Inputs, samples: int) -> Prepared:
    """Open the data, load the model, make examples.

    Args:
        work: The options.
        samples: How many examples.

    Returns:
        The model and the examples.

    Raises:
        ValueError: An option, a column, a label or a text does not fit; the message says which.
        OSError: Model or data are not on this machine, and the hub does not have them or cannot be asked.
    """
    _check_names(work)
    device = checked_device(work.device or ("cuda" if torch.cuda.is_available() else "cpu"), "--device")
    with waiting("reading data") as now, hub.quiet() as warned:
        rows = data.read(work.data, name=work.subset or None, split=work.split, first=work.first, seed=work.seed)
        now("loading model")
        source = models.find(work.model, work.base or None)
        task = _task(work, source)
        columns = choose_columns(task, rows, {role: getattr(work, role) or None for role in CANDIDATES})
        head = _head(work, source, task, columns, rows)
        processor, max_length = _processor(source, task, work)
        model, fresh = models.load(source, task, head=head, dtype=work.dtype, device=device, seed=work.seed)
        encoder = Encoder(task, columns, processor, _config(model), max_length, work.seed)
        if task == "sequence-classification":
            _set_pad_token(encoder.config, processor)
        now("making examples")
        examples = list(encoder.examples(rows, samples))
    for text in warned:
        note(text)
    if not examples:
        raise ValueError(f"{work.data} has no row with something to learn from ({encoder.passed_over:,} were read).")
    _announce_head(fresh, work.seed)
    _announce_rows(encoder.passed_over, len(examples), samples)
    if not work.task and source.adapter is None:
        _announce_unused_label(task, columns, rows)
    examples.sort(key=lambda example: -len(example.get("input_ids", ())))
    return Prepared(model, encoder, examples, _described(work, encoder, rows, len(examples), fresh))


def prepare_model(work: Inputs) -> tuple[nn.Module, dict[str, Any]]:
    """Load the model alone, for a command that needs no data.

    Args:
        work: The options.

    Returns:
        The model on its device, and its task, as plain values for the provenance.

    Raises:
        ValueError: An option does not fit; the message says which.
        OSError: The model is not on this machine, and the hub does not have it or cannot be asked.
    """
    _check_names(work)
    device = checked_device(work.device or ("cuda" if torch.cuda.is_available() else "cpu"), "--device")
    with waiting("loading model"), hub.quiet() as warned:
        source = models.find(work.model, work.base or None)
        task = _task(work, source)
        models.check_task(source, task)
        model, fresh = models.load(source, task, dtype=work.dtype, device=device, seed=work.seed)
    for text in warned:
        note(text)
    return model, {"task": task, **({"random weights": fresh} if fresh else {})}


def refuse_adapter(work: Inputs, what: str) -> None:
    """Refuse an adapter where a model is expected, before anything is loaded.

    Args:
        work: The options.
        what: What is done for a model, such as ``"a start is made"``.

    Raises:
        ValueError: MODEL is an adapter.
        OSError: The model is not on this machine, and the hub does not have it or cannot be asked.
    """
    with waiting("reading config"), hub.quiet():
        source = models.find(work.model, work.base or None)
    if source.adapter is not None:
        raise ValueError(
            f"{work.model} is an adapter, and {what} for a model without one: name its base, {source.folder}, "
            "or merge the adapter into it and name the result."
        )


def note_what_is_not_linear(model: nn.Module) -> None:
    """Point out weights in the layers that get no LoRA by default, because each is a stack of matrices.

    Args:
        model: The model.
    """
    layers = hosts.layer_of(model)
    stacked = [name for name, one in hosts.named_parameters(model).items() if one.ndim > 2 and layers.get(name)]
    if stacked:
        note(
            f"{len(stacked)} weights in the layers are no matrices and left out, such as experts in one tensor "
            f"({listed(stacked)}); PEFT adapts these by target_parameters"
        )


def likelihood_of(reduction: str, task: str) -> Likelihood | None:
    """Turn ``--reduction`` into what ``likelihood=`` takes.

    Args:
        reduction: ``"mean"`` or ``"sum"``.
        task: What the model is trained for, or ``""`` as long as that is not known.

    Returns:
        The likelihood, or ``None`` for the model's own loss.

    Raises:
        ValueError: ``reduction`` is neither, or makes no difference to this task.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"--reduction is mean or sum, got {reduction!r}.")
    if reduction == "mean" or not task:
        return None
    likelihood = TASKS[task].likelihood
    if likelihood is None:
        raise ValueError(f"an example of {task} has one label, and nothing to sum: leave out --reduction.")
    return likelihood(reduction="sum")


def with_origin(estimated: Estimated, origin: dict[str, Any]) -> Estimated:
    """Add to the provenance where model and examples come from.

    Args:
        estimated: What :func:`fishkern.estimate` returned.
        origin: Plain values.

    Returns:
        The same with a longer provenance.
    """
    provenance = estimated.provenance
    provenance["runs"][0] |= origin
    return type(estimated)(
        dict(estimated.blocks),
        count=estimated.count,
        provenance=provenance,
        coverage=estimated.coverage,
        precision=estimated.precision,
    )


def predicate(patterns: Sequence[str], model: nn.Module) -> Callable[[str, nn.Parameter], bool] | None:
    """Turn ``--parameters`` into what ``parameters=`` takes.

    Args:
        patterns: As in a shell.
        model: Has the parameters.

    Returns:
        A predicate, or ``None`` where there is no pattern.

    Raises:
        ValueError: A pattern matches no parameter.
    """
    names = list(hosts.named_parameters(model))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"--parameters {pattern!r} matches none of {len(names)} names such as {names[0]}.")
    return (lambda name, _: any(fnmatchcase(name, pattern) for pattern in patterns)) if patterns else None


def fitting(
    run: Callable[[int], Result],
    requested: int | None,
    device: torch.device,
    examples: int,
    or_else: str = "fewer --parameters",
) -> Result:
    """Run with the largest batch that fits: a guess, halved while memory does not suffice.

    Args:
        run: Called with the batch size.
        requested: The user's batch size: no other is tried.
        device: Device of the model.
        examples: How many there are.
        or_else: What else may help.

    Returns:
        What ``run`` returns.

    Raises:
        MemoryError: Not even one example fits, or not the batch that the user requested.
    """  # noqa: DOC501 - what is raised again is not its own
    size = requested or min(BATCH_SIZE.get(device.type, BATCH_SIZE_ELSEWHERE), examples)
    while True:
        try:
            return run(size)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if requested or size == 1:
                advice = "choose a smaller --batch-size, or leave it out" if size > 1 else (
                    f"choose a smaller --max-length, --dtype bfloat16, or {or_else}"
                )  # fmt: skip
                raise MemoryError(f"out of memory on {device} at a batch size of {size}: {advice}.") from None
        size //= 2  # outside of the except block, which keeps the tensors of the failed run alive
        if device.type == "cuda":
            torch.cuda.empty_cache()
        note(f"out of memory: trying again with a batch size of {size}")


def checked_device(name: str, option: str) -> str:
    """Check that torch has a device, before the weights are read.

    Args:
        name: Such as ``"cuda:1"``.
        option: The option that names it.

    Returns:
        The name.

    Raises:
        ValueError: torch does not have it.
    """
    if name == "meta":
        raise ValueError(f"{option} meta cannot be used: it holds no values.")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise ValueError(f"{option} {name} cannot be used: {str(error).splitlines()[0]}") from None
    return name


def _check_names(work: Inputs) -> None:
    if work.dtype not in DTYPES:
        raise ValueError(f"--dtype is one of {', '.join(DTYPES)}, got {work.dtype!r}.")
    if work.task and work.task not in TASKS:
        raise ValueError(f"--task is one of {', '.join(TASKS)}, got {work.task!r}.")


def _task(work: Inputs, source: Source) -> str:
    task = work.task or source.task
    if task is None:
        raise ValueError(f"{work.model} does not say what it is trained for: give --task, one of {', '.join(TASKS)}.")
    if task == "image-classification" and work.max_length is not None:
        raise ValueError(f"{task} reads no text: leave out --max-length.")
    return task


def _head(work: Inputs, source: Source, task: str, columns: Mapping[str, str], rows: Rows) -> Head | None:
    """Read from the data the labels of a head that the checkpoint lacks; ``None`` where it has its own."""
    models.check_task(source, task)
    head = None if task_of_config(source.config) == task else read_head(rows, columns, work.num_labels)
    if work.num_labels is not None:
        if "label" not in columns:
            raise ValueError(f"{task} has no classes: leave out --num-labels.")
        size, whose = (source.config.num_labels, "the model") if head is None else (head.size, "the data")
        if size != work.num_labels:
            raise ValueError(f"--num-labels {work.num_labels} contradicts {whose}, which has {size}: leave it out.")
    return head


def _processor(source: Source, task: str, work: Inputs) -> tuple[Any, int]:
    """Load the tokenizer, and say to how many tokens it cuts texts; or the image processor, and 0."""
    if task == "image-classification":
        processor, plain = processors.load_image_processor(source, work.tokenizer or None)
        if plain:
            size = source.config.image_size
            note(f"the model brings no image processor: images are resized to {size} x {size} and scaled to -1 ... 1")
        return processor, 0
    tokenizer = processors.load_tokenizer(source, work.tokenizer or None)
    if task == "masked-lm" and tokenizer.mask_token_id is None:
        raise ValueError("masked-lm needs a tokenizer with a mask token, and this one has none: choose another --task.")
    if task == "token-classification" and not tokenizer.is_fast:
        raise ValueError("token-classification needs a fast tokenizer, which says to which word a token belongs.")
    return tokenizer, processors.text_length(source.config, tokenizer, work.max_length)


def _config(model: nn.Module) -> Any:
    return (model.get_base_model() if hasattr(model, "peft_config") else model).config


def _set_pad_token(config: Any, tokenizer: Any) -> None:
    """Let a decoder that classifies know where a text ends, if its config does not say so."""
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = pad_token(tokenizer)


def _announce_head(fresh: list[str], seed: int) -> None:
    if fresh:
        note(
            f"the checkpoint lacks {', '.join(fresh[:3])}{f' and {len(fresh) - 3} more' if len(fresh) > 3 else ''}: "
            f"random weights of seed {seed}; the Fisher is that of an untrained head"
        )


def _announce_rows(passed_over: int, count: int, samples: int) -> None:
    if passed_over:
        note(f"{passed_over:,} rows passed over: nothing in them to learn from")
    if count < samples:
        note(f"the data has {count:,} example{'s' if count != 1 else ''}, fewer than the {samples:,} requested")


def _announce_unused_label(task: str, columns: Mapping[str, str], rows: Rows) -> None:
    if column := unused_label(task, columns, rows):
        note(
            f"task {task} comes from the model's config; the data has a column {column!r} that it does not use "
            f"(--task {task_of_labels(column, rows)} would)"
        )


def _described(work: Inputs, encoder: Encoder, rows: Rows, count: int, fresh: list[str]) -> dict[str, Any]:
    task, max_length = encoder.task, encoder.max_length
    return {
        "data": work.data,
        "split": rows.split,
        "rows": {"used": count, "of": rows.total, "seed": rows.seed},
        "columns": dict(encoder.columns),
        "task": task,
        **({"max_length": max_length} if max_length else {}),
        **({"hidden": f"15 % of the tokens, with seed {work.seed}, each by the mask"} if task == "masked-lm" else {}),
        **({"random weights": fresh} if fresh else {}),
    }
