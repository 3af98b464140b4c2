"""Every key of our files at full size, against tables put together here from the structure of the original networks.

A1111 and ComfyUI look a module up under these names (formats.md, 4): of SD 1.x and 2.x under diffusers' with "_" for
".", of SDXL under those of the original code; text encoders under Hugging Face's, with "text_model".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from minisd.families import Family, meta_networks
from minisd.ldm_modules import SDXL_LAYOUT, UNetLayout, layout_of, ldm_module_name
from minisd.lora import LoRAWeights, adaptable_layers
from minisd.lora_info import LoRAInfo
from minisd.lora_peft import Size, peft_alpha, peft_config
from minisd.lora_positional import numbered_layers
from minisd.lora_reader import load_lora, read_lora_info
from minisd.lora_writer import lora_bytes
from minisd.model_files import read_header

VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
# By level on the way down: blocks of a transformer; none has no attention. The middle has as many as the last that has.
DEPTHS = {"sd1": (1, 1, 1, 0), "sd2": (1, 1, 1, 0), "sdxl": (0, 2, 10)}
MIDDLE = {"sd1": 1, "sd2": 1, "sdxl": 10}
TEXT_LAYERS = {
    "sd1": {"text_encoder": 12},
    "sd2": {"text_encoder": 23},
    "sdxl": {"text_encoder": 12, "text_encoder_2": 32},
}
# Original name in a residual block -> diffusers'.
RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
NORMS = {"in_layers.0": "norm1", "out_layers.0": "norm2"}
TRANSFORMER = [
    *(f"attn{n}.to_{name}" for n in (1, 2) for name in ("q", "k", "v", "out.0")),
    *("ff.net.0.proj", "ff.net.2"),
]


def unet_layers(family: str, *, norms: bool = False) -> Iterator[tuple[str, str]]:
    """(original name, diffusers' name) of every linear layer and convolution of a UNet, walking it as LDM builds it."""
    resnet = RESNET | (NORMS if norms else {})
    depths = DEPTHS[family]

    def block(ldm: str, ours: str, *, shortcut: bool) -> Iterator[tuple[str, str]]:
        for theirs, name in resnet.items():
            if shortcut or theirs != "skip_connection":
                yield f"{ldm}.{theirs}", f"{ours}.{name}"

    def transformer(ldm: str, ours: str, depth: int) -> Iterator[tuple[str, str]]:
        inner = [*(["norm"] if norms else []), "proj_in", "proj_out"]
        inner += [f"transformer_blocks.{k}.{name}" for k in range(depth) for name in TRANSFORMER]
        inner += [f"transformer_blocks.{k}.norm{n}" for k in range(depth) for n in (1, 2, 3)] if norms else []
        yield from ((f"{ldm}.{name}", f"{ours}.{name}") for name in inner)

    yield "input_blocks.0.0", "conv_in"
    yield from ((f"time_embed.{i}", f"time_embedding.linear_{n}") for i, n in ((0, 1), (2, 2)))
    if family == "sdxl":
        yield from ((f"label_emb.0.{i}", f"add_embedding.linear_{n}") for i, n in ((0, 1), (2, 2)))
    number = 1
    for level, depth in enumerate(depths):
        for n in range(2):
            # The first block of a level sees the width of the one before: 320, 640, 1280 all change it, the fourth not.
            widens = n == 0 and level in (1, 2)
            yield from block(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{n}", shortcut=widens)
            if depth:
                yield from transformer(f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{n}", depth)
            number += 1
        if level < len(depths) - 1:
            yield f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    yield from block("middle_block.0", "mid_block.resnets.0", shortcut=False)
    yield from transformer("middle_block.1", "mid_block.attentions.0", MIDDLE[family])
    yield from block("middle_block.2", "mid_block.resnets.1", shortcut=False)
    number = 0
    for level, depth in enumerate(reversed(depths)):
        for n in range(3):
            yield from block(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{n}", shortcut=True)
            if depth:
                yield from transformer(f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{n}", depth)
            if n == 2 and level < len(depths) - 1:
                place = 2 if depth else 1  # behind the transformer, if there is one
                yield f"output_blocks.{number}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"
            number += 1
    if norms:
        yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"


def text_layers(layers: int) -> list[str]:
    names = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    return [f"text_model.encoder.layers.{i}.{name}" for i in range(layers) for name in names]


@pytest.fixture(scope="module", params=list(VERSIONS))
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def networks(family: Family) -> dict[str, nn.Module]:
    return meta_networks(family)


def every_layer(networks: dict[str, nn.Module]) -> dict[str, dict[str, LoRAWeights]]:
    """An adapter of rank 1 for each layer but the projection of the pooled prompt, which no program adapts."""
    parts: dict[str, dict[str, LoRAWeights]] = {}
    for part, network in networks.items():
        for path, layer in adaptable_layers(network).items():
            if path != "text_projection":
                out, *inner = layer.weight.shape
                weights = LoRAWeights(torch.ones(1, *inner), torch.ones(out, 1, *[1] * (len(inner) - 1)), 1.0)
                parts.setdefault(part, {})[path] = weights
    return parts


def test_kohyas_keys_are_those_that_a1111_and_comfyui_look_up(
    family: Family, networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    parts = every_layer(networks)
    file = tmp_path / "a.safetensors"
    file.write_bytes(lora_bytes(parts, LoRAInfo(rank=1, alpha=1, base_model_version=VERSIONS[family])))
    unet = [f"unet.{ldm if family == 'sdxl' else ours}" for ldm, ours in unet_layers(family)]
    prefix = {"text_encoder": "te1" if family == "sdxl" else "te", "text_encoder_2": "te2"}
    text = [f"{prefix[part]}.{path}" for part, n in TEXT_LAYERS[family].items() for path in text_layers(n)]
    modules = ["lora_" + name.replace(".", "_") for name in (*unet, *text)]
    assert len(set(modules)) == len(modules)
    expected = {f"{name}.{piece}" for name in modules for piece in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert read_header(file).tensors.keys() == expected
    read = load_lora(file, networks)
    assert {part: list(weights) for part, weights in read.parts.items()} == {p: list(w) for p, w in parts.items()}


def test_pefts_keys_are_diffusers_paths(family: Family, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    parts = every_layer(networks)
    file = tmp_path / "a.safetensors"
    file.write_bytes(lora_bytes(parts, LoRAInfo(rank=1, alpha=1), lora_format="peft"))
    modules = [f"unet.{ours}" for _, ours in unet_layers(family)]
    modules += [f"{part}.{path}" for part, n in TEXT_LAYERS[family].items() for path in text_layers(n)]
    expected = {f"{name}.lora_{side}.weight" for name in modules for side in "AB"}
    assert read_header(file).tensors.keys() == expected
    read = load_lora(file, networks)
    assert {part: list(weights) for part, weights in read.parts.items()} == {p: list(w) for p, w in parts.items()}


def test_the_names_in_the_original_code_are_right_for_every_module_with_weights(
    family: Family, networks: dict[str, nn.Module]
) -> None:
    unet = networks["unet"]
    names = [name for name, _ in unet.named_modules()]
    layout = layout_of(names)
    assert layout == (SDXL_LAYOUT if family == "sdxl" else UNetLayout(2, (False, True, True, True)))
    with_weights = {key.rpartition(".")[0] for key in unet.state_dict()}
    expected = {ours: ldm for ldm, ours in unet_layers(family, norms=True)}
    assert {name: ldm_module_name(name, layout) for name in with_weights} == expected


@pytest.mark.parametrize(
    "name",
    ["", "down_blocks.0", "mid_block.resnets.2.conv1", "mid_block.attentions.0", "up_blocks.9.resnets.0.conv1",
     "down_blocks.0.upsamplers.0.conv", "up_blocks.0.resnets.0.conv3", "text_model.encoder"],
)  # fmt: skip
def test_what_has_no_weights_has_no_name_in_the_original_code(name: str) -> None:
    with pytest.raises(ValueError, match="is not a module with weights of a UNet"):
        ldm_module_name(name, SDXL_LAYOUT)


def test_kohyas_default_targets_are_as_many_as_measured(family: Family, networks: dict[str, nn.Module]) -> None:
    """Of real files and of kohya's network: formats.md, 4.2 and 6."""
    layers = adaptable_layers(networks["unet"])
    inner = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
    chosen = [layer.weight for path, layer in layers.items() if path.endswith(inner)]
    per_rank = sum(weight.shape[0] + weight[0].numel() for weight in chosen)
    counts = {"sd1": (192, 423_936), "sdxl": (722, 2_659_840)}
    if family in counts:
        assert (len(chosen), per_rank) == counts[family]


def test_numbers_follow_the_order_of_diffusers_0_11() -> None:
    """Down, up, middle; in a block attn1, the gate, attn2; in CLIP k, v, q, out: formats.md, 4.5."""
    networks = {part: list(adaptable_layers(network)) for part, network in meta_networks("sd1").items()}
    blocks = [f"down_blocks.{level}.attentions.{n}" for level in range(3) for n in range(2)]
    blocks += [f"up_blocks.{level}.attentions.{n}" for level in (1, 2, 3) for n in range(3)] + [
        "mid_block.attentions.0"
    ]
    inner = [f"attn1.to_{name}" for name in ("q", "k", "v", "out.0")] + ["ff.net.0.proj"]
    inner += [f"attn2.to_{name}" for name in ("q", "k", "v", "out.0")]
    expected = [f"{block}.transformer_blocks.0.{name}" for block in blocks for name in inner]
    assert numbered_layers("unet", reversed(networks["unet"])) == expected
    expected = [f"encoder.layers.{i}.self_attn.{name}_proj" for i in range(12) for name in ("k", "v", "q", "out")]
    assert numbered_layers("text_encoder", reversed(networks["text_encoder"])) == expected


DISNEY = Path(__file__).resolve().parents[3] / "shared" / "lora_files" / "lora_disney.safetensors"


@pytest.mark.skipif(not DISNEY.is_file(), reason="the folder of files from the wild is not here")
def test_a_lora_that_somebody_trained_fits_sd15_in_full() -> None:
    networks = meta_networks("sd1")
    lora = load_lora(DISNEY, networks)
    assert {part: len(weights) for part, weights in lora.parts.items()} == {"unet": 144, "text_encoder": 48}
    for part, weights in lora.parts.items():
        layers = adaptable_layers(networks[part])
        assert all(w.shape == tuple(layers[path].weight.shape) for path, w in weights.items())
        assert {(w.rank, w.alpha) for w in weights.values()} == {(1, 1.0)}
    inner = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj")
    assert list(lora.parts["unet"]) == [p for p in adaptable_layers(networks["unet"]) if p.endswith(inner)]
    # Numbers counted by hand: 9 in a block, the middle last; k, v, q, out in the text encoder.
    tensors = load_file(DISNEY)
    for key, path in {
        "unet:4": "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "unet:60": "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "unet:135": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    }.items():
        assert torch.equal(lora.parts["unet"][path].up, tensors[f"{key}:up"])
    assert torch.equal(
        lora.parts["text_encoder"]["encoder.layers.11.self_attn.q_proj"].up, tensors["text_encoder:46:up"]
    )
    assert lora.info.targets == read_lora_info(DISNEY).targets == tuple(sorted(inner))
    assert {token: list(vectors.shape) for token, vectors in lora.embeddings.items()} == {
        "<s1>": [1, 768],
        "<s2>": [1, 768],
    }


@pytest.mark.parametrize("pattern", ["text_model.encoder.layers.1.fc1", "^encoder.layers.1.fc1$", "layers.1.fc1"])
@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_an_alpha_of_a_text_encoder_is_found_with_and_without_its_prefix(pattern: str, prefix: str) -> None:
    config = {"lora_alpha": 1, "alpha_pattern": {pattern: 3}}
    alphas = {n: peft_alpha(config, f"{prefix}encoder.layers.{n}.fc1", 2, is_dora=False) for n in (1, 11)}
    assert alphas == {1: 3.0, 11: 1.0}


def test_pefts_configuration_gives_back_every_rank_and_alpha() -> None:
    sizes = {f"block.{i}.to_{name}": Size(1 + i % 3, 0.1 + i) for i in range(12) for name in "qk"}
    config = json.loads(peft_config({"unet": sizes}, dora={"unet": False}))
    plain = {key.removeprefix("unet."): value for key, value in config.items()}
    assert {path: peft_alpha(plain, path, size.rank, is_dora=False) for path, size in sizes.items()} == {
        path: size.alpha for path, size in sizes.items()
    }
