"""python -m minisd.lora_file: what it prints and writes, and how it refuses."""

from __future__ import annotations

import logging
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minisd.errors import run_script
from minisd.lora import LoRAWeights, adaptable_layers
from minisd.lora_file import main
from minisd.lora_info import LoRAInfo
from minisd.lora_inspect import inspect
from minisd.lora_options import parse_options
from minisd.lora_reader import LoRA, load_lora
from minisd.lora_writer import save_lora
from minisd.model_files import read_header
from minisd.weights import load_model
from tests.lora_files import in_a_pipeline, kohya, merged, random_lora, random_parts, same_weights, write

INFO = LoRAInfo(rank=2, alpha=3.0, base_model_version="pocket", trigger="8bit", recipe={"learning_rate": 1e-4})
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        capsys.readouterr()
        try:
            options = parse_options([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        else:
            code = run_script(lambda: main(options), debug=False)
        said = capsys.readouterr()
        return int(code or 0), said.out, said.err

    return run


def row(text: str, name: str) -> str:
    """What a line of the table says."""
    found = [line[28:].strip() for line in text.splitlines() if line[:28].strip() == name]
    assert len(found) == 1, (name, text)
    return found[0]


# --- inspect


def test_inspect_shows_sizes_recipe_and_norms(tiny_networks: dict[str, nn.Module], tmp_path: Path, run: Run) -> None:
    parts = random_parts(tiny_networks, targets=("to_q", "fc1"), alphas=(3.0,))
    file = tmp_path / "a.safetensors"
    save_lora(file, parts, INFO)
    code, shown, _ = run("inspect", file)
    assert (code, shown) == (0, inspect(file) + "\n")
    unet = parts["unet"]
    ranks = {rank: sum(w.rank == rank for part in parts.values() for w in part.values()) for rank in (1, 2, 3)}
    assert set(row(shown, "rank").split(", ")) == {f"{rank} ({n} modules)" for rank, n in ranks.items() if n}
    assert row(shown, "alpha") == "3"
    assert row(shown, "modules") == f"{len(parts['text_encoder'])} in text_encoder, {len(unet)} in unet"
    assert row(shown, "base family") == "pocket"
    assert row(shown, "trigger") == "8bit"
    assert row(shown, "learning_rate") == "0.0001"
    for block in ("down_blocks.0", "up_blocks.1", "mid_block"):
        inside = [w for path, w in unet.items() if path.startswith(block)]
        norm = math.sqrt(sum(float((w.alpha / w.rank * w.product(torch.float64)).square().sum()) for w in inside))
        assert row(shown, block).split() == [f"{norm:.4g}", f"{len(inside)}", "modules"]


def test_inspect_shows_what_kohya_says_and_no_control_characters(
    tiny_networks: dict[str, nn.Module], tmp_path: Path, run: Run
) -> None:
    metadata = {
        "ss_learning_rate": "0.0001",
        "ss_unet_lr": "None",
        "ss_optimizer": "\x1b[2JAdamW",
        "ss_tag_frequency": '{"10_sks": {"sks": 20, "city\\u001b": 7}}',
        "modelspec.trigger_phrase": "red\n",
        "ss_output_name": "x" * 1000,
    }
    state = kohya(random_lora(tiny_networks["unet"]))
    file = write(tmp_path / "k.safetensors", state | {"\x1b[2J\n": torch.zeros(1)}, metadata)
    code, shown, _ = run("inspect", file)
    assert code == 0
    assert row(shown, "ss_learning_rate") == "0.0001"
    assert row(shown, "ss_optimizer") == r"\x1b[2JAdamW"
    assert row(shown, "tags") == r"sks (20), city\x1b (7)"
    assert row(shown, "trigger") == r"red\n"
    assert row(shown, "title") == "x" * 300
    assert row(shown, "keys of no known meaning") == r"1 ('\x1b[2J\n')"
    assert "ss_unet_lr" not in shown
    assert shown.replace("\n", "").isprintable()
    write(file, state, {"ss_tag_frequency": '{"a": 3}'})
    assert "tags" not in run("inspect", file)[1]


def test_inspect_widens_the_column_of_names_to_what_is_needed(
    tiny_networks: dict[str, nn.Module], tmp_path: Path, run: Run
) -> None:
    recipe = {"gradient_accumulation_steps": 1, "seed": 7}
    save_lora(tmp_path / "a.safetensors", random_parts(tiny_networks, targets=("to_q",)), replace(INFO, recipe=recipe))
    lines = run("inspect", tmp_path / "a.safetensors")[1].splitlines()
    width = len("  gradient_accumulation_steps")
    assert f"{'  gradient_accumulation_steps':<{width}} 1" in lines
    assert f"{'  seed':<{width}} 7" in lines
    assert all(len(line) <= width or (line[width] == " " and line[width + 1] != " ") for line in lines)


def test_inspect_counts_blocks_of_a_numbered_file_and_doras(
    tiny_networks: dict[str, nn.Module], tmp_path: Path, run: Run
) -> None:
    state = {f"unet:{i}:{piece}": torch.ones(2, 2) for i in range(18) for piece in ("up", "down")}
    _, shown, _ = run(
        "inspect", write(tmp_path / "n.safetensors", state | {"<s1>": torch.ones(4)}, {"<s1>": "<embed>"})
    )
    assert row(shown, "unet transformer block 1").split() == ["12", "9", "modules"]  # 9 layers, norm 4 each
    assert row(shown, "embeddings") == "<s1> [1, 4]"
    assert row(shown, "targets") == "ff.net.0.proj, to_k, to_out.0, to_q, to_v"
    weights = LoRAWeights(torch.ones(1, 3), torch.ones(2, 1), 1.0, torch.ones(2))
    save_lora(tmp_path / "d.safetensors", {"unet": {"conv_in": weights}}, INFO)
    _, shown, _ = run("inspect", tmp_path / "d.safetensors")
    assert row(shown, "modules") == "1 in unet; 1 of them DoRA"
    assert row(shown, "unet, outside the blocks").split() == ["2.449", "1", "modules"]


# --- convert


@pytest.mark.parametrize("first", ["kohya", "peft"])
def test_convert_there_and_back_gives_the_same_bytes(
    tiny_folder: Path, tiny_networks: dict[str, nn.Module], tmp_path: Path, run: Run, first: str
) -> None:
    other = {"kohya": "peft", "peft": "kohya"}[first]
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    save_lora(a, random_parts(tiny_networks), INFO, lora_format=first)  # type: ignore[arg-type]
    assert run("convert", a, "--output", b, "--lora-format", other, "--model", tiny_folder)[0] == 0
    assert run("convert", b, "--output", c, "--lora-format", first, "--model", tiny_folder)[0] == 0
    # Rank and alpha of the header are now those that most modules have.
    lora = load_lora(c, tiny_networks)
    save_lora(a, lora.parts, lora.info, lora_format=first)  # type: ignore[arg-type]
    assert c.read_bytes() == a.read_bytes()
    same_weights(
        merged(tiny_folder, lora), merged(tiny_folder, LoRA(random_parts(tiny_networks), {}, INFO)), tolerance=0
    )


def test_convert_knows_the_pocket_model_and_casts(tmp_path: Path, run: Run) -> None:
    networks = load_model("pocket").networks()
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write(a, kohya(random_lora(networks["unet"])))  # no header: its prompts are 64 wide
    assert run("convert", a, "--output", b, "--lora-format", "peft", "--dtype", "float16")[0] == 0
    assert {tensor.dtype for tensor in load_file(b).values()} == {torch.float16}
    assert read_header(b).metadata["ss_base_model_version"] == "pocket"


def test_convert_finds_sdxl_in_the_keys_and_writes_the_embeddings_beside(
    tiny_folder: Path, tiny_networks: dict[str, nn.Module], tmp_path: Path, run: Run
) -> None:
    """A file of SDXL in diffusers' names becomes one in the original names, as A1111 wants it."""
    name = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    state = {
        f"lora_unet_{name}.lora_down.weight": torch.ones(1, 2048),
        f"lora_unet_{name}.lora_up.weight": torch.ones(640, 1),
    }
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    said = {"ss_base_model_version": "sd_v1"}  # wrong: the sizes count
    write(a, state, said)
    assert row(run("inspect", a)[1], "base family") == "SDXL (prompts 2048 wide); its header says sd_v1"
    assert run("convert", a, "--output", b)[0] == 0
    module = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    assert {key.partition(".")[0] for key in load_file(b)} == {module}
    assert read_header(b).metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"

    vector = torch.arange(32.0)
    c = with_words(tmp_path / "c.safetensors", tiny_networks, {"<s/1>": vector})
    assert run("convert", c, "--output", tmp_path / "d.safetensors", "--model", tiny_folder)[0] == 0
    assert {key: value.tolist() for key, value in load_file(tmp_path / "d-s1.safetensors").items()} == {
        "<s/1>": [vector.tolist()]
    }


def with_words(path: Path, tiny_networks: dict[str, nn.Module], vectors: dict[str, Tensor]) -> Path:
    """A numbered file that adapts the text encoder and brings words along."""
    layers = [name for name in adaptable_layers(tiny_networks["text_encoder"]) if "self_attn" in name]
    numbers = {f"text_encoder:{i}:{piece}": torch.ones(*((32, 1) if piece == "up" else (1, 32)))
               for i in range(len(layers)) for piece in ("up", "down")}  # fmt: skip
    return write(path, numbers | vectors, dict.fromkeys(vectors, "<embed>"))


def test_no_embedding_is_lost_or_written_over(
    tiny_folder: Path, tiny_networks: dict[str, nn.Module], tmp_path: Path, run: Run
) -> None:
    a = with_words(tmp_path / "a.safetensors", tiny_networks, {"<s1>": torch.ones(32), "<s-1>": torch.zeros(32)})
    b, out = (
        with_words(tmp_path / "b.safetensors", tiny_networks, {"<s1>": torch.ones(32)}),
        tmp_path / "out.safetensors",
    )
    assert run("convert", a, "--output", out, "--model", tiny_folder)[0] == 0
    written = {key for file in tmp_path.glob("out-*.safetensors") for key in load_file(file)}
    assert written == {"<s1>", "<s-1>"}
    out.unlink()
    code, _, err = run("convert", b, "--output", out, "--model", tiny_folder)
    assert (code, "out-s1.safetensors is there already" in err, out.exists()) == (2, True, False)
    assert run("convert", b, "--output", out, "--model", tiny_folder, "--overwrite")[0] == 0
    for output in (tmp_path / "both.safetensors", tmp_path / "both"):
        code, _, err = run("merge", a, b, "--output", output, "--model", tiny_folder)
        assert (code, "embeddings of the same token" in err) == (2, True)
        assert not list(tmp_path.glob("both*"))


# --- merge and resize


def test_merge_into_one_equals_all_side_by_side(
    tiny_folder: Path, tiny_networks: dict[str, nn.Module], tmp_path: Path, run: Run
) -> None:
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    save_lora(a, random_parts(tiny_networks, targets=("to_q", "conv1")), INFO)
    save_lora(b, random_parts(tiny_networks, targets=("to_q", "fc1"), alphas=(1.0, 2.0)), INFO, lora_format="peft")
    assert run("merge", f"{a}:0.8", f"{b}:-0.5", "--output", c, "--model", tiny_folder)[0] == 0
    assert len({w.alpha for part in load_lora(c, tiny_networks).parts.values() for w in part.values()}) == 1
    base = {part: network.state_dict() for part, network in tiny_networks.items()}
    one, two = (merged(tiny_folder, load_lora(path, tiny_networks), lora_scale=s) for path, s in ((a, 0.8), (b, -0.5)))
    total = {part: {key: one[part][key] + two[part][key] - base[part][key] for key in base[part]} for part in base}
    same_weights(merged(tiny_folder, load_lora(c, tiny_networks)), total, tolerance=1e-6)
    same_weights(in_a_pipeline(tiny_folder, c), total, tolerance=1e-6)
    info = load_lora(c, tiny_networks).info
    assert info.recipe == {
        "merged": [{"file": "a.safetensors", "scale": 0.8}, {"file": "b.safetensors", "scale": -0.5}]
    }
    assert info.trigger == "8bit"


def test_merge_into_the_base_is_a_folder_that_diffusers_opens(
    tiny_folder: Path, tiny_networks: dict[str, nn.Module], tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "my model"
    save_lora(a, random_parts(tiny_networks), INFO)
    save_lora(b, random_parts(tiny_networks, targets=("to_q",)), INFO)
    caplog.set_level(logging.INFO)
    code, _, _ = run("merge", f"{a}:0.8", b, "--output", output, "--model", tiny_folder)
    assert code == 0
    drawn_with = f"sample.py --model {shlex.quote(str(output))} --lora none"
    assert f"wrote {output}, a model folder; draw with: {drawn_with}" in caplog.messages
    pipe = diffusers.DiffusionPipeline.from_pretrained(output)
    base = {part: network.state_dict() for part, network in tiny_networks.items()}
    one, two = (merged(tiny_folder, load_lora(path, tiny_networks), lora_scale=s) for path, s in ((a, 0.8), (b, 1.0)))
    total = {part: {key: one[part][key] + two[part][key] - base[part][key] for key in base[part]} for part in base}
    same_weights({part: getattr(pipe, part).double().state_dict() for part in tiny_networks}, total, tolerance=1e-6)
    halved = tmp_path / "half"
    assert run("merge", a, "--output", halved, "--model", tiny_folder, "--dtype", "float16")[0] == 0
    files = [*halved.glob("*/*.safetensors")]
    assert len(files) == 3
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.float16}
    code, _, err = run("merge", a, "--output", output, "--model", tiny_folder)
    assert (code, err.count("\n")) == (2, 1)
    assert "is there already" in err


def test_a_merge_too_strong_for_float16_is_refused(
    tiny_folder: Path, tiny_networks: dict[str, nn.Module], tmp_path: Path, run: Run
) -> None:
    a, output = tmp_path / "a.safetensors", tmp_path / "model"
    save_lora(a, random_parts(tiny_networks, targets=("to_q",)), INFO)
    code, _, err = run("merge", f"{a}:1e8", "--output", output, "--model", tiny_folder, "--dtype", "float16")
    assert (code, err.count("\n")) == (7, 1)
    assert "to_q.weight has values that are NaN or too large for torch.float16" in err
    assert not output.exists()


def test_the_models_files_can_be_chosen_as_in_the_scripts(
    tiny_folder: Path, tiny_networks: dict[str, nn.Module], tmp_path: Path, run: Run
) -> None:
    a, half = tmp_path / "a.safetensors", tmp_path / "half"
    save_lora(a, random_parts(tiny_networks, targets=("to_q",)), INFO)
    shutil.copytree(tiny_folder, half)
    for file in half.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    for command in (("convert",), ("resize", "--rank", 1), ("merge",)):
        arguments = (*command, a, "--output", tmp_path / f"{command[0]}.safetensors", "--model", half)
        assert "choose it with --variant" in run(*arguments)[2]
        assert run(*arguments, "--variant", "fp16")[0] == 0
    arguments = ("merge", a, "--output", tmp_path / "merged", "--model", half, "--variant", "fp16")
    assert "only a Hub repository has revisions" in run(*arguments, "--revision", "main")[2]
    assert "says epsilon. Leave it out" in run(*arguments, "--prediction-type", "v_prediction")[2]
    assert run(*arguments)[0] == 0


def test_resize_prints_what_is_kept(
    tiny_folder: Path, tiny_networks: dict[str, nn.Module], tmp_path: Path, run: Run
) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    parts = random_parts(tiny_networks, targets=("to_q", "conv1", "fc1"), alphas=(2.0,))
    save_lora(a, parts, INFO)
    code, shown, _ = run("resize", a, "--rank", 2, "--output", b, "--model", tiny_folder)
    assert code == 0
    small = load_lora(b, tiny_networks)
    assert {w.rank for part in small.parts.values() for w in part.values()} == {1, 2}
    kept, whole, shares = 0.0, 0.0, {}
    for part, weights in parts.items():
        for path, lora in weights.items():
            values = torch.linalg.svdvals((lora.alpha / lora.rank * lora.product(torch.float64)).flatten(1)).square()
            kept, whole = kept + float(values[:2].sum()), whole + float(values.sum())
            shares[f"{part}: {path}"] = float(values[:2].sum() / values.sum())
    worst = min(shares, key=lambda name: shares[name])
    mean = sum(shares.values()) / len(shares)
    assert shown == (
        f"energy kept: {kept / whole:.2%} in total, {mean:.2%} in the mean of the modules\n"
        f"least kept: {shares[worst]:.2%} in {worst}\n"
    )
    full = tmp_path / "c.safetensors"
    shown = run("resize", a, "--rank", 3, "--output", full, "--model", tiny_folder)[1]
    assert shown == "no module has a rank above 3: nothing was made smaller\n"
    assert all(torch.equal(tensor, load_file(full)[key]) for key, tensor in load_file(a).items())


# --- refusals


def test_loras_of_different_families_are_not_merged(tmp_path: Path, run: Run) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    files = []
    for letter, width in (("a", 64), ("b", 768), ("c", 64)):
        down, up = torch.ones(1, width), torch.ones(32, 1)
        state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        files.append(write(tmp_path / f"{letter}.safetensors", state))
    by_keys = {f"lora_te2_x.lora_{side}.weight": torch.ones(1, 1) for side in ("down", "up")}
    files.append(write(tmp_path / "d.safetensors", by_keys))
    said = "different bases: pocket (a.safetensors, c.safetensors), SD 1.x (b.safetensors), SDXL (d.safetensors). Only"
    for output in (("out.safetensors",), ("out", "--model", "pocket")):
        code, _, err = run("merge", *files, "--output", tmp_path / output[0], *output[1:])
        assert (code, err.count("\n"), said in err) == (2, 1, True), err
        assert not list(tmp_path.glob("out*"))


def test_refusals_are_one_line(
    tiny_folder: Path, tiny_networks: dict[str, nn.Module], tmp_path: Path, run: Run
) -> None:
    a, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    parts = random_parts(tiny_networks, targets=("to_q",))
    save_lora(a, parts, LoRAInfo(rank=1, alpha=1))
    dora = tmp_path / "dora.safetensors"
    magnitudes = {p: LoRAWeights(w.down, w.up, w.alpha, torch.ones(len(w.up))) for p, w in parts["unet"].items()}
    save_lora(dora, {"unet": magnitudes}, INFO)
    missing = tmp_path / "none"
    flux = write(tmp_path / "f.safetensors", {f"transformer.x.lora_{side}.weight": torch.ones(1, 1) for side in "AB"})
    for arguments, code, message in (
        ((), 2, "{inspect, convert, merge, resize}"),
        (("inspect",), 2, "A LoRA file in any layout"),
        (("inspect", missing), 4, "No such file"),
        (("convert", a), 2, "--output"),
        (("convert", a, "--output", out), 2, "its family is of no known family. Say with --model what it is for"),
        (
            ("convert", a, "--output", a, "--model", tiny_folder),
            2,
            "is there already. Choose another --output, or --overwr",
        ),
        (("convert", flux, "--output", out), 4, "it is for FLUX or SD 3, which is not supported"),
        (("convert", a, "--output", out, "--model", "pocket"), 4, "the model is pocket"),
        (("merge", "--output", out), 2, "PATH or PATH:SCALE"),
        (("merge", f"{a}:x", "--output", out), 2, "expected PATH or PATH:SCALE"),
        (("merge", f"{a}:nan", "--output", out), 2, "expected PATH or PATH:SCALE"),
        (("merge", a, "--output", tmp_path / "folder"), 2, "For a folder, give --model, too"),
        (("merge", a, "--output", tmp_path / "b", "--rank", 2, "--model", tiny_folder), 2, "a model has no rank"),
        (("merge", a, dora, "--output", out, "--model", tiny_folder), 2, "--output FOLDER --model MODEL"),
        (("resize", dora, "--rank", 1, "--output", out, "--model", tiny_folder), 2, "a DoRA cannot be resized"),
        (("resize", missing, "--rank", 0, "--output", out), 2, "--rank 0: expected a whole number of at least 1."),
        (("merge", a, "--rank", -1, "--output", out, "--model", "none"), 2, "--rank -1: expected a whole number of at"),
        (("convert", missing, "--output", tmp_path / "b"), 2, "expected the name of a file that ends in .safetensors"),
        (("resize", missing, "--rank", 1, "--output", tmp_path / "b"), 2, "a file that ends in .safetensors"),
        (
            ("resize", a, "--rank", 1, "--output", tmp_path / "no" / "x.safetensors", "--model", tiny_folder),
            6,
            "No such file",
        ),
    ):
        got, _, err = run(*arguments)
        assert (got, err.count("\n")) == (code, 1), (arguments, err)
        assert message in err
    assert not out.exists()
    before = a.read_bytes()
    assert run("resize", a, "--rank", 1, "--output", a, "--model", tiny_folder, "--overwrite")[0] == 0
    assert a.read_bytes() != before


def test_help_comes_without_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['lora_file', '--help']\n"
        "try: runpy.run_module('minisd.lora_file', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "{inspect,convert,merge,resize}" in done.stdout
