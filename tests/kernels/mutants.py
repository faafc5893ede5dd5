"""Plants errors in the kernels and says which of them the ordinary tests find.

``python -m tests.kernels.mutants`` prints one line for each and ends with 1 if one survives; names of operations or of
errors choose some. Each runs the operation's tests on a copy of the sources, in the interpreter or on the device,
whichever is there. What only makes a kernel slower, such as a bad sample of top-k, is no error and not planted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEVICE, LAUNCHER = "kernels/_sum_grad_squared_device.py", "kernels/sum_grad_squared.py"
EXPERTS, EXPERTS_DEVICE = "kernels/expert_sum_grad_squared.py", "kernels/_expert_sum_grad_squared_device.py"
CHUNKS = "kernels/_chunks.py"
GRAMS = "kernels/_group_by_grams.py"
GROUP, GROUP_DEVICE = "kernels/group_sum_grad_squared.py", "kernels/_group_sum_grad_squared_device.py"
PROJECT, PROJECT_DEVICE = "kernels/project_sum_squared.py", "kernels/_project_sum_squared_device.py"
PROJECT_CONFIGS = "kernels/_project_sum_squared_configs.py"
TOPK, TOPK_DEVICE = "kernels/streaming_topk.py", "kernels/_streaming_topk_device.py"
HISTOGRAM = "kernels/log_histogram.py"
SCALE = "kernels/scale_sum_grad_squared.py"
ADAMW, SGD = "kernels/masked_adamw.py", "kernels/masked_sgd.py"
ENTRIES, PROBLEM = "kernels/_entries.py", "kernels/_problem.py"

# The tests of each operation, and which of them meet its kernel.
TESTS = {
    "sum_grad_squared": (
        ["tests/kernels/test_sum_grad_squared.py", "tests/ops/test_sum_grad_squared.py"],
        "not torch and not memory",
    ),
    "expert_sum_grad_squared": (
        ["tests/kernels/test_expert_sum_grad_squared.py", "tests/ops/test_expert_sum_grad_squared.py"],
        "not torch and not reference",
    ),
    "group_sum_grad_squared": (
        ["tests/kernels/test_group_sum_grad_squared.py", "tests/ops/test_group_sum_grad_squared.py"],
        "not torch and not reference and not memory",
    ),
    "project_sum_squared": (
        ["tests/kernels/test_project_sum_squared.py", "tests/ops/test_project_sum_squared.py"],
        "not torch and not reference and not memory",
    ),
    "streaming_topk": (
        ["tests/kernels/test_streaming_topk.py", "tests/ops/test_streaming_topk.py"],
        "triton or test_kernel",
    ),
    "log_histogram": (["tests/ops/test_log_histogram.py"], "triton"),
    "scale_sum_grad_squared": (["tests/ops/test_scale_sum_grad_squared.py"], "triton and not invariance"),
    "masked_adamw": (["tests/ops/test_masked_adamw.py"], "not torch"),
    "masked_sgd": (["tests/ops/test_masked_sgd.py"], "not torch"),
}

# What goes wrong -> the file, its text, and the text that is planted instead.
Planted = dict[str, tuple[str, str, str]]
SUM_GRAD_SQUARED: Planted = {
    "squared before the sum over positions": (DEVICE, "last = remaining <= BLOCK_T\n", "last = remaining > 0\n"),
    "last chunk skipped": (DEVICE, "* tl.cdiv(T, BLOCK_T)\n", "* (T // BLOCK_T)\n"),
    "mask of positions one too long": (DEVICE, "(offs_t < remaining)", "(offs_t <= remaining)"),
    "mask of columns forgotten": (DEVICE, "& (offs_i < I)\n        first", "\n        first"),
    "addresses of examples in int32": (DEVICE, "source + example.to(tl.int64)", "source + example"),
    "addresses of columns in int32": (DEVICE, "offs_c.to(tl.int64) * stride_c", "offs_c * stride_c"),
    "gradient not reset after an example": (
        DEVICE,
        "                grad = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)\n            # Known",
        "            # Known",
    ),
    "last part of a split dropped": (LAUNCHER, '"parts": len(parts),', '"parts": len(parts) - 1,'),
    "examples between parts lost": (DEVICE, "(part.to(tl.int64) * N // parts)", "(part.to(tl.int64) * (N // parts))"),
    "out overwritten": (LAUNCHER, "add = out is not None", "add = False"),
    "out not initialised": (LAUNCHER, '"ADD": problem.add and parts == 1', '"ADD": parts == 1'),
    "mean gradient of the last example": (
        DEVICE,
        "mean += grad\n                grad",
        "mean = grad\n                grad",
    ),
    "packed chunks one behind": (
        DEVICE,
        "                chunk += 1\n                t = tl.load",
        "                t = tl.load",
    ),
    "strides of activations ignored": (
        PROBLEM,
        'stride_arguments("x", "nti", problem.x, tma=tma)',
        'stride_arguments("x", "nti", problem.x._replace(strides=(*problem.x.strides[:-1], 1)), tma=tma)',
    ),
    "one chunk: always the first example": (DEVICE, "            n += 1\n", ""),
    "one chunk: mean gradient of the last": (DEVICE, "mean += product", "mean = product"),
    "one chunk, also where there are more": (PROBLEM, "self.T <= BLOCK_T and", "self.T <= 2 * BLOCK_T and"),
    "odd widths: a copy of zeros": (LAUNCHER, "[..., :columns].copy_(tensor)", "[..., :columns].zero_()"),
    "odd widths: rows that are no longer": (LAUNCHER, "cdiv(columns, unit) * unit)", "columns)"),
    "few positions: the second forgotten": (DEVICE, "tl.static_range(T)", "tl.static_range(1)"),
}
EXPERT_SUM_GRAD_SQUARED: Planted = {
    "all experts the first": (EXPERTS_DEVICE, "e = tl.program_id(1)", "e = tl.program_id(1) * 0"),
    "chunks of the next expert": (
        EXPERTS_DEVICE, "cuts, row, column, e, N", "cuts, row, column, (e + 1) % parts, N"
    ),
    "results of the experts over each other": (
        EXPERTS_DEVICE, "out, total, e, row,", "out, total, e * 0, row,"
    ),
    "experts of one chunk skipped": (
        EXPERTS_DEVICE, "tl.load(cuts + e) == tl.load(cuts + e + 1)", "tl.load(cuts + e) >= tl.load(cuts + e + 1) - 1"
    ),
    "groups of the expert before": (
        CHUNKS,
        "searchsorted(expert.to(offsets).long(), numbers)",
        "searchsorted(expert.to(offsets).long(), numbers - 1)",
    ),
    "an expert's first group lost": (
        CHUNKS,
        "searchsorted(expert.to(offsets).long(), numbers)]",
        "searchsorted(expert.to(offsets).long(), numbers, right=True)]",
    ),
    "stride of the experts ignored": (
        EXPERTS,
        'stride_arguments("o", "poi", out, tma',
        'stride_arguments("o", "poi", out._replace(strides=(out.shape[1] * out.shape[2], *out.strides[1:])), tma',
    ),
    "results overwritten": (EXPERTS, '"ADD": problem.add', '"ADD": False'),
    "results not initialised": (EXPERTS, "add = out is not None", "add = True"),
    "sides exchanged, but not the result's": (EXPERTS, "out=self.out.mT)", "out=self.out.mT.contiguous())"),
}  # fmt: skip
GROUP_SUM_GRAD_SQUARED: Planted = {
    "rows of a tile summed for columns": (
        GROUP_DEVICE,
        "sums = tl.sum(total, 0)\n    tl.store",
        "sums = tl.sum(total, 1)\n    tl.store",
    ),
    "all tiles write one line": (
        GROUP_DEVICE,
        "part * tl.cdiv(I, BLOCK_I) + column // BLOCK_I",
        "part * tl.cdiv(I, BLOCK_I)",
    ),
    "all parts write the first part's lines": (GROUP_DEVICE, "part * tl.cdiv(O, BLOCK_O) + row", "part * 0 + row"),
    "mask of groups forgotten": (GROUP_DEVICE, "sums, mask=offs < groups)", "sums)"),
    "lines after the first block skipped": (
        GROUP_DEVICE,
        "range(0, lines, BLOCK_LINES)",
        "range(0, BLOCK_LINES, BLOCK_LINES)",
    ),
    "lines after the last added": (GROUP_DEVICE, "(offs_l < lines - first)", "(offs_l <= lines - first)"),
    "groups not told apart by the programs": (
        GROUP_DEVICE,
        "tl.program_id(0) * BLOCK_GROUPS +",
        "tl.program_id(0) * 0 +",
    ),
    "stride of the sums ignored": (GROUP_DEVICE, "offs_g.to(tl.int64) * stride_out", "offs_g.to(tl.int64)"),
    "sums overwritten": (GROUP, "_sum_lines(sums, out, add=operands.add)", "_sum_lines(sums, out, add=False)"),
    "swapped sides, the same groups": (GROUP, "rows=not self.rows", "rows=self.rows"),
    "rows of the whole tensor added to memory as it was": (
        GROUP,
        "_sum_lines(sums, of_groups, add=False)",
        "_sum_lines(sums, of_groups, add=True)",
    ),
    "padding of short examples multiplied": (GROUP_DEVICE, "used[:, None] & used[None, :]", "used[:, None] | True"),
    "short examples: sums below zero": (GROUP_DEVICE, "tl.where(sums < 0, 0.0, sums)", "sums"),
    "short examples: always the first": (GROUP_DEVICE, "        n += 1\n", "        n += 0\n"),
    "short examples: Gram matrices over each other": (
        GROUP_DEVICE,
        "grams + n.to(tl.int64) * BLOCK_T * BLOCK_T + offs[:, None]",
        "grams + n.to(tl.int64) * BLOCK_T + offs[:, None]",
    ),
    "short examples: parts over each other": (GROUP_DEVICE, "part.to(tl.int64) * groups + offs, total", "offs, total"),
    "short examples: features after the first block": (
        GROUP_DEVICE,
        "range(0, F, BLOCK_F)",
        "range(0, BLOCK_F, BLOCK_F)",
    ),
    "short examples: strides of the groups": (GRAMS, "**_strides(grouped)", "**_strides(grouped.contiguous())"),
}
PROJECT_SUM_SQUARED: Planted = {
    "squared before the sum over chunks": (
        PROJECT,
        "cdiv(N * chunks, beside), chunks == 1",
        "cdiv(N * chunks, beside), True",
    ),
    "sums of the chunks not squared": (PROJECT_DEVICE, "total += joint * joint", "total += joint"),
    "chunks of a tile mixed": (
        PROJECT_DEVICE,
        "(CHUNKS, BLOCK_T, BLOCK_K)), 1)",
        "(BLOCK_T, CHUNKS, BLOCK_K)), 0)",
    ),
    "activations that do not count": (PROJECT_DEVICE, "h = tl.where(counts, h, 0.0)", "h = h * 1.0"),
    "gradients that do not count": (PROJECT_DEVICE, "d = tl.where(counts, d, 0.0)", "d = d * 1.0"),
    "axes of the mask exchanged": (
        PROJECT,
        '"counted": ("stride_cn", "stride_ct")',
        '"counted": ("stride_ct", "stride_cn")',
    ),
    "mask of positions one too long": (PROJECT_DEVICE, "(t < T))[:, None]", "(t <= T))[:, None]"),
    "last features skipped": (PROJECT_DEVICE, "PIECES * tl.cdiv(F, BLOCK_F)", "PIECES * (F // BLOCK_F)"),
    "pieces after the first forgotten": (PROJECT_DEVICE, "range(PIECES * tl.cdiv", "range(tl.cdiv"),
    "pieces that are all the same": (PROJECT, "rest = rest.float() - piece", "rest = rest.float()"),
    "addresses of examples in int32": (PROJECT_DEVICE, "rows = n.to(tl.int64) * stride_n", "rows = n * stride_n"),
    "addresses of positions in int32": (PROJECT_DEVICE, "+ t.to(tl.int64) * stride_t", "+ t * stride_t"),
    "addresses of features in int32": (PROJECT_DEVICE, "offs_r.to(tl.int64) * stride_r", "offs_r * stride_r"),
    "addresses of directions in int32": (PROJECT_DEVICE, "+ offs_c.to(tl.int64) * stride_c)", "+ offs_c * stride_c)"),
    "all tiles write the squares of the first": (
        PROJECT_DEVICE,
        "squares + tile.to(tl.int64) * 2 * K",
        "squares + tile.to(tl.int64) * 0 * K",
    ),
    "both rows of squares the first": (PROJECT_DEVICE, "* 2 + row) * K", "* 2 + row * 0) * K"),
    "mask of the result forgotten": (PROJECT_DEVICE, "sums, mask=offs_k < K)", "sums)"),
    "positions joined that have gaps": (PROJECT_CONFIGS, "stride_n != T * stride_t", "stride_n < T * stride_t"),
    "all sets of directions into the first": (PROJECT, "u=u, out=part)", "u=u, out=out[:, : part.shape[1]])"),
    "rounded without permission": (PROJECT_CONFIGS, "if problem.allow_tf32 and", "if"),
    "transposed directions taken as they are": (PROJECT, '"TRANSPOSED_U": "u" in turned', '"TRANSPOSED_U": False'),
}
STREAMING_TOPK: Planted = {
    "wide loads at any address": (TOPK, "aligned = all(address % 16 == 0 for address in rows[1])", "aligned = True"),
    "one tie too few": (TOPK_DEVICE, "(tl.cumsum(equal, 0) <= quota)", "(tl.cumsum(equal, 0) < quota)"),
    "ties of an earlier chunk not counted": (TOPK, "clamp_(min=0).minimum(ties)", "clamp_(min=take).minimum(ties)"),
    "ties selected, but not counted": (TOPK, "            counts += quotas\n", ""),
    "no room, and nobody asks": (TOPK, "found <= len(read.listed) and above", "above"),
    "of equal candidates the last": (
        TOPK,
        "slots[values == last].sort().values",
        "slots[values == last].sort(descending=True).values",
    ),
    "candidates selected, but not counted": (TOPK, "torch.ones_like(largest, dtype", "torch.zeros_like(largest, dtype"),
    "what does not exist at the lower end": (
        TOPK_DEVICE,
        ' + (tl.where(low == float("-inf"), missing, 0) << 16)',
        "",
    ),
    "words of one launch taken for those of another": (TOPK, "[0, *until], until, strict", "[0] * 9, until, strict"),
    "bits in the order of memory": (
        TOPK,
        "place // 4 % _WORDS, place // (4 * _WORDS) * 4 + place % 4",
        "place // 32, place % 32",
    ),
    "neighbours not told apart": (
        TOPK_DEVICE,
        "before[:, :, None] + tl.cumsum(ones, 2) - ones",
        "before[:, :, None] + ones - ones",
    ),
    "no margin around the sample": (TOPK, "+ _DEVIATIONS**2\n", "* 0\n"),
    "chunks of a second dtype over those of the first": (
        TOPK_DEVICE,
        "left, tl.load(table_ptr + 3 * num_tensors + low) + inside",
        "left, number",
    ),
    "scores after the end of a tensor": (TOPK_DEVICE, "mask=offs < left, other=none", "mask=offs <= left, other=none"),
    "NaN not refused": (TOPK, "if values.isnan().any():", "if False:"),
    "smallest not negated": (
        TOPK_DEVICE,
        "    values = values if LARGEST else -values  # what",
        "    values = values if LARGEST else values  # what",
    ),
    "indices of the second block from the first": (TOPK, "self.device) - firsts) * _CHUNK", "self.device)) * _CHUNK"),
}
LOG_HISTOGRAM: Planted = {
    "values after the end counted": (HISTOGRAM, "tl.where(exists, places, 0)", "places"),
    "only the first chunk of a program": (HISTOGRAM, "        first += step\n", "        first = size\n"),
    "upper edges in the bin below": (HISTOGRAM, "tl.where(bounds <= keys,", "tl.where(bounds < keys,"),
    "negative values below all": (HISTOGRAM, " & 0x7FFFFFFF", ""),
    "last bin open": (HISTOGRAM, "torch.where(last, logs > edges, logs >= edges)", "logs >= edges"),
    "what is below all edges in the first bin": (HISTOGRAM, "inside = (places > 0) &", "inside = (places >= 0) &"),
    "what is above all edges in a bin": (HISTOGRAM, "(places <= bins)", "(places <= bins + 1)"),
    "a table that is too short": (HISTOGRAM, "steps = (bins + 1).bit_length()", "steps = bins.bit_length()"),
    "strided values read as neighbours": (HISTOGRAM, "values.contiguous().view(-1)", "values.reshape(-1)"),
    "logarithm of the bare magnitude": (HISTOGRAM, ".double() + 1e-12)", ".double())"),
}
SCALE_SUM_GRAD_SQUARED: Planted = {
    "positions after the last": (SCALE, "exists = (offs < T) & (offs_d < D)", "exists = (offs <= T) & (offs_d < D)"),
    "only the first step of a program": (
        SCALE, "range(part * BLOCK_T, T, SLICES * BLOCK_T)", "range(part * BLOCK_T, SLICES * BLOCK_T, SLICES * BLOCK_T)"
    ),
    "parts that take the same positions": (SCALE, "range(part * BLOCK_T, T,", "range(part * 0, T,"),
    "parts over each other": (SCALE, "tl.program_id(0).to(tl.int64) * D + offs_d)", "n * SLICES * D + offs_d)"),
    "squared before the sum over parts": (
        SCALE,
        "grads = tl.sum(tl.load(ptrs, mask=exists, other=0.0), 1)\n        total += grads * grads",
        "grads = tl.load(ptrs, mask=exists, other=0.0)\n        total += tl.sum(grads * grads, 1)",
    ),
    "examples after the first block": (SCALE, "range(0, N, BLOCK_N)", "range(0, BLOCK_N, BLOCK_N)"),
    "mean not taken away": (SCALE, "(tl.sum(factors, 1) / D)[:, None]", "(tl.sum(factors, 1) * 0)[:, None]"),
    "mean taken away where nothing is": (
        SCALE, "factors = tl.where(exists, factors - (tl.sum(factors, 1) / D)[:, None], 0.0)",
        "factors = factors - (tl.sum(factors, 1) / D)[:, None]",
    ),
    "mean over the block": (SCALE, "(factors * factors, 1) / D + eps", "(factors * factors, 1) / BLOCK_D + eps"),
    "eps after the root": (
        SCALE, "tl.rsqrt(tl.sum(factors * factors, 1) / D + eps)[:, None]",
        "(1 / (tl.sqrt(tl.sum(factors * factors, 1) / D) + eps))[:, None]",
    ),
    "infinite where no position is": (SCALE, "tl.where(exists, terms * factors, 0.0)", "terms * factors"),
    "factors not rounded": (SCALE, "factors.to(ROUNDED_TO).to(tl.float32)", "factors.to(tl.float32)"),
    "strides of the inputs taken for those of the gradients": (
        SCALE, "x + (offs * stride_xt + columns * stride_xd)", "x + (offs * stride_gt + columns * stride_gd)"
    ),
    "stride of the result ignored": (SCALE, "out + offs_d.to(tl.int64) * stride_out", "out + offs_d.to(tl.int64)"),
    "columns after the first block": (SCALE, "tl.program_id(1) * BLOCK_D + tl", "tl.program_id(1) * 0 + tl"),
    "out overwritten": (SCALE, "add = out is not None", "add = False"),
}  # fmt: skip
MASKED_ADAMW: Planted = {
    "second moment corrected by the first's beta": (ADAMW, "exp(age * log_beta2)", "exp(age * log_beta1)"),
    "corrections by a difference": (ADAMW, "tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))", "1.0 - tl.exp(x)"),
    "corrections by half a series": (ADAMW, "tl.static_range(7)", "tl.static_range(6)"),
    "decay without the learning rate": (ADAMW, "(1.0 - lr * weight_decay)", "(1.0 - weight_decay)"),
    "age of entries that came later": (ADAMW, "age = age - tl.load(starts_ptr", "age = age - 0 * tl.load(starts_ptr"),
    "masters overwrite restored weights": (ENTRIES, "tl.where(own, master, weight)", "tl.where(own, master, master)"),
    "restored -0 taken for the master's 0": (
        ENTRIES, "rounded.to(tl.int32, bitcast=True) == weight.to(tl.int32, bitcast=True)", "rounded == weight"
    ),
    "master weights not kept": (ENTRIES, "tl.store(master_ptr + offs, weight, mask=mask)", "pass"),
    "scale of the gradients forgotten": (ENTRIES, "grad = grad * tl.load(scale_ptr)", "grad = grad * 1.0"),
    "state of the first parameter for all": (ENTRIES, "tl.load(row + FIRST_ENTRY) + offs, params", "offs, params"),
    "gathered gradients read as whole ones": (
        ENTRIES, "if tl.load(row + IS_GATHERED) != 0:", "if tl.load(row + IS_GATHERED) > 1:"
    ),
    "blocks after a parameter's first": (
        ENTRIES, "(block - tl.load(row + FIRST_BLOCK)) * BLOCK", "(block * 0) * BLOCK"
    ),
}  # fmt: skip
MASKED_SGD: Planted = {
    "first momentum damped": (SGD, "tl.where(age == 1.0, grad,", "tl.where(age == 0.0, grad,"),
    "Nesterov without momentum": (SGD, "grad += momentum * buffer", "grad += buffer"),
    "decay forgotten": (SGD, "grad += weight_decay * weight", "grad += 0.0 * weight"),
    "maximize ignored": (ENTRIES, "        grad = -grad\n", "        grad = grad\n"),
    "age of entries that came later, in SGD": (
        SGD, "age = age - tl.load(starts_ptr", "age = age - 0 * tl.load(starts_ptr"
    ),
}  # fmt: skip
MUTANTS: dict[str, Planted] = {
    "sum_grad_squared": SUM_GRAD_SQUARED,
    "expert_sum_grad_squared": EXPERT_SUM_GRAD_SQUARED,
    "group_sum_grad_squared": GROUP_SUM_GRAD_SQUARED,
    "project_sum_squared": PROJECT_SUM_SQUARED,
    "streaming_topk": STREAMING_TOPK,
    "log_histogram": LOG_HISTOGRAM,
    "scale_sum_grad_squared": SCALE_SUM_GRAD_SQUARED,
    "masked_adamw": MASKED_ADAMW,
    "masked_sgd": MASKED_SGD,
}


def survivors(names: list[str]) -> list[str]:
    """Run the tests on each mutant.

    Args:
        names: Operations or mutants, those of :data:`MUTANTS`.

    Returns:
        Those that no test found.
    """
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("fishkern", "kernels", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for operation, mutants in MUTANTS.items():
            requested = {name: mutant for name, mutant in mutants.items() if operation in names or name in names}
            if requested and (failure := _failure(copy, operation)):
                raise RuntimeError(f"the tests fail without a mutant, repair that first:\n{failure}")
            for name, (file, right, wrong) in requested.items():
                source = (copy / file).read_text()
                if source.count(right) != 1:
                    raise RuntimeError(
                        f"{name}: {right!r} is {source.count(right)} times in {file}, not once: adapt the mutant"
                    )
                (copy / file).write_text(source.replace(right, wrong))
                failure = _failure(copy, operation)
                (copy / file).write_text(source)
                print(f"{'killed' if failure else 'SURVIVED'}  {operation}: {name}", flush=True)
                alive += [] if failure else [name]
    return alive


def _failure(copy: Path, operation: str) -> str | None:
    tests, expression = TESTS[operation]
    options = ["-q", "-x", "-p", "no:cacheprovider", "--every-case", *tests, "-k", expression]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    return f"{done.stdout[-3000:]}\n{done.stderr[-1000:]}" if done.returncode else None


if __name__ == "__main__":
    sys.exit(bool(survivors(sys.argv[1:] or list(MUTANTS))))
