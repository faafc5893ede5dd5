"""What a plan says: the bytes of a pass, its passes over the data, the path of each parameter, and parts by memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from fishkern.arguments import byte_count
from fishkern.statistics.coverage import ONLY_A_RUN
from fishkern.statistics.ranks_plan import RanksPlan


@dataclass(frozen=True, eq=False)
class PassPlan:
    """What a pass will take on one device. ``print(plan)`` shows it as a table.

    Args:
        model: Class of the model.
        estimator: Class of the estimator.
        weight_bytes: Bytes of the model's parameters and buffers; shared ones count once.
        accumulator_bytes: Bytes of the estimator's sums in one pass.
        basis_bytes: Bytes of its constants, such as the bases of the layers of one pass.
        activation_bytes: The most bytes beside these while a batch runs: what autograd and the capture keep of a
            forward pass, temporaries, and what a :class:`fishkern.DiagonalFisher` in one pass follows for its precision
            (52 bytes for each of at most 2^18 entries). ``None`` without a batch.
        phases: The most bytes above the loaded model in each part of a pass, by name, in order.
        paths: The path that computes each parameter, by canonical name: ``"fused"``, ``"sketch"``, ``"batch"``, or
            ``"only a run can tell"``.
        passes: Number of passes over the data.
        flops: FLOPs of matrix products, convolutions and attention for one batch: ``"pass"``, and of these
            ``"estimator"``, its own operations; and ``"set-up"``, once.
        examples: ``N`` of the batch; 0 without one.
        unknown: What only a run can tell, in words.
        state_bytes: Bytes that each parameter's sums and constants take beside the model, by canonical name.
        beside_bytes: The most bytes beside those of all states of a pass, at any moment.
        traffic_bytes: What a backward pass moves because of where the sums are: ``"device"`` 0; ``"cpu"``, the sums of
            it to the CPU; ``"file"``, the accumulators read and written.
        per_rank: The same on each of several ranks; ``None`` if none were asked for.
        logits: How logits above the limit of the likelihood are computed (:class:`fishkern.CausalLM`), in words; empty
            if they are below it, or there is no limit.
    """

    model: str
    estimator: str
    weight_bytes: int
    accumulator_bytes: int
    basis_bytes: int
    activation_bytes: int | None
    phases: Mapping[str, int]
    paths: Mapping[str, str]
    passes: int
    flops: Mapping[str, int]
    examples: int
    unknown: tuple[str, ...]
    state_bytes: Mapping[str, int]
    beside_bytes: int
    traffic_bytes: Mapping[str, int]
    per_rank: RanksPlan | None = None
    logits: str = ""

    @property
    def peak_bytes(self) -> int:
        """The most bytes above the loaded model, over all parts of the pass."""
        return max(self.phases.values())

    @property
    def total_bytes(self) -> int:
        """The most bytes, those of the model included."""
        return self.weight_bytes + self.peak_bytes

    def parts(self, memory: str | int) -> list[list[str]]:
        """Divide the parameters into parts, each of which takes a pass over the data within some memory.

        A part has neighbouring parameters, as many as fit beside the most that a pass over all parameters takes besides
        its sums: a part takes no more, and mostly less. The results of earlier parts are not counted. Put them
        elsewhere by ``results_on=``, or save each.

        Args:
            memory: The most bytes above the loaded model, also as ``"8GB"`` or ``"500MiB"``.

        Returns:
            Canonical names, in the model's order: ``parts=`` of :func:`fishkern.estimate`, or ``parameters=`` of one
            call each, whose results :func:`fishkern.union` joins.

        Raises:
            ValueError: ``memory`` is no size or too little for one of the parameters, or the plan has no batch.
        """
        size = byte_count(memory, "memory")
        if self.activation_bytes is None:
            raise ValueError("how much memory is left for the sums depends on the batch: plan with one.")
        groups: list[list[str]] = []
        room = 0
        for name, own in self.state_bytes.items():
            if own > size - self.beside_bytes:
                raise ValueError(
                    f"memory={memory!r} is not enough for {name}: its sums take {bytes_in_words(own)}, and a batch of "
                    f"{self.examples} up to {bytes_in_words(self.beside_bytes)} beside any sums. Give at least "
                    f"{bytes_in_words(self.beside_bytes + max(self.state_bytes.values()))} above the model, plan "
                    "a smaller batch, or give check=False, where the comparison with autograd is what takes the most."
                )
            if not groups or own > room:
                groups.append([])
                room = size - self.beside_bytes
            groups[-1].append(name)
            room -= own
        return groups

    def __str__(self) -> str:
        longest = max(self.phases, key=self.phases.__getitem__)
        batch = f"beside these, for a batch of {self.examples}" if self.examples else "unknown without a batch"
        rows = [
            ("weights", self.weight_bytes, "parameters and buffers"),
            ("accumulators", self.accumulator_bytes, "the sums of the estimator"),
            ("bases", self.basis_bytes, "what it keeps of the weights"),
            ("activations", self.activation_bytes, batch),
            ("peak", self.peak_bytes, f"above the weights ({longest})"),
            ("total", self.total_bytes, "weights and peak"),
        ]
        lines = [f"{self.estimator} of {self.model}: {self.passes} pass{'es' * (self.passes > 1)} over the data"]
        lines += [f"  {name:<13}{bytes_in_words(size):>10}  {what}" for name, size, what in rows]
        counts = Counter(self.paths.values())
        lines += ["paths: " + ", ".join(f"{path} {count}" for path, count in counts.items())]
        if self.examples:
            whole, own = self.flops["pass"], self.flops["estimator"]
            lines += [f"FLOPs of a batch: {whole:.2e}, of which {own:.2e} by the estimator"]
        lines += [f"logits: {self.logits}"] if self.logits else []
        lines += [
            f"sums elsewhere: {bytes_in_words(self.traffic_bytes['cpu'])} to the CPU, or "
            f"{bytes_in_words(self.traffic_bytes['file'])} read and written in files, for each backward pass"
        ]
        if (own := self.per_rank) is not None:
            lines += [
                f"each of {own.ranks} ranks (FSDP2): {bytes_in_words(own.weight_bytes)} of weights, "
                f"{bytes_in_words(own.accumulator_bytes)} of accumulators, up to {bytes_in_words(own.block_bytes)} of "
                f"squares before they are reduced, {bytes_in_words(own.unit_bytes)} of gathered weights: up to "
                f"{bytes_in_words(own.peak_bytes)} above its shards",
                f"and receives {bytes_in_words(own.reduced_bytes)} of squares for each backward pass, "
                f"{bytes_in_words(own.gathered_bytes)} of weights for each batch",
            ]
        return "\n".join([*lines, f"{ONLY_A_RUN}:", *(f"  - {one}" for one in self.unknown)])


def bytes_in_words(size: int | None) -> str:
    """Write a number of bytes in the unit that fits.

    Args:
        size: Bytes; ``None`` where they are not known.

    Returns:
        Such as ``"12 B"`` or ``"3.5 MiB"``; ``"-"`` for ``None``.
    """
    if size is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
