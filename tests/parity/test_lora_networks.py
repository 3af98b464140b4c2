"""LoRA files of UNet and text encoders, SD and SDXL, against diffusers and PEFT: equal merged weights, both ways."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from minisd.errors import WeightsError
from minisd.lora import TARGETS, LoRAWeights
from minisd.lora_info import LoRAInfo
from minisd.lora_reader import LoRA, load_lora
from minisd.lora_writer import LoRAFormat, save_lora
from minisd.weights import load_model
from tests.lora_files import fused, in_a_pipeline, merged, random_parts, same_weights, write
from tests.tiny import write_tiny_model

TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
VERSIONS = {"sd1": "sd_v1", "sdxl": "sdxl_base_v1-0"}
INFOS = {family: LoRAInfo(rank=1, alpha=1, base_model_version=version) for family, version in VERSIONS.items()}


@pytest.fixture(scope="module", params=["sd1", "sdxl"])  # of SD 2.x the names are SD 1.x's
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(family)
    write_tiny_model(folder, family=family)
    return folder


@pytest.fixture(scope="module")
def networks(folder: Path) -> dict[str, nn.Module]:
    return load_model(str(folder)).networks()


# --- what we write


@pytest.mark.parametrize("lora_format", ["kohya", "peft"])
def test_diffusers_merges_our_file_as_we_do(
    folder: Path, family: str, networks: Mapping[str, nn.Module], tmp_path: Path, lora_format: LoRAFormat
) -> None:
    """Every layer of every network, each of its own rank, and of its own alpha where diffusers has an eye for it.

    Of kohya's alphas it drops those of attention layers that differ from the others (peft warns of it).
    """
    file = tmp_path / "ours.safetensors"
    parts = random_parts(networks, **({"alphas": (3.0,)} if lora_format == "kohya" else {}))
    save_lora(file, parts, INFOS[family], lora_format=lora_format)
    lora = load_lora(file, networks)
    assert {part: list(weights) for part, weights in lora.parts.items()} == {p: list(w) for p, w in parts.items()}
    same_weights(merged(folder, lora), merged(folder, LoRA(parts, {}, INFOS[family])), tolerance=0)
    same_weights(merged(folder, lora), in_a_pipeline(folder, file))


# --- what others write


def trained(folder: Path, **fields: Any) -> Any:
    """A pipeline with adapters of PEFT in all of its networks."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | fields
    pipe.unet.add_adapter(peft.LoraConfig(target_modules=list(TARGETS["attn"]), **settings))
    for part in text_encoders(pipe):
        getattr(pipe, part).add_adapter(peft.LoraConfig(target_modules=list(TEXT), **settings))
    return pipe


def text_encoders(pipe: Any) -> list[str]:
    return [part for part in ("text_encoder", "text_encoder_2") if getattr(pipe, part, None) is not None]


def states(pipe: Any) -> dict[str, dict[str, Tensor]]:
    """The adapters' tensors in PEFT's names."""
    return {part: get_peft_model_state_dict(getattr(pipe, part)) for part in ("unet", *text_encoders(pipe))}


def by_a_script(pipe: Any, to: Path, *, metadata: bool = True, old_names: bool = True) -> Path:
    """As the training scripts of diffusers: ".lora.down" or ".lora_A", with or without alphas in the header."""
    convert = convert_state_dict_to_diffusers if old_names else dict
    layers = {f"{part}_lora_layers": convert(state) for part, state in states(pipe).items()}
    networks = {part: getattr(pipe, part) for part in ("unet", *text_encoders(pipe))}
    type(pipe).save_lora_weights(to, **layers, **(_collate_lora_metadata(networks) if metadata else {}))
    return to / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("old_names", [True, False])
@pytest.mark.parametrize("metadata", [True, False])
def test_we_merge_what_diffusers_writes_as_it_does(
    folder: Path, networks: Mapping[str, nn.Module], tmp_path: Path, metadata: bool, old_names: bool
) -> None:
    pipe = trained(folder)
    lora = load_lora(by_a_script(pipe, tmp_path, metadata=metadata, old_names=old_names), networks)
    assert list(lora.parts) == list(networks)
    if not metadata:  # without it alpha is lost: the file says what it says
        for part in ("unet", *text_encoders(pipe)):
            for layer in getattr(pipe, part).modules():
                if isinstance(layer, peft.tuners.lora.LoraLayer):
                    layer.scaling["default"] = 1.0
    same_weights(merged(folder, lora), fused(pipe))


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"k_proj": 2, "to_k": 2}, "alpha_pattern": {"k_proj": 3, "attn2.to_k": 1}},
        {"use_rslora": True},
    ],
)
def test_ranks_and_alphas_of_the_header_count_in_every_network(
    folder: Path, networks: Mapping[str, nn.Module], tmp_path: Path, fields: dict[str, Any]
) -> None:
    pipe = trained(folder, **fields)
    same_weights(merged(folder, load_lora(by_a_script(pipe, tmp_path), networks)), fused(pipe))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_we_read_a_folder_of_peft(folder: Path, networks: Mapping[str, nn.Module], tmp_path: Path, part: str) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_k", "to_out.0", "q_proj", "fc1"], init_lora_weights=False
    )
    model = peft.get_peft_model(getattr(pipe, part), config)
    model.save_pretrained(tmp_path)
    ours = merged(folder, load_lora(tmp_path, networks))
    theirs = model.double().merge_and_unload().state_dict()
    same_weights({part: ours[part]}, {part: theirs})
    weights = tmp_path / "adapter_model.safetensors"
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(WeightsError, match=r"adapter_model\.bin is not read\. Pickled weights can run code"):
        load_lora(tmp_path, networks)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(WeightsError, match=r"a folder without adapter_model\.safetensors"):
        load_lora(tmp_path, networks)


def test_we_read_the_attention_processors_of_2023(
    folder: Path, networks: Mapping[str, nn.Module], tmp_path: Path
) -> None:
    """In the UNet to_out without its index; in the text encoder the UNet's names of the projections."""
    parts = random_parts(networks, targets=(*TARGETS["attn"], "q_proj", "k_proj", "v_proj", "out_proj"))
    names = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    state, expected = {}, {}
    for part, weights in parts.items():
        expected[part] = {path: replace(lora, alpha=float(lora.rank)) for path, lora in weights.items()}
        for path, lora in weights.items():
            block, _, projection = path.removesuffix(".0").removeprefix("text_model.").rpartition(".")
            key = f"text_model.{block}.{names.get(projection)}" if part != "unet" else f"{block}.processor.{projection}"
            state |= {f"{part}.{key}_lora.down.weight": lora.down, f"{part}.{key}_lora.up.weight": lora.up}
    lora = load_lora(write(tmp_path / "old.safetensors", state), networks)
    same_weights(merged(folder, lora), merged(folder, LoRA(expected, {}, lora.info)), tolerance=0)


def kohya_of(parts: Mapping[str, Mapping[str, LoRAWeights]], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """A file as kohya's scripts write it for SD 1.x: diffusers' names, flat."""
    state = {}
    for part, weights in parts.items():
        for path, lora in weights.items():
            text = "text_model_" if part != "unet" and "text_projection" not in path else ""
            key = f"{prefixes[part]}{text}{path.removeprefix('text_model.').replace('.', '_')}"
            state |= {f"{key}.lora_down.weight": lora.down, f"{key}.lora_up.weight": lora.up}
            state[f"{key}.alpha"] = torch.tensor(lora.alpha)
    return state


@pytest.mark.parametrize("text", ["lora_te_", "lora_te1_"])
def test_kohya_names_the_text_encoder_either_way_and_diffusers_blocks_are_read_for_sdxl_too(
    folder: Path, networks: Mapping[str, nn.Module], tmp_path: Path, text: str
) -> None:
    parts = random_parts(networks)
    prefixes = {"unet": "lora_unet_", "text_encoder": text, "text_encoder_2": "lora_te2_"}
    lora = load_lora(write(tmp_path / "k.safetensors", kohya_of(parts, prefixes)), networks)
    same_weights(merged(folder, lora), merged(folder, LoRA(parts, {}, lora.info)), tolerance=0)


def test_a_text_encoder_without_the_prefix_text_model_is_read(
    networks: Mapping[str, nn.Module], tmp_path: Path
) -> None:
    """As diffusers 0.42 writes it in both layouts; our own files have the prefix, which ComfyUI asks for."""
    parts = random_parts({"text_encoder": networks["text_encoder"]}, targets=TEXT)
    with_prefix = kohya_of(parts, {"text_encoder": "lora_te1_"})
    state = {key.replace("text_model_", ""): value for key, value in with_prefix.items()}
    assert load_lora(write(tmp_path / "k.safetensors", state), networks).parts.keys() == parts.keys()
    save_lora(tmp_path / "ours.safetensors", parts, INFOS["sd1"])
    assert all(key.startswith("lora_te_text_model_") for key in load_file(tmp_path / "ours.safetensors"))


# --- a part of a file


def test_what_has_no_place_is_named_and_left_out_only_when_allowed(
    folder: Path, networks: Mapping[str, nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = random_parts(networks, targets=("to_q", "fc1"))
    state = kohya_of(parts, {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"})
    file = write(tmp_path / "k.safetensors", state | {"stray\n": torch.zeros(1)})
    unet = {"unet": networks["unet"]}
    text = sum(len(weights) for part, weights in parts.items() if part != "unet")
    message = rf"not all of it can be used: modules not in this model: {text} \('text_encoder: text_model_encoder.*; "
    with pytest.raises(WeightsError, match=message + r"keys of no known meaning: 1 \('stray\\n'\)\. .*--allow-partial"):
        load_lora(file, unet)
    with caplog.at_level(logging.WARNING):
        lora = load_lora(file, unet, allow_partial=True)
    assert f"left out, as allowed: modules not in this model: {text} (" in caplog.text
    assert r"stray\n" in caplog.text
    assert {part: list(weights) for part, weights in lora.parts.items()} == {"unet": list(parts["unet"])}
    with pytest.raises(WeightsError, match="nothing of it fits this model"):
        load_lora(file, {"text_encoder_3": networks["text_encoder"]}, allow_partial=True)


def test_a_module_of_another_size_is_refused_even_when_a_part_would_do(
    networks: Mapping[str, nn.Module], tmp_path: Path
) -> None:
    parts = random_parts({"unet": networks["unet"]}, targets=("to_q", "to_k"))
    path = next(path for path in parts["unet"] if path.endswith("attn2.to_k"))
    parts["unet"][path] = LoRAWeights(torch.ones(2, 768), torch.ones(len(parts["unet"][path].up), 2), 1.0)
    file = write(tmp_path / "k.safetensors", kohya_of(parts, {"unet": "lora_unet_"}))
    with pytest.raises(WeightsError, match=r"modules of another size: 1 \(.*attn2_to_k: expected"):
        load_lora(file, networks, allow_partial=True)


# --- cloneofsimo/lora


def numbered(networks: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The layers in the order of formats.md 4.5, spelt out for the tiny UNet: attention in level 0 down, 1 up, mid."""
    blocks = [f"{way}.attentions.{n}.transformer_blocks.0" for way, count in (("down_blocks.0", 2), ("up_blocks.1", 3))
              for n in range(count)] + ["mid_block.attentions.0.transformer_blocks.0"]  # fmt: skip
    inner = (
        "attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0 ff.net.0.proj attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0"
    )
    text = [
        f"encoder.layers.{i}.self_attn.{name}" for i in range(3) for name in ("k_proj", "v_proj", "q_proj", "out_proj")
    ]
    return {"unet": [f"{block}.{name}" for block in blocks for name in inner.split()], "text_encoder": text}


def positional(networks: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, dict[str, LoRAWeights]]]:
    """A file of cloneofsimo's and what it means."""
    order = numbered(networks)
    random = random_parts({part: networks[part] for part in order})
    parts = {part: {path: replace(random[part][path], alpha=float(random[part][path].rank)) for path in order[part]}
             for part in order}  # fmt: skip
    state = {f"{part}:{i}:{piece}": getattr(parts[part][path], piece) for part in order
             for i, path in enumerate(order[part]) for piece in ("up", "down")}  # fmt: skip
    return state, parts


METADATA = {"unet": '["CrossAttention", "Attention", "GEGLU"]', "text_encoder": '["CLIPAttention"]', "<s1>": "<embed>"}


@pytest.mark.parametrize("family", ["sd1"], indirect=True)
def test_numbered_layers_go_where_they_were_trained(
    folder: Path, networks: Mapping[str, nn.Module], tmp_path: Path
) -> None:
    state, parts = positional(networks)
    vector = torch.arange(32.0)
    lora = load_lora(write(tmp_path / "n.safetensors", state | {"<s1>": vector}, METADATA), networks)
    assert {token: vectors.tolist() for token, vectors in lora.embeddings.items()} == {"<s1>": [vector.tolist()]}
    same_weights(merged(folder, lora), merged(folder, LoRA(parts, {}, lora.info)), tolerance=0)
    assert {path: w.rank for path, w in lora.parts["unet"].items()} == {
        path: w.rank for path, w in parts["unet"].items()
    }


@pytest.mark.parametrize("family", ["sd1"], indirect=True)
def test_refusals_of_numbered_files(networks: Mapping[str, nn.Module], tmp_path: Path) -> None:
    state, _ = positional(networks)
    embedded = write(tmp_path / "a.safetensors", state | {"<s1>": torch.zeros(32)}, METADATA)
    with pytest.raises(WeightsError, match=r"embeddings of tokens, without a text encoder: 1 \('<s1>'\)"):
        load_lora(embedded, {"unet": networks["unet"]})
    assert not load_lora(embedded, {"unet": networks["unet"]}, allow_partial=True).embeddings
    fewer = {key: value for key, value in state.items() if not key.startswith("unet:53:")}
    with pytest.raises(WeightsError, match="53 numbered modules for the unet, which has 54 layers"):
        load_lora(write(tmp_path / "b.safetensors", fewer), networks)
    extended = METADATA | {"unet": '["ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"]'}
    for metadata, message in (
        (extended, "not supported: its numbered layers are those of Attention, CrossAttention, GEGLU, ResnetBlock2D"),
        (METADATA | {"unet": "{"}, "is not a list of classes"),
        (METADATA | {"unet": "3"}, "is not a list of classes"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_lora(write(tmp_path / "c.safetensors", state, metadata), networks)
    with pytest.raises(WeightsError, match="the embedding of '<s1>' is 768 wide, the text encoder's are 32"):
        load_lora(write(tmp_path / "e.safetensors", state | {"<s1>": torch.zeros(768)}, METADATA), networks)
    with pytest.raises(WeightsError, match=r"'<s1>' is no vector, its shape is \[1, 1, 32\]"):
        load_lora(write(tmp_path / "d.safetensors", state | {"<s1>": torch.zeros(1, 1, 32)}, METADATA), networks)
