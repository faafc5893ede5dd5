"""The subcommands of ``fishkern``, one file each."""

from __future__ import annotations

from collections.abc import Callable

from fishkern.commands.demo import demo
from fishkern.commands.doctor import doctor
from fishkern.commands.estimate import estimate
from fishkern.commands.export import export
from fishkern.commands.init import init
from fishkern.commands.merge import merge
from fishkern.commands.plan import plan
from fishkern.commands.ranks import ranks
from fishkern.commands.select import select
from fishkern.commands.show import show
from fishkern.commands.tune import tune
from fishkern.commands.verify import verify

COMMANDS: dict[Callable[..., int | None], str] = {
    estimate: "fishkern estimate Qwen/Qwen3-0.6B --data corpus.jsonl --text body --out fisher.safetensors",
    plan: "fishkern plan meta-llama/Llama-3.1-8B --batch-size 1 --memory 16GB --ranks 8",
    verify: "fishkern verify ./my-adapter --data ./squad --samples 32 --json report.json",
    select: "fishkern select fisher.safetensors --density 0.005 --rule global --out selection.safetensors",
    show: "fishkern show fisher.safetensors --plot fisher.png\n"
    "fishkern show tuned/freezer.safetensors --plot freezer.png\n"
    "fishkern show tuned/token_reduction.json --model ./my-vit --image cat.png --plot kept.png",
    ranks: "fishkern ranks Qwen/Qwen3-0.6B --data corpus.jsonl --average 16 --out ranks.json",
    init: "fishkern init Qwen/Qwen3-0.6B --data corpus.jsonl --method filet --rank 32 --out adapter",
    tune: "fishkern tune bert-base-cased --data ./cola --task sequence-classification --eval-split validation\n"
    "fishkern tune bert-base-cased --data ./cola --task sequence-classification --method fisher-adaptune\n"
    "fishkern tune google/vit-base-patch16-224-in21k --data ./flowers --method tr-pts --eval-split validation",
    merge: "fishkern merge ./of-law ./of-medicine --fisher law.safetensors --fisher medicine.safetensors --out both",
    export: "fishkern export ./my-adapter --out merged\n"
    "fishkern export ./my-model --delta tuned/delta.safetensors --out merged\n"
    "fishkern export ./trained --since ./my-model --out delta.safetensors",
    doctor: "fishkern doctor",
    demo: "fishkern demo --seconds 10",
}
"""Each subcommand, and examples of it, a line each. Its parameters are the options, its result is the exit status."""

__all__ = ["COMMANDS"]
