"""What the README says can be done: its commands parse, its files and make targets exist."""

import re
import shlex
from pathlib import Path

import pytest

from minisd.config import SampleConfig, TrainConfig, parse_args

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


def _commands():
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip():
                    yield pytest.param(shlex.split(line, comments=True), id=f"{page.name}: {line.strip()[:60]}")


@pytest.mark.parametrize("words", list(_commands()))
def test_command(words):
    script = next((word for word in words if word.endswith(".py")), None)
    arguments = words[words.index(script) + 1 :] if script else []
    if script == "train.py":
        parse_args(TrainConfig, arguments)
    elif script == "sample.py":
        parse_args(SampleConfig, arguments)
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif "-m" in words:
        module = words[words.index("-m") + 1]
        assert module == "pytest" or (ROOT / (module.replace(".", "/") + ".py")).exists()
    else:
        pytest.fail(f"no test knows how to check: {shlex.join(words)}")


def test_the_two_set_up_commands_come_first():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    assert [block.strip() for block in blocks[:2]] == ["make demo", "make test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_module_is_in_the_tour():
    named = {Path(target).name for target in re.findall(r"\]\(([^)#]+)\)", README)}
    for path in (ROOT / "minisd").glob("*.py"):
        if path.name != "__init__.py":
            assert path.name in named, f"{path.name} is not in the README's table"
