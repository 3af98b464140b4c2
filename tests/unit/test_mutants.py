"""The mutants of mutant_table.py: they can be made, docs/testing.md lists them, and the program tells them apart."""

import ast
import re
from pathlib import Path

import pytest

from tests.mutant_table import MUTANTS, Mutant
from tests.mutants import PAGE, ROOT, attempt, page_with, rows_in, table_row


def test_there_are_enough_and_no_two_of_one_name():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 32


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_is_python(mutant):
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.old) == 1
    assert mutant.new != mutant.old
    ast.parse(source.replace(mutant.old, mutant.new))
    assert not set(":|") & set(mutant.name)  # they end a name, or a cell, in the page's table


def test_the_page_lists_the_same_mutants_as_they_are_with_tests_that_exist():
    rows = rows_in(PAGE.read_text())
    assert list(rows) == [mutant.name for mutant in MUTANTS]
    for mutant in MUTANTS:
        file, test = re.search(r"\(\.\./([^)]*)\): (\w+) \|$", rows[mutant.name]).groups()
        assert rows[mutant.name] == table_row(mutant, f"{file}::{test}")
        assert file in {words.partition("::")[0] for words in mutant.tests}
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M), test


def test_only_the_rows_of_the_mutants_that_were_tried_are_written_anew():
    page = PAGE.read_text()
    first = MUTANTS[0].name
    changed = page_with(page, {first: "tests/unit/test_x.py::test_y"})
    assert [name for name, row in rows_in(changed).items() if row != rows_in(page)[name]] == [first]


@pytest.fixture
def tree(tmp_path):
    """A project of one line, with a test that looks at its sign and another that does not."""
    (tmp_path / "code.txt").write_text("+1")
    (tmp_path / "test_sign.py").write_text(
        "from pathlib import Path\n"
        "VALUE = int(Path('code.txt').read_text())\n"
        "def test_sign():\n    assert VALUE > 0\n"
        "def test_size():\n    assert abs(VALUE) == 1\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("new", "test", "caught_by", "why"),
    [
        ("-", "test_sign.py", "test_sign.py::test_sign", ""),
        ("-", "test_sign.py::test_size", None, "SURVIVED"),
        ("?", "test_sign.py", None, "BROKEN, pytest ended with 2"),
    ],
)
def test_a_mutant_is_caught_or_survives_or_is_none(tree: Path, new, test, caught_by, why):
    before = (tree / "code.txt").read_text()
    result = attempt(Mutant("sign", "code.txt", "+", new, "the sign", (test,)), tree)
    assert result.caught_by == caught_by
    assert result.why.startswith(why)
    assert bool(result.why) == bool(why)
    assert (tree / "code.txt").read_text() == before
