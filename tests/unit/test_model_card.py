"""What is published of a run: the model card, and the files beside it."""

from __future__ import annotations

import getpass
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import save_file

from minisd.a1111_text import parameters_text
from minisd.command_line import parse_args
from minisd.config import TrainConfig
from minisd.errors import UsageError, one_line
from minisd.images import save_png
from minisd.lora_info import LoRAInfo
from minisd.lora_layers import LoRAWeights
from minisd.lora_writer import LoRAFormat, save_lora
from minisd.publication import write_publication
from minisd.sampling import SamplingSettings
from tests.lora_files import INFO

REPO = "someone/my-8bit_style"
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
HOSTILE = (
    '8bit <script>alert(1)</script> "><img src=x onerror=y> | a | `code` [a](http://evil.example) ![i](//evil.example)'
    " www.evil.example https://evil.example a@evil.example **bold** $x$ &lt; \u202egnp\n---\n# head\n```\n<b>"
)
SETTINGS = SamplingSettings(height=64, width=64)


def write_lora(path: Path, info: LoRAInfo = INFO, lora_format: LoRAFormat = "kohya") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {LAYER: LoRAWeights(torch.ones(4, 320), torch.ones(320, 4), 6.0)}
    save_lora(path, {"unet": weights}, replace(info), lora_format=lora_format)


def draw(path: Path, prompt: str, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(Image.new("RGB", (64, 64), colour), path, parameters=parameters_text(SETTINGS, prompt, 5, "base"))


def write_run(run: Path, prompts: tuple[str, ...] = ("8bit castle", "8bit boat")) -> Path:
    """A run of 1000 steps that has ended, with its validation pictures."""
    info = replace(
        INFO, recipe={**INFO.recipe, "data": str(run / "pictures"), "snr_gamma": 5.0, "init_lora_sha256": "ab"}
    )
    write_lora(run / "lora.safetensors", info)
    write_lora(run / "checkpoints" / "step-000500" / "lora.safetensors", info)
    (run / "checkpoints" / "step-000500" / "optim.safetensors").write_bytes(b"state")
    for step, colour in ((0, "red"), (500, "green"), (1000, "blue")):
        for number, prompt in enumerate(prompts):
            draw(run / "samples" / f"step-{step:06d}" / f"{number:02d}-0.png", prompt, colour)
    (run / "pictures.csv").write_text("file_name,width\n" + "".join(f"{n}.png,64\n" for n in range(7)))
    return run


def evaluate(run: Path) -> None:
    """An evaluation that picks step 500."""
    rows = []
    for step, agreement in ((0, 0.5), (500, 0.75), (1000, 0.25)):
        draw(run / "evaluation" / f"step-{step:06d}" / "00.png", "8bit moon", "yellow")
        figures = {"held_out_ratio": None, "agreement": agreement}
        lora = f"checkpoints/step-{step:06d}/lora.safetensors" if step else None
        rows.append({"step": step, "lora": lora, "figures": figures, "pictures": [f"step-{step:06d}/00.png"]})
    shown = [
        {"name": "held_out_ratio", "title": "?", "better": "low", "format": ".3f"},
        {"name": "agreement", "title": "a | b", "better": "high", "format": ".0%"},
    ]
    evaluation = {
        "judge": "pocket",
        "prompts": [{"text": "8bit moon", "inside": True, "seed": 5}],
        "figures": shown,
        "rows": rows,
        "pick": {"step": 500, "why": "nearest to the <style>"},
        "settings": {},
        "sweep": {"step": 500, "prompts": [], "rows": [], "suggested": 0.7, "why": ""},
    }
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))


def publication(run: Path, lora: str = "lora.safetensors", license_name: str | None = None) -> dict[str, bytes]:
    names = write_publication(run, REPO, run / lora, license_name)
    folder = run / "hub"
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert sorted(names) == sorted(found)
    return found


def card_of(files: dict[str, bytes]) -> str:
    return files["README.md"].decode()


def test_the_head_is_what_the_hub_reads(tmp_path: Path) -> None:
    files = publication(write_run(tmp_path))
    assert ModelCard(card_of(files)).data.to_dict() == {
        "license": "creativeml-openrail-m",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "stable-diffusion", "lora", "diffusers", "template:sd-lora", "minisd"],
        "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "base_model_relation": "adapter",
        "instance_prompt": "8bit",
        "widget": [
            {"text": "8bit castle", "output": {"url": "images/00.png"}},
            {"text": "8bit boat", "output": {"url": "images/01.png"}},
        ],
    }


def test_no_file_but_these_and_nothing_of_the_user_in_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "alice-secret")
    evaluate(run)
    files = publication(run)
    assert sorted(files) == [
        "README.md",
        "images/00.png",
        "images/grid.png",
        "my-8bit_style.safetensors",
        "recipe.json",
    ]
    assert files["my-8bit_style.safetensors"] == (run / "lora.safetensors").read_bytes()
    for content in files.values():
        for private in ("alice-secret", str(tmp_path), f"/{getpass.getuser()}", socket.gethostname()):
            assert private.encode() not in content


@pytest.mark.parametrize("where", ["prompt", "trigger", "base", "recipe", "why"])
def test_hostile_words_are_only_words(where: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, (HOSTILE,) if where == "prompt" else ("8bit castle",))
    hostile = {
        "trigger": replace(INFO, trigger=HOSTILE),
        "base": replace(INFO, base_model=HOSTILE.replace("/", "")),
        "recipe": replace(INFO, recipe={HOSTILE: HOSTILE}),
    }
    write_lora(run / "lora.safetensors", hostile.get(where, INFO))
    if where == "why":
        evaluate(run)
        path = run / "evaluation" / "evaluation.json"
        evaluation = json.loads(path.read_text()) | {"pick": {"step": 1000, "why": HOSTILE}}
        evaluation["figures"][1]["title"] = HOSTILE
        path.write_text(json.dumps(evaluation))
    text = card_of(publication(run))

    head = ModelCard(text)
    assert head.data.license == "creativeml-openrail-m"
    tokens = list(MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(head.text))
    tokens += [child for token in tokens for child in token.children or ()]
    assert [token.content.strip() for token in tokens if token.type.startswith("html_")] == ["<Gallery />"]
    links = {str(token.attrs["href"]) for token in tokens if token.type == "link_open"}
    assert links <= {f"https://huggingface.co/{INFO.base_model}", "my-8bit_style.safetensors"}
    pictures = [token.attrs["src"] for token in tokens if token.type == "image"]
    assert pictures == ["images/grid.png"]
    of_template = {"table_open": text.count("\n|---"), "heading_open": text.count("\n## ") + 1, "fence": 2}
    for kind, count in of_template.items():
        assert sum(token.type == kind for token in tokens) == count, kind
    in_code = [token.content for token in tokens if token.type == "code_inline"]
    assert (one_line(" ".join(HOSTILE.split())) in in_code) == (where in ("prompt", "trigger"))
    assert "code" not in in_code
    cells = [token for token in tokens if token.type in ("th_open", "td_open")]
    assert len(cells) == sum((line.replace("\\|", "").count("|") - 1) for line in text.splitlines() if line[:2] == "| ")
    shown = "".join(token.content for token in tokens if token.type in ("text", "code_inline", "fence"))
    assert "alert(1)" in shown
    assert "\u202e" not in text


@pytest.mark.parametrize(
    ("info", "given", "license_name", "base"),
    [
        (INFO, "cc-by-4.0", "cc-by-4.0", INFO.base_model),
        (replace(INFO, base_model_version="sdxl_base_v1-0"), None, "openrail++", INFO.base_model),
        (replace(INFO, base_model_version="unknown"), None, None, INFO.base_model),
        (replace(INFO, base_model="my-model.safetensors"), None, "creativeml-openrail-m", None),
        (replace(INFO, base_model="pocket", base_model_version="pocket"), None, None, None),
    ],
)
def test_licence_and_base_are_named_where_they_are_known(
    info: LoRAInfo, given: str | None, license_name: str | None, base: str | None, tmp_path: Path
) -> None:
    run = write_run(tmp_path)
    write_lora(run / "lora.safetensors", info)
    text = card_of(publication(run, license_name=given))
    data = ModelCard(text).data
    assert (data.license, data.base_model) == (license_name, base)
    assert f'from_pretrained("{base or "FOLDER OF THE BASE MODEL"}"' in text
    assert ("base_model" in text) == (base is not None)


def test_the_recipe_trains_another_one(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_lora(
        run / "lora.safetensors", replace(INFO, recipe={**INFO.recipe, "init_lora_sha256": "ab", "model": "pocket"})
    )
    publication(run)
    config = parse_args(TrainConfig, ["--config", str(run / "hub" / "recipe.json"), "--data", "pictures"])
    assert (config.model, config.learning_rate, config.rank, config.trigger) == ("pocket", 1e-4, 4, "8bit")


def test_pictures_and_figures_are_those_of_the_lora_that_is_published(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "validation.jsonl").write_text(
        '{"step": 500, "train": {"ratio": 0.5}, "held_out": {"ratio": 0.75}}\n{"step": 1000, "train": {"ratio": 1}}\n{'
    )
    lora = "checkpoints/step-000500/lora.safetensors"
    files = publication(run, lora)
    assert files["images/00.png"] == (run / "samples" / "step-000500" / "00-0.png").read_bytes()
    grid = Image.open(run / "hub" / "images" / "grid.png")
    assert (grid.size, grid.getpixel((0, 0)), grid.getpixel((300, 300))) == ((512, 512), (255, 0, 0), (0, 128, 0))
    text = card_of(files)
    assert "| steps | 500 of 1000 |" in text
    assert "on 7 pictures" in text
    assert "| loss on training pictures, of the base's | 1 | 0.500 |" in text
    assert "| loss on held-out pictures, of the base's | 1 | 0.750 |" in text
    assert ":1.0 --prompt" in text

    evaluate(run)
    text = card_of(publication(run, lora))
    assert "| a \\| b | 50% | 75% |" in text
    assert "loss on" not in text
    assert "nearest to the \\<style\\>" in text
    assert "(seed 5)" in text
    assert "8bit moon" in text
    assert "<lora:my-8bit_style:0.7>" in text
    text = card_of(publication(run))
    assert "| a \\| b | 50% | 25% |" in text
    assert "nearest to" not in text
    assert "<lora:my-8bit_style:1.0>" in text  # the sweep was of the other step
    assert "| steps | 1000 |" in text
    path = run / "evaluation" / "evaluation.json"
    path.write_text(json.dumps((whole := json.loads(path.read_text())) | {"rows": whole["rows"][:2]}))
    text = card_of(publication(run))  # an evaluation from before this step
    assert "8bit castle" in text
    assert "| loss on training pictures, of the base's | 1 | 1.000 |" in text

    write_lora(run / "other.safetensors")
    files = publication(run, "other.safetensors")
    assert not any(name.startswith("images/") for name in files)  # nor are those of before left behind
    assert "## How good" not in card_of(files)
    assert "steps" not in card_of(files)


def test_only_pictures_that_minisd_drew_are_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path, ("a", "b", "c"))
    samples = run / "samples" / "step-001000"
    (samples / "00-0.png").unlink()
    save_png(Image.new("RGB", (64, 64)), samples / "00-0.png", parameters="a\nSteps: 20, Version: v1.10.1")
    (samples / "01-0.png").write_bytes((samples / "01-0.png").read_bytes()[:-40])
    files = publication(run)
    assert sorted(name for name in files if name.startswith("images/")) == ["images/00.png", "images/grid.png"]
    assert files["images/00.png"] == (samples / "02-0.png").read_bytes()
    assert "not drawn by minisd" in caplog.text
    assert "damaged" in caplog.text


def test_no_picture_outside_the_run_is_published(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    draw(tmp_path / "other.png", "secret", "pink")
    samples = run / "samples" / "step-001000"
    (samples / "00-0.png").unlink()
    (samples / "00-0.png").symlink_to(tmp_path / "other.png")
    files = publication(run)
    assert files["images/00.png"] == (samples / "01-0.png").read_bytes()
    evaluate(run)
    path = run / "evaluation" / "evaluation.json"
    for name in ("../../other.png", str(tmp_path / "other.png"), "\0", 7):
        evaluation = json.loads(path.read_text())
        evaluation["rows"][2]["pictures"] = [name]
        path.write_text(json.dumps(evaluation))
        assert not any(name.startswith("images/") for name in publication(run)), name


def test_an_evaluation_that_cannot_be_read_does_not_hold_up_the_publication(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "validation.jsonl").write_text('{"step": 1000, "held_out": {"ratio": 0.75}}\n[\n')
    (run / "evaluation").mkdir()
    for damaged in ("[]", '{"pick": {"step": "1000"}}', '{"rows": [{"step": 1000}]}', "{"):
        (run / "evaluation" / "evaluation.json").write_text(damaged)
        text = card_of(publication(run))
        assert "| loss on held-out pictures, of the base's | 1 | 0.750 |" in text


def test_a_lora_of_another_program_is_refused(tmp_path: Path) -> None:
    """Its header may say where its pictures were."""
    run = write_run(tmp_path)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 320), f"{name}.lora_up.weight": torch.ones(320, 4)}
    save_file(tensors, run / "kohya.safetensors", {"ss_dataset_dirs": "/home/alice"})
    with pytest.raises(UsageError, match="not written by minisd"):
        publication(run, "kohya.safetensors")


def test_pefts_keys_are_not_said_to_open_everywhere(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert "models/loras" in card_of(publication(run))
    write_lora(run / "lora.safetensors", lora_format="peft")
    text = card_of(publication(run))
    assert "models/loras" not in text
    assert "lora_file convert my-8bit_style.safetensors" in text
