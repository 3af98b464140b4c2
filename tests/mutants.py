"""Break the code in one place, see a test go red, and again for the next place: `make mutants`.

A test that has never failed proves nothing. Each mutant of tests/mutant_table.py is put into a copy of the tree and the
tests named beside it are run there. One that survives is an error: a test is missing. The table in docs/testing.md is
written anew from what was found.

    python -m tests.mutants                                           all of them, in a few minutes
    python -m tests.mutants --only "sign of v" "fsync" --jobs 2

Importing torch and diffusers takes longer than most of these tests, so it is done once, and every run of pytest is a
fork of this process (Linux and macOS). Nothing of the project itself is imported before the fork.
"""

import dataclasses
import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import tyro

from tests.mutant_table import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- mutants: written by `make mutants` -->", "<!-- end of the mutants -->"
LEFT_OUT = (".git", ".venv", ".cache", ".*_cache", "__pycache__", "demo", "output", "samples", "gen_ai_custom_dataset")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Python would take a mutant of the same length and the same second for the file before it.
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # none is needed
}
HEAVY = ("torchvision", "transformers.models.clip", "diffusers.pipelines.stable_diffusion", "peft", "pandas")
FORK = multiprocessing.get_context("fork")
SECONDS = 600  # for one mutant


@dataclasses.dataclass(frozen=True)
class Options:
    """Break the code on purpose and see that a test notices.

    Attributes:
        only: names of mutants; all of them if none is given.
        jobs: how many to try at a time.
    """

    only: tuple[str, ...] = ()
    jobs: int = 1


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a mutant: the test that failed, "file::name"; or None, and why there is none."""

    caught_by: str | None
    why: str
    seconds: float


def copy_of(tree: Path, to: Path) -> Path:
    """Copy the sources, without what a run leaves behind."""
    return shutil.copytree(tree, to, ignore=shutil.ignore_patterns(*LEFT_OUT))


def run_tests(tree: Path, tests: tuple[str, ...]) -> tuple[int | None, str]:
    """Run tests in a tree up to the first failure: pytest's exit code, None if it hung, and what it printed."""
    log = tree / "pytest.log"
    process = FORK.Process(target=_pytest, args=(tree, tests, log))
    process.start()
    process.join(SECONDS)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code, log.read_text()


def _pytest(tree: Path, tests: tuple[str, ...], log: Path) -> None:
    """Become a pytest in that tree. In a process of its own."""
    os.chdir(tree)
    os.environ.update(ENVIRONMENT, PYTHONPATH=str(tree))
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(tree))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "minisd")]:
        del sys.modules[name]  # this file's own tree
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        sys.stdout = sys.stderr = out
        code = pytest.main(["-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *tests])
    os._exit(code)


def attempt(mutant: Mutant, root: Path = ROOT) -> Result:
    """Put a mutant into a copy of the tree and run its tests there."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = copy_of(root, Path(folder) / "tree")
        path = tree / mutant.file
        source = path.read_text()
        assert source.count(mutant.old) == 1, f"{mutant.name}: {mutant.old!r} is not in {mutant.file} exactly once"
        path.write_text(source.replace(mutant.old, mutant.new))
        code, output = run_tests(tree, mutant.tests)
    seconds = time.monotonic() - started
    if code == 0:
        return Result(None, "SURVIVED", seconds)
    found = re.search(r"^(?:FAILED|ERROR) (\S+\.py::\w+)", output, re.M)
    # Another exit code than 1: it hung, or was not even collected, as with any change that is no Python.
    if code != 1 or found is None:
        return Result(None, f"BROKEN, pytest ended with {code}: {output[-500:]}", seconds)
    return Result(found[1], "", seconds)


def table_row(mutant: Mutant, caught_by: str) -> str:
    """A mutant's line in docs/testing.md."""
    file, _, test = caught_by.partition("::")
    change = " -> ".join(_on_one_line(text) for text in (mutant.old, mutant.new))
    where = f"[{Path(mutant.file).name}](../{mutant.file})"
    return f"| {mutant.name}: {mutant.breaks} | {where} | {change} | [{Path(file).stem}](../{file}): {test} |"


def _on_one_line(code: str) -> str:
    return f"`{'; '.join(line.strip() for line in code.strip().splitlines())}`" if code else "nothing"


def rows_in(page: str) -> dict[str, str]:
    """The lines of the page's table, by the name of the mutant."""
    lines = page[page.index(BEGIN) : page.index(END)].splitlines()[3:]
    return {line[2:].partition(":")[0]: line for line in lines}


def page_with(page: str, found: dict[str, str]) -> str:
    """The page with a new line for each mutant in found (name -> the test that caught it), the others as they are."""
    rows = rows_in(page) | {
        mutant.name: table_row(mutant, found[mutant.name]) for mutant in MUTANTS if mutant.name in found
    }
    ordered = [rows[mutant.name] for mutant in MUTANTS if mutant.name in rows]
    table = "\n".join([BEGIN, "| what is broken | file | change | caught by |", "|---|---|---|---|", *ordered])
    return f"{page[: page.index(BEGIN)]}{table}\n{page[page.index(END) :]}"


def main(options: Options) -> int:
    """Try the mutants. Returns the exit code: 1 if one was not caught."""
    unknown = set(options.only) - {mutant.name for mutant in MUTANTS}
    if unknown:
        print(f"no mutant is called {min(unknown)!r}; there are: {', '.join(mutant.name for mutant in MUTANTS)}")
        return 2
    chosen = [mutant for mutant in MUTANTS if not options.only or mutant.name in options.only]
    os.environ.update(ENVIRONMENT)  # before torch is there
    for name in HEAVY:
        importlib.import_module(name)

    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tests = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
        code, output = run_tests(copy_of(ROOT, Path(folder) / "tree"), tests)
    if code != 0:
        print(f"the tests fail before anything is broken:\n{output[-3000:]}")
        return 1
    print(f"{len(tests)} files and tests pass; now {len(chosen)} mutants", flush=True)

    found: dict[str, str] = {}
    with ProcessPoolExecutor(options.jobs, mp_context=FORK) as pool:
        for mutant, result in zip(chosen, pool.map(attempt, chosen), strict=True):
            if result.caught_by is not None:
                found[mutant.name] = result.caught_by
            print(f"{mutant.name:30} {result.seconds:6.1f} s  {result.caught_by or result.why}", flush=True)
    PAGE.write_text(page_with(PAGE.read_text(), found))
    missed = [mutant.name for mutant in chosen if mutant.name not in found]
    print(f"{len(found)} of {len(chosen)} mutants caught" + (f"; not caught: {', '.join(missed)}" if missed else ""))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
