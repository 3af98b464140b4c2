"""What the README says can be done: its commands parse, its files and make targets exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from minisd.command_line import parse_args
from minisd.config import TrainConfig
from minisd.evaluate.options import parse_options as parse_evaluate
from minisd.prepare.options import parse_options
from minisd.publish import parse_options as parse_publish
from minisd.report.__main__ import parse_options as parse_report
from minisd.sample_config import SampleConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
MODULE_OPTIONS = {
    "minisd.evaluate": parse_evaluate,
    "minisd.publish": parse_publish,
    "minisd.report": parse_report,
}


def _commands():
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip():
                    yield pytest.param(shlex.split(line, comments=True), id=f"{page.name}: {line.strip()[:60]}")


@pytest.mark.parametrize("words", list(_commands()))
def test_command(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = next((word for word in words if word.endswith(".py")), None)
    arguments = words[words.index(script) + 1 :] if script else []
    if script == "train.py":
        parse_args(TrainConfig, arguments)
    elif script == "sample.py":
        parse_args(SampleConfig, arguments)
    elif script == "prepare_data.py":
        parse_options(arguments)
    elif script is not None and script.startswith(("bench/", "docs/tour/")):
        assert (ROOT / script).exists()
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif "-m" in words:
        module = words[words.index("-m") + 1]
        arguments = words[words.index("-m") + 2 :]
        where = ROOT / module.replace(".", "/")
        assert module == "pytest" or where.with_suffix(".py").exists() or (where / "__main__.py").exists()
        if module in MODULE_OPTIONS:
            MODULE_OPTIONS[module](arguments)
    else:
        pytest.fail(f"no test knows how to check: {shlex.join(words)}")


def _scripts():
    for page in PAGES:
        for number, block in enumerate(re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)):
            yield pytest.param(block, id=f"{page.name} {number}")


@pytest.mark.parametrize("script", list(_scripts()))
def test_shell_script(script, monkeypatch):
    """A script for a cluster is not run here: its syntax is checked, and the options that it gives train.py."""
    monkeypatch.chdir(ROOT)
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    lines = [line for line in script.replace("\\\n", " ").splitlines() if "train.py" in line]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        config = parse_args(TrainConfig, words[words.index("train.py") + 1 :])
        assert config.max_train_steps == 2000  # the recipe was read


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
