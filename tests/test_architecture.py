"""The shape of the code as rules: which file may import what, how long it may be, what nobody may do.

A new module fails here until it has a line in the tables below. That line is the design decision: write it knowingly.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [path for name in ("train.py", "sample.py", "prepare_data.py") if (path := ROOT / name).exists()]
SOURCES = [*sorted((ROOT / "minisd").rglob("*.py")), *SCRIPTS]
# Read by people too, but free to import what they compare with.
OTHERS = [path for folder in ("tests", "bench", ".ci") for path in sorted((ROOT / folder).rglob("*.py"))]

# Third-party packages a module may import, lazily or not. A line that ends in "." is for a whole folder.
PACKAGES: dict[str, set[str]] = {
    # The networks, the mathematics.
    "minisd.layers": {"torch"},
    "minisd.unet": {"torch"},
    "minisd.unet_config": set(),
    "minisd.vae": {"torch"},
    "minisd.ddpm": {"torch"},
    "minisd.samplers": {"torch"},
    "minisd.sampler_grids": {"torch"},
    "minisd.vp_samplers": {"torch"},
    "minisd.sigma_samplers": {"torch"},
    "minisd.multistep_samplers": {"torch"},
    "minisd.lora": {"torch"},
    "minisd.lora_layers": {"torch"},
    "minisd.lora_targets": {"torch"},
    "minisd.draws": {"torch"},
    "minisd.training": {"torch"},
    "minisd.optimizer": {"torch", "bitsandbytes"},
    "minisd.distributed": {"torch"},
    "minisd.sampling": {"torch"},
    "minisd.guidance": {"torch"},
    "minisd.vae_tiling": {"torch"},
    # Names, configurations, failures: nothing but Python.
    "minisd": set(),
    "minisd.atomic": set(),
    "minisd.caption_table": set(),
    "minisd.errors": set(),
    "minisd.interruptions": set(),
    "minisd.run_lock": set(),
    "minisd.run_status": set(),
    "minisd.ldm_modules": set(),
    "minisd.ldm_keys": set(),
    "minisd.lora_dialects": set(),
    "minisd.lora_positional": set(),
    "minisd.lora_peft": set(),
    "minisd.lora_info": set(),
    "minisd.model_config": set(),
    "minisd.model_folder": set(),
    # Files and the Hub.
    "minisd.checkpoint": set(),
    "minisd.hub": {"huggingface_hub"},
    "minisd.vision_files": set(),
    "minisd.latent_cache": {"torch", "tqdm"},
    "minisd.tensor_cache": {"torch", "safetensors"},
    "minisd.lora_raw": {"torch"},
    "minisd.lora_reader": {"torch"},
    "minisd.lora_writer": {"torch", "safetensors"},
    "minisd.lora_resize": {"torch"},
    "minisd.model_files": {"torch", "safetensors"},
    "minisd.run_state": {"torch", "safetensors"},
    "minisd.strict_load": {"torch", "safetensors"},
    "minisd.clip": {"torch", "transformers"},
    "minisd.prompts": set(),
    "minisd.text": {"torch"},
    "minisd.families": {"torch"},
    "minisd.single_file": {"torch"},
    "minisd.model_checks": set(),
    "minisd.model_writer": {"torch", "safetensors"},
    "minisd.weights": {"torch"},
    # Pictures and captions.
    "minisd.buckets": set(),
    "minisd.plan": set(),
    "minisd.data": {"tqdm"},
    "minisd.batches": {"torch"},
    "minisd.read_ahead": {"torch"},
    "minisd.picture_files": {"PIL", "numpy"},
    "minisd.images": {"torch", "torchvision", "PIL"},
    # A run.
    "minisd.run": {"torch"},
    "minisd.run_setup": {"torch"},
    "minisd.guards": set(),
    "minisd.validation": {"torch"},
    "minisd.preflight": {"torch", "PIL", "numpy"},
    "minisd.held_out": set(),
    "minisd.probe_sets": {"torch"},
    "minisd.run_samples": set(),
    "minisd.validation_loss": {"torch"},
    # What sample.py draws, and what it writes into the pictures.
    "minisd.sample_plan": set(),
    "minisd.sample_setup": {"torch"},
    "minisd.prompt_files": set(),
    "minisd.lora_choice": set(),
    "minisd.a1111_text": set(),
    "minisd.picture_record": {"PIL"},
    "minisd.picture_text": {"torch"},
    "minisd.sweep_grid": {"PIL"},
    # What a run tells the world.
    "minisd.trackers": {"torch", "PIL", "numpy", "wandb"},
    # The command line.
    "minisd.config": {"tyro"},
    "minisd.sample_config": {"tyro"},
    "minisd.command_line": {"tyro"},
    "minisd.lora_file": set(),
    "minisd.lora_options": {"tyro"},
    "minisd.lora_commands": {"torch", "safetensors"},
    "minisd.lora_inspect": set(),
    "train": {"torch", "tqdm"},
    "sample": {"torch", "tqdm", "PIL"},
    "prepare_data": set(),
    # Programs of their own.
    "minisd.pocket.": {"torch", "PIL", "numpy", "tqdm", "tyro", "transformers", "safetensors"},
    # A dataset: who finds it, cleans it, describes it, shows it. Only captions need torch.
    "minisd.prepare": set(),
    "minisd.prepare.options": {"PIL", "tyro"},
    "minisd.prepare.addresses": set(),
    "minisd.prepare.http_answer": set(),
    "minisd.prepare.fetch": set(),
    "minisd.prepare.polite": set(),
    "minisd.prepare.bing_search": {"bing_image_downloader"},
    "minisd.prepare.journal": set(),
    "minisd.prepare.collected": set(),
    "minisd.prepare.downloads": set(),
    "minisd.prepare.collect": {"tqdm"},
    "minisd.prepare.guarded": {"PIL", "pebble"},
    "minisd.prepare.examine": {"PIL", "imagehash"},
    "minisd.prepare.duplicates": {"numpy"},
    "minisd.prepare.table": {"pandas"},
    "minisd.prepare.dropping": set(),
    "minisd.prepare.summary": set(),
    "minisd.prepare.names": set(),
    "minisd.prepare.source_folder": set(),
    "minisd.prepare.clean": {"tqdm"},
    "minisd.prepare.caption_lint": {"transformers"},
    "minisd.prepare.caption_journal": set(),
    "minisd.prepare.blip": {"torch", "PIL", "transformers"},
    "minisd.prepare.caption": {"PIL", "tqdm"},
    "minisd.prepare.report_data": set(),
    "minisd.prepare.report_page": set(),
    "minisd.prepare.report": {"tqdm"},
    "minisd.prepare.editor": set(),
    "minisd.prepare.serve": set(),
    # Checkpoints compared: what is drawn, who judges, which one is picked.
    "minisd.evaluate": set(),
    "minisd.evaluate.__main__": set(),
    "minisd.evaluate.options": {"tyro"},
    "minisd.evaluate.run_folder": set(),
    "minisd.evaluate.adapters": set(),
    "minisd.evaluate.prompts": set(),
    "minisd.evaluate.judging": {"torch", "PIL"},
    "minisd.evaluate.picking": set(),
    "minisd.evaluate.drawing": {"PIL"},
    "minisd.evaluate.clip_model": {"torch", "PIL", "transformers"},
    "minisd.evaluate.clip_judge": {"torch", "PIL"},
    "minisd.evaluate.session": {"torch", "PIL"},
    "minisd.evaluate.sweeping": {"PIL"},
    "minisd.evaluate.table": {"pandas"},
    "minisd.evaluate.evaluation": {"PIL", "tqdm"},
    # To the Hub.
    "minisd.publish": {"tyro"},
    "minisd.publication": {"PIL"},
    "minisd.model_card": {"huggingface_hub", "jinja2"},
    "minisd.hub_upload": {"huggingface_hub"},
    # A run as one page. Nothing of it imports torch.
    "minisd.html_page": {"jinja2"},
    "minisd.report": set(),
    "minisd.report.__main__": {"tyro"},
    "minisd.report.run_files": set(),
    "minisd.report.curves": set(),
    "minisd.report.evaluation": set(),
    "minisd.report.commands": set(),
    "minisd.report.pictures": {"PIL"},
    "minisd.report.views": set(),
    "minisd.report.facts": set(),
    "minisd.report.page": set(),
    "minisd.report.write": set(),
}

# Modules of minisd that a module of the core may import: what is not here, it does not know of. The networks know
# nothing of training, files, the command line and the Hub; the mathematics knows nothing of files.
INNER: dict[str, set[str]] = {
    "minisd.errors": set(),
    "minisd.model_config": set(),
    "minisd.ldm_modules": set(),
    "minisd.ldm_keys": {"minisd.ldm_modules"},
    "minisd.lora_positional": {"minisd.errors"},
    "minisd.lora_dialects": {"minisd.lora_positional"},
    "minisd.lora_peft": set(),
    "minisd.lora_resize": {"minisd.lora_layers"},
    "minisd.lora_options": {"minisd.command_line", "minisd.errors"},
    "minisd.layers": set(),
    "minisd.unet": {"minisd.layers", "minisd.unet_config"},
    "minisd.unet_config": {"minisd.model_config"},
    "minisd.vae": {"minisd.layers", "minisd.model_config"},
    "minisd.lora_layers": {"minisd.errors"},
    "minisd.lora_targets": {"minisd.errors", "minisd.lora_layers"},
    "minisd.lora": {"minisd.errors", "minisd.lora_layers", "minisd.lora_targets"},
    "minisd.ddpm": {"minisd.errors"},
    "minisd.sampler_grids": {"minisd.ddpm", "minisd.errors"},
    "minisd.vp_samplers": {"minisd.ddpm", "minisd.errors", "minisd.sampler_grids"},
    "minisd.sigma_samplers": {"minisd.ddpm", "minisd.sampler_grids"},
    "minisd.multistep_samplers": {"minisd.ddpm", "minisd.sampler_grids"},
    "minisd.samplers": {
        "minisd.ddpm",
        "minisd.errors",
        "minisd.multistep_samplers",
        "minisd.sampler_grids",
        "minisd.sigma_samplers",
        "minisd.vp_samplers",
    },
    "minisd.guidance": {"minisd.sampler_grids", "minisd.unet"},
    "minisd.vae_tiling": {"minisd.vae"},
    "minisd.draws": {"minisd.errors"},
    "minisd.distributed": {"minisd.errors"},
    "minisd.training": {"minisd.ddpm", "minisd.errors", "minisd.layers", "minisd.unet", "minisd.vae"},
    # The data path: geometry and plan are arithmetic; who reads pictures and tensors knows no networks.
    "minisd.buckets": {"minisd.errors"},
    "minisd.plan": {"minisd.buckets", "minisd.draws"},
    "minisd.picture_files": {"minisd.errors"},
    "minisd.caption_table": {"minisd.errors", "minisd.picture_files"},
    "minisd.data": {"minisd.caption_table", "minisd.errors", "minisd.picture_files"},
    "minisd.read_ahead": {"minisd.errors", "minisd.interruptions"},
    "minisd.tensor_cache": {"minisd.atomic", "minisd.errors", "minisd.model_files"},
    "minisd.atomic": {"minisd.errors"},
    "minisd.interruptions": {"minisd.errors"},
    "minisd.run_lock": {"minisd.errors"},
    "minisd.run_status": {"minisd.atomic", "minisd.errors"},
    "minisd.config": {"minisd.errors"},
    "minisd.sample_config": {"minisd.config", "minisd.errors"},
    "minisd.picture_record": {"minisd.errors"},
    "minisd.prompt_files": {"minisd.errors", "minisd.sample_config"},
    "minisd.sample_plan": {"minisd.picture_record", "minisd.sample_config"},
    "minisd.sweep_grid": set(),
    "minisd.command_line": {"minisd.config", "minisd.errors", "minisd.picture_record", "minisd.sample_config"},
    "minisd.trackers": {"minisd.atomic", "minisd.errors"},
    "minisd.model_files": {"minisd.errors"},
    "minisd.clip": {"minisd.errors", "minisd.model_files"},
    "minisd.prompts": {"minisd.errors"},
    "minisd.text": {"minisd.errors", "minisd.prompts"},
    "minisd.families": {"minisd.clip", "minisd.unet", "minisd.unet_config", "minisd.vae"},
    "minisd.strict_load": {"minisd.errors", "minisd.ldm_keys", "minisd.model_files"},
    "minisd.single_file": {
        "minisd.clip",
        "minisd.errors",
        "minisd.families",
        "minisd.ldm_keys",
        "minisd.model_files",
        "minisd.model_folder",
        "minisd.strict_load",
    },
    "minisd.prepare.options": {"minisd.command_line", "minisd.errors"},
    "minisd.prepare.addresses": {"minisd.errors"},
    "minisd.prepare.http_answer": set(),
    "minisd.prepare.fetch": {"minisd.errors", "minisd.prepare.addresses", "minisd.prepare.http_answer"},
    "minisd.prepare.duplicates": {"minisd.prepare.examine"},
    "minisd.prepare.caption_lint": set(),
    "minisd.prepare.blip": {"minisd.errors", "minisd.model_files", "minisd.strict_load", "minisd.vision_files"},
    "minisd.prepare.caption_journal": {"minisd.atomic", "minisd.caption_table", "minisd.errors"},
    "minisd.prepare.table": {"minisd.atomic", "minisd.caption_table", "minisd.errors"},
    "minisd.prepare.dropping": {"minisd.atomic", "minisd.errors", "minisd.prepare.table"},
    "minisd.prepare.summary": {"minisd.prepare.table"},
    "minisd.prepare.journal": {"minisd.atomic", "minisd.errors"},
    "minisd.prepare.polite": {"minisd.errors", "minisd.prepare.addresses", "minisd.prepare.fetch"},
    "minisd.prepare.bing_search": {
        "minisd.atomic",
        "minisd.errors",
        "minisd.prepare.fetch",
        "minisd.prepare.options",
        "minisd.prepare.polite",
    },
    "minisd.prepare.collected": {
        "minisd.prepare.duplicates",
        "minisd.prepare.examine",
        "minisd.prepare.journal",
        "minisd.prepare.options",
    },
    "minisd.prepare.downloads": {
        "minisd.atomic",
        "minisd.prepare.bing_search",
        "minisd.prepare.examine",
        "minisd.prepare.guarded",
        "minisd.prepare.options",
    },
    "minisd.prepare.source_folder": {
        "minisd.caption_table",
        "minisd.data",
        "minisd.errors",
        "minisd.picture_files",
        "minisd.prepare.examine",
        "minisd.prepare.journal",
        "minisd.prepare.table",
    },
    "minisd.prepare.report_data": {
        "minisd.buckets",
        "minisd.errors",
        "minisd.prepare.caption_lint",
        "minisd.prepare.table",
    },
    "minisd.held_out": {"minisd.config", "minisd.data", "minisd.distributed", "minisd.errors"},
    "minisd.probe_sets": {
        "minisd.batches",
        "minisd.buckets",
        "minisd.draws",
        "minisd.held_out",
        "minisd.latent_cache",
    },
    "minisd.hub_upload": {"minisd.config", "minisd.errors"},
    "minisd.model_card": {"minisd.config", "minisd.errors", "minisd.hub", "minisd.lora_info"},
    "minisd.html_page": set(),
    "minisd.report.run_files": {
        "minisd.command_line",
        "minisd.config",
        "minisd.errors",
        "minisd.picture_files",
        "minisd.run_status",
    },
    "minisd.report.curves": {"minisd.report.run_files"},
    "minisd.report.evaluation": {"minisd.report.run_files"},
    "minisd.report.commands": {"minisd.config", "minisd.report.evaluation", "minisd.report.run_files"},
    "minisd.report.pictures": {
        "minisd.caption_table",
        "minisd.config",
        "minisd.data",
        "minisd.errors",
        "minisd.html_page",
        "minisd.picture_files",
    },
    "minisd.prepare.report_page": {
        "minisd.errors",
        "minisd.html_page",
        "minisd.prepare.caption_lint",
        "minisd.prepare.report_data",
        "minisd.prepare.summary",
        "minisd.prepare.table",
    },
    "minisd.evaluate.options": {"minisd.command_line", "minisd.config", "minisd.errors", "minisd.sweep_grid"},
    "minisd.evaluate.judging": set(),
    "minisd.evaluate.picking": {"minisd.evaluate.judging"},
    "minisd.evaluate.table": {"minisd.evaluate.judging"},
    "minisd.evaluate.clip_model": {
        "minisd.clip",
        "minisd.errors",
        "minisd.model_files",
        "minisd.strict_load",
        "minisd.vision_files",
    },
    "minisd.evaluate.clip_judge": {"minisd.evaluate.clip_model"},
    "minisd.prepare.serve": {
        "minisd.errors",
        "minisd.prepare.editor",
        "minisd.prepare.guarded",
        "minisd.prepare.options",
        "minisd.prepare.table",
    },
    "minisd.model_checks": {
        "minisd.ddpm",
        "minisd.errors",
        "minisd.families",
        "minisd.text",
        "minisd.unet_config",
        "minisd.vae",
    },
}

# Oracles of the tests and what they would bring along; and everything that unpickles.
FORBIDDEN = {
    "diffusers",
    "peft",
    "accelerate",
    "pickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
}
UNPICKLES = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "pandas.read_pickle", "pd.read_pickle"}

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 70
LONGER = {("train", "train"): 120}  # the visible loop, meant to be read from top to bottom


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in SOURCES}
EVERY_MODULE = pytest.mark.parametrize("module", list(MODULES))


def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _imports(tree: ast.Module) -> Iterator[str]:
    """Every dotted name that is imported, wherever it stands: "a.b" for `import a.b` and for `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0]
            assert isinstance(name, ast.Constant), f"line {node.lineno}: an import whose name cannot be read here"
            yield str(name.value)


def _third_party(tree: ast.Module) -> set[str]:
    roots = {name.split(".")[0] for name in _imports(tree)}
    return roots - sys.stdlib_module_names - {"minisd"}


def _inner(tree: ast.Module) -> set[str]:
    """Modules of minisd that are imported: `from minisd.a import f` and `from minisd import a` are both minisd.a."""
    found = set()
    for name in _imports(tree):
        if name.split(".")[0] == "minisd":
            while name not in MODULES:
                name = name.rpartition(".")[0]
            found.add(name)
    return found


def _allowed_packages(module: str) -> set[str] | None:
    folder = ".".join(module.split(".")[:2]) + "."  # "minisd.pocket." for the folder and for each file in it
    return PACKAGES.get(module, PACKAGES.get(folder))


def _unpickling(tree: ast.Module) -> set[str]:
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | set(_imports(tree))
    keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    return (names & UNPICKLES) | (keywords & {"allow_pickle"})


@EVERY_MODULE
def test_third_party_imports_are_those_of_the_table(module: str) -> None:
    allowed = _allowed_packages(module)
    assert allowed is not None, f"{module} has no line in PACKAGES"
    assert _third_party(_tree(module)) <= allowed


@EVERY_MODULE
def test_inner_imports_are_those_of_the_table(module: str) -> None:
    inner = _inner(_tree(module))
    assert inner <= INNER.get(module, inner)
    assert not {name.split(".")[0] for name in _imports(_tree(module))} & {"train", "sample", "prepare_data", "tests"}


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {module: _inner(_tree(module)) - {"minisd", module} for module in MODULES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@EVERY_MODULE
def test_no_oracle_is_imported_and_nothing_is_unpickled(module: str) -> None:
    tree = _tree(module)
    assert not {name.split(".")[0] for name in _imports(tree)} & FORBIDDEN
    assert not _unpickling(tree)


@EVERY_MODULE
def test_files_and_functions_fit_on_a_screen_or_a_few(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= LONGER.get((module, node.name), MAX_FUNCTION_LINES), f"{node.name}: {lines} lines"


@pytest.mark.parametrize("path", [*SOURCES, *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_are_ascii_and_named_after_what_they_do(path: Path) -> None:
    assert path.read_bytes().isascii()
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")


def test_the_checks_see_what_they_forbid() -> None:
    tree = ast.parse(
        """
import numpy as np
from minisd import layers
from minisd.unet import UNetConfig

def late():
    import diffusers.models
    import importlib
    importlib.import_module("peft")
    torch.save({}, "x")
    np.load("x", allow_pickle=True)
"""
    )
    assert _third_party(tree) == {"numpy", "diffusers", "peft"}
    assert _inner(tree) == {"minisd.layers", "minisd.unet"}
    assert _unpickling(tree) == {"torch.save", "allow_pickle"}
    assert _unpickling(ast.parse("from torch import load")) == {"torch.load"}
