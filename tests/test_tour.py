"""The tour keeps up with the code: its links lead to code that is there, its experiments print what it says they do."""

from __future__ import annotations

import ast
import io
import math
import re
import runpy
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from minisd.lora import TARGETS, inject_lora, lora_parameters, lora_weights
from minisd.lora_info import LoRAInfo
from minisd.lora_writer import lora_bytes
from minisd.weights import load_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tour.md"
TEXT = PAGE.read_text(encoding="utf-8")
NO_EQUATION = ("weights", "checkpoint")  # a format and an order in its place
STOPS = ["ddpm", "layers", "unet", "vae", "text", "lora", "draws", "training", "train.py", "samplers", "sampling",
         "weights", "checkpoint"]  # fmt: skip
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


class Experiment(NamedTuple):
    """A block of Python in the tour, where it stands, and what it says it prints."""

    stop: str
    line: int
    code: str
    printed: str


def sections() -> dict[str, str]:
    """The tour's stops by their headings, "## 1. ddpm: ...", with their text."""
    found = re.split(r"^## \d+\. ", TEXT, flags=re.M)[1:]
    return {part.partition("\n")[0].partition(":")[0].strip("`"): part for part in found}


def experiments() -> list[Experiment]:
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```\n+(?:^```text\n(.*?)^```)?", TEXT, re.M | re.S):
        before = TEXT[: match.start()]
        stop = re.findall(r"^## \d+\. `?([\w.]+)", before, re.M)
        found.append(Experiment(stop[-1] if stop else "", before.count("\n") + 1, match[1], match[2] or ""))
    return found


def same_output(printed: str, expected: str) -> bool:
    """Whether the words are the same, and the numbers but for one unit of their last decimal: CPUs round otherwise."""
    if _NUMBER.sub("#", printed) != _NUMBER.sub("#", expected):
        return False
    for got, wanted in zip(_NUMBER.findall(printed), _NUMBER.findall(expected), strict=True):
        mantissa, _, exponent = wanted.partition("e")
        decimals = len(mantissa.partition(".")[2])
        unit = 10.0 ** (int(exponent or 0) - decimals) if decimals or exponent else 0.0
        if not math.isclose(float(got), float(wanted), rel_tol=0, abs_tol=1.01 * unit):
            return False
    return True


def symbols_of(path: Path) -> set[str]:
    """Functions, classes, methods, attributes and constants of a file, dotted: "NoiseSchedule.add_noise"."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def links() -> list[tuple[str, str]]:
    return re.findall(r"!?\[([^\]]*)\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S))


def test_the_stops_are_there_in_reading_order_each_with_all_its_parts():
    found = sections()
    assert list(found) == STOPS
    for name, section in found.items():
        assert re.search(r"\[`[\w.]+`\]\(\.\./[\w./]+\.py\)", section), f"{name} links no code"
        for part in ("**Try it.**", "**What breaks if", "**Exercise.**", "<details>", "```python", "```text"):
            assert part in section, f"{name} has no {part}"
        assert ("```math" in section and "arXiv" in section) == (name not in NO_EQUATION), f"{name}: equation and paper"
        broken = section.partition("**What breaks if")[2].partition("**Exercise.**")[0]
        assert "](tour/broken_" in broken or "\n|" in broken, f"{name} shows nothing of what broke"


def test_what_is_linked_as_code_is_in_that_file():
    linked = [(name[1:-1], target) for name, target in links() if re.fullmatch(r"`[\w.]+`", name)]
    assert len(linked) > 40
    for name, target in linked:
        path = (PAGE.parent / target.partition("#")[0]).resolve()
        assert path.is_file(), target
        if path.suffix == ".py" and name != path.name:
            assert name in symbols_of(path), f"{target} has no {name}"


def test_other_links_lead_somewhere_and_pictures_open():
    headings = {
        re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", TEXT, re.M)
    }
    for _, target in links():
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            path = PAGE.parent / target.partition("#")[0]
            assert path.exists(), target
            if path.suffix == ".png":
                assert path.stat().st_size < 200_000, target
                with Image.open(path) as image:
                    image.load()


def test_no_symbol_is_tied_to_a_line():
    assert not re.search(r"\.py#L\d", TEXT)


@pytest.mark.parametrize("experiment", experiments(), ids=lambda it: f"{it.stop}, line {it.line}")
def test_experiment_prints_what_the_tour_says(experiment, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(experiment.code, f"docs/tour.md, {experiment.stop}", "exec"), {"__name__": "experiment"})
    assert experiment.printed, "a block of Python without the block of text that it prints"
    assert same_output(out.getvalue(), experiment.printed), out.getvalue()


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("loss 0.072\n", "loss 0.071\n", True),
        ("loss 0.073\n", "loss 0.071\n", False),
        ("[24, 25]\n", "[24, 26]\n", False),
        ("1.2e-07\n", "1.3e-07\n", True),
        ("1.2e-07\n", "1.2e-06\n", False),
        ("red 1.0\n", "blue 1.0\n", False),
        ("1.0 2.0\n", "1.0\n", False),
        ("up_blocks.1\n", "up_blocks.2\n", False),
    ],
)
def test_the_comparison_bears_rounding_and_nothing_else(printed, expected, same):
    assert same_output(printed, expected) is same


def run_script(monkeypatch, name: str, *words: str) -> str:
    """Run a script of docs/tour as from the command line; returns what it prints."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs" / "tour"), *sys.path])  # as Python does for a script
    out = io.StringIO()
    with redirect_stdout(out):
        runpy.run_path(str(ROOT / "docs" / "tour" / name), run_name="__main__")
    return out.getvalue()


def assert_like_the_committed(path: Path) -> None:
    """A picture is of the size of the one in docs/tour, and not blank."""
    with Image.open(path) as ours, Image.open(ROOT / "docs" / "tour" / path.name) as committed:
        assert ours.size == committed.size
        assert len(ours.convert("L").getcolors()) > 50


def test_noising_draws_its_picture(monkeypatch, tmp_path):
    run_script(monkeypatch, "noising.py", "--output", str(tmp_path / "noising.png"))
    assert_like_the_committed(tmp_path / "noising.png")


def test_forward_pass_prints_its_table_and_draws_its_picture(monkeypatch, tmp_path):
    printed = run_script(monkeypatch, "forward_pass.py", "--output", str(tmp_path / "forward_pass.png"))
    assert "down_blocks.0.resnets.0" in printed
    assert f"{sum(p.numel() for p in load_model('pocket').unet.parameters()):,}" in printed
    assert_like_the_committed(tmp_path / "forward_pass.png")


def test_lora_attention_shows_what_a_module_adds(monkeypatch, tmp_path):
    unet = load_model("pocket").unet
    inject_lora(unet, TARGETS["attn"], rank=4, alpha=4)
    for _, parameter in lora_parameters(unet):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    (tmp_path / "lora.safetensors").write_bytes(lora_bytes({"unet": lora_weights(unet)}, LoRAInfo(rank=4, alpha=4)))
    words = ("--lora", str(tmp_path / "lora.safetensors"), "--output", str(tmp_path / "lora_attention.png"))
    run_script(monkeypatch, "lora_attention.py", *words)
    assert_like_the_committed(tmp_path / "lora_attention.png")


def test_the_diagrams_are_those_that_the_code_draws(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs" / "tour"), *sys.path])
    functions = runpy.run_path(str(ROOT / "docs" / "tour" / "diagrams.py"), run_name="diagrams")
    for name in ("whole", "unet"):
        committed = (ROOT / "docs" / "tour" / f"{name}.svg").read_text(encoding="utf-8")
        assert functions[f"{name}_svg"]() == committed, "run docs/tour/diagrams.py"
