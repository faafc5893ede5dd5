"""From options to a model and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.commands.options import Workload
from fishkern.commands.output import note, waiting
from fishkern.integrations import data, hub, models, processors
from fishkern.integrations.examples import (
    CANDIDATES,
    Encoder,
    Example,
    choose_columns,
    pad_token,
    read_head,
    task_of_labels,
    unused_label,
)
from fishkern.statistics import CausalLM, Likelihood, MaskedLM, Seq2SeqLM, TokenClassification

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
BATCH_SIZE = {"cpu": 8}  # a guess, halved while memory does not suffice
BATCH_SIZE_ELSEWHERE = 32

Result = TypeVar("Result")

_OF_TOKENS: dict[str, type[Likelihood]] = {
    "causal-lm": CausalLM,
    "masked-lm": MaskedLM,
    "seq2seq-lm": Seq2SeqLM,
    "token-classification": TokenClassification,
}
"""The tasks in which an example has several labels, and the likelihood of each."""


@dataclass(frozen=True)
class Prepared:
    """A model, and examples of its task.

    Attributes:
        model: On its device.
        encoder: Makes batches of the examples.
        examples: Longest first, so that memory is asked for at the start.
        described: What was done to get here, as plain values: it goes into the provenance.
    """

    model: nn.Module
    encoder: Encoder
    examples: list[Example]
    described: dict[str, Any]

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Make padded batches.

        Args:
            size: Examples in each.

        Returns:
            What the model takes.
        """
        starts = range(0, len(self.examples), size)
        return [self.encoder.collate(self.examples[start : start + size]) for start in starts]


def prepare(work: Workload, samples: int) -> Prepared:
    """Open the data, load the model, make examples.

    Args:
        work: The options.
        samples: How many examples.

    Returns:
        All that an estimate needs.

    Raises:
        ValueError: An option, a column, a label or a text does not fit; the message says which.
        OSError: Something is neither here nor to be had.
    """
    if work.dtype not in DTYPES:
        raise ValueError(f"--dtype is one of {', '.join(DTYPES)}, got {work.dtype!r}.")
    if work.task and work.task not in models.TASKS:
        raise ValueError(f"--task is one of {', '.join(models.TASKS)}, got {work.task!r}.")
    device = checked_device(work.device or ("cuda" if torch.cuda.is_available() else "cpu"), "--device")
    with waiting("reading data") as now, hub.quiet(downloads=False) as warned:
        rows = data.read(work.data, name=work.subset or None, split=work.split, first=work.first, seed=work.seed)
        now("loading model")
        source = models.find(work.model, work.base or None)
        task = work.task or source.task
        if task is None:
            raise ValueError(
                f"{work.model} does not say what it is trained for: give --task, one of {', '.join(models.TASKS)}."
            )
        if task == "image-classification" and work.max_length is not None:
            raise ValueError(f"{task} reads no text: leave out --max-length.")
        columns = choose_columns(task, rows, {role: getattr(work, role) or None for role in CANDIDATES})
        models.check_task(source, task)
        head = None if models.task_of(source.config) == task else read_head(rows, columns, work.num_labels)
        if work.num_labels is not None:
            _check_num_labels(work.num_labels, task, columns, head, source.config)
        processor, max_length = _processor(source, task, work)
        model, fresh = models.load(source, task, head=head, dtype=work.dtype, device=device, seed=work.seed)
        config = _config(model)
        encoder = Encoder(task, columns, processor, config, max_length, work.seed)
        if task == "sequence-classification":
            _set_pad_token(config, processor)
        now("making examples")
        examples = list(encoder.examples(rows, samples))
    for text in warned:
        note(text)
    if not examples:
        raise ValueError(f"{work.data} has no row with something to learn from ({encoder.passed_over:,} were read).")
    _announce(work, encoder, fresh, len(examples), samples)
    if not work.task and source.adapter is None and (column := unused_label(task, columns, rows)):
        other = task_of_labels(column, rows)
        note(
            f"task {task} comes from the model's config; the data has a column {column!r} that it does not use "
            f"(--task {other} would)"
        )
    examples.sort(key=lambda example: -len(example.get("input_ids", ())))
    described = {
        "data": work.data,
        "split": rows.split,
        "rows": {"used": len(examples), "of": rows.total, "seed": rows.seed},
        "columns": dict(columns),
        "task": task,
        **({"max_length": max_length} if max_length else {}),
        **({"hidden": f"15 % of the tokens, with seed {work.seed}, each by the mask"} if task == "masked-lm" else {}),
        **({"random weights": fresh} if fresh else {}),
    }
    return Prepared(model, encoder, examples, described)


def likelihood_of(reduction: str, task: str) -> Likelihood | None:
    """Make of ``--reduction`` what ``likelihood=`` takes.

    Args:
        reduction: ``"mean"`` or ``"sum"``.
        task: What the model is trained for, or ``""`` where that is not known yet.

    Returns:
        The likelihood, or ``None`` for the model's own loss.

    Raises:
        ValueError: ``reduction`` is neither, or makes no difference to this task.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"--reduction is mean or sum, got {reduction!r}.")
    if reduction == "mean" or not task:
        return None
    if task not in _OF_TOKENS:
        raise ValueError(f"an example of {task} has one label, and nothing to sum: leave out --reduction.")
    return _OF_TOKENS[task](reduction="sum")


def predicate(patterns: Sequence[str], model: nn.Module) -> Callable[[str, nn.Parameter], bool] | None:
    """Make of patterns what ``parameters=`` takes.

    Args:
        patterns: As a shell has them.
        model: Whose parameters they shall match.

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


def fitting(run: Callable[[int], Result], asked: int | None, device: torch.device, examples: int) -> Result:
    """Run with the largest batch that fits: a guess, halved while memory does not suffice.

    Args:
        run: Gets the batch size.
        asked: The user's batch size: no other is tried.
        device: Where the model lies.
        examples: How many there are.

    Returns:
        What ``run`` returns.

    Raises:
        MemoryError: Not even one example fits, or not the batch that was asked for.
    """  # noqa: DOC501 - what is raised again is not its own
    size = asked or min(BATCH_SIZE.get(device.type, BATCH_SIZE_ELSEWHERE), examples)
    while True:
        try:
            return run(size)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if asked or size == 1:
                advice = "choose a smaller --batch-size, or leave it out" if size > 1 else (
                    "choose a smaller --max-length, --dtype bfloat16, or fewer --parameters"
                )  # fmt: skip
                raise MemoryError(f"out of memory on {device} at a batch size of {size}: {advice}.") from None
        size //= 2
        if device.type == "cuda":
            torch.cuda.empty_cache()
        note(f"out of memory: trying again with a batch size of {size}")


def _check_num_labels(asked: int, task: str, columns: Mapping[str, str], head: models.Head | None, config: Any) -> None:
    """Refuse a number that nothing would come of."""
    if "label" not in columns:
        raise ValueError(f"{task} has no classes: leave out --num-labels.")
    there, who = (config.num_labels, "the model") if head is None else (head.size, "the data")
    if there != asked:
        raise ValueError(f"--num-labels {asked} is against {who}, which has {there}: leave it out.")


def checked_device(name: str, option: str) -> str:
    """Find out before the weights are read whether torch has such a device.

    Args:
        name: Such as ``"cuda:1"``.
        option: Which says so.

    Returns:
        The name.

    Raises:
        ValueError: It has none.
    """
    if name == "meta":
        raise ValueError(f"{option} meta cannot be used: it holds no values.")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # what a torch without CUDA raises
        raise ValueError(f"{option} {name} cannot be used: {str(error).splitlines()[0]}") from None
    return name


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _processor(source: models.Source, task: str, work: Workload) -> tuple[Any, int]:
    if task == "image-classification":
        processor, made = processors.load_image_processor(source, work.tokenizer or None)
        if made:
            size = source.config.image_size
            note(f"the model brings no image processor: images are resized to {size} x {size} and scaled to -1 ... 1")
        return processor, 0
    tokenizer = processors.load_tokenizer(source, work.tokenizer or None)
    if task == "masked-lm" and tokenizer.mask_token_id is None:
        raise ValueError("masked-lm needs a tokenizer with a mask token, and this one has none: choose another --task.")
    if task == "token-classification" and not tokenizer.is_fast:
        raise ValueError("token-classification needs a fast tokenizer, which tells the words of its tokens.")
    return tokenizer, processors.text_length(source.config, tokenizer, work.max_length)


def _config(model: nn.Module) -> Any:
    return (model.get_base_model() if hasattr(model, "peft_config") else model).config


def _set_pad_token(config: Any, tokenizer: Any) -> None:
    """Tell a decoder that classifies where a text ends, where its config does not."""
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = pad_token(tokenizer)


def _announce(work: Workload, encoder: Encoder, fresh: list[str], found: int, samples: int) -> None:
    if fresh:
        note(
            f"the checkpoint lacks {', '.join(fresh[:3])}{f' and {len(fresh) - 3} more' if len(fresh) > 3 else ''}: "
            f"random weights of seed {work.seed}; the Fisher is that of an untrained head"
        )
    if encoder.passed_over:
        note(f"{encoder.passed_over:,} rows passed over: nothing in them to learn from")
    if found < samples:
        note(f"the data has {found:,} examples, fewer than the {samples:,} asked for")
