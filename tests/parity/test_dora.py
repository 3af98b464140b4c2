"""DoRA (arXiv:2402.09353) against PEFT: the same weights and outputs from its files, in every layout, conv included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from minisd.lora import (
    TARGETS,
    LoRAWeights,
    adaptable_layers,
    add_lora,
    copy_lora_weights,
    inject_lora,
    lora_weights,
    merge_lora,
    set_lora_scale,
    unmerge_lora,
)
from minisd.lora_reader import LoRA, load_lora
from minisd.lora_writer import save_lora
from minisd.weights import load_unet
from tests.lora_files import INFO, close, fused, in_a_pipeline, merged, run_ours, run_theirs, same_weights, write


def trained(tiny_folder: Path, **fields: Any) -> Any:
    """A pipeline with DoRAs of PEFT in all layers of the UNet and in the text encoder, magnitudes as if learnt."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "use_dora": True} | fields
    pipe.unet.add_adapter(peft.LoraConfig(target_modules=list(TARGETS["all"]), **settings))
    pipe.text_encoder.add_adapter(peft.LoraConfig(target_modules=["q_proj", "fc1"], **settings))
    for network in (pipe.unet, pipe.text_encoder):
        for name, parameter in network.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.data *= 0.5 + torch.rand_like(parameter)
            if "lora_B" in name:
                parameter.data *= 0.3
    return pipe


def saved(pipe: Any, to: Path) -> Path:
    """By diffusers, alphas in the header."""
    layers = {
        f"{part}_lora_layers": get_peft_model_state_dict(getattr(pipe, part)) for part in ("unet", "text_encoder")
    }
    headers = {f"{part}_lora_adapter_metadata": getattr(pipe, part).peft_config["default"].to_dict()
               for part in ("unet", "text_encoder")}  # fmt: skip
    type(pipe).save_lora_weights(to, **layers, **headers)
    return to / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"to_k": 2}}])
def test_a_dora_of_peft_has_the_same_weights_and_outputs_here(
    tiny_folder: Path, tiny_networks: dict[str, nn.Module], tmp_path: Path, fields: dict[str, Any]
) -> None:
    pipe = trained(tiny_folder, **fields)
    lora = load_lora(saved(pipe, tmp_path), tiny_networks)
    assert all(w.magnitude is not None for part in lora.parts.values() for w in part.values())
    assert len({w.down.dim() for w in lora.parts["unet"].values()}) == 2  # linear layers and convolutions
    outputs = run_theirs(pipe.unet)
    close(run_ours(tiny_folder, lora.parts["unet"]), outputs, 1e-10)
    close(run_ours(tiny_folder, lora.parts["unet"], merged=True), outputs, 1e-10)
    same_weights(merged(tiny_folder, lora), fused(pipe))
    plain = {path: replace(w, magnitude=None) for path, w in lora.parts["unet"].items()}
    assert (run_ours(tiny_folder, plain) - outputs).abs().max() > 0.1


def test_a_folder_of_peft_has_doras_too(tiny_folder: Path, tiny_networks: dict[str, nn.Module], tmp_path: Path) -> None:
    model = peft.get_peft_model(
        diffusers.UNet2DConditionModel.from_pretrained(tiny_folder / "unet"),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"], use_dora=True, init_lora_weights=False),
    )
    model.save_pretrained(tmp_path)
    lora = load_lora(tmp_path, tiny_networks)
    close(run_ours(tiny_folder, lora.parts["unet"]), run_theirs(model), 1e-10)


@pytest.mark.parametrize("lora_format", ["kohya", "peft"])
def test_our_doras_come_back_exactly_and_diffusers_reads_pefts_layout(
    tiny_folder: Path, tiny_networks: dict[str, nn.Module], tmp_path: Path, lora_format: Any
) -> None:
    """diffusers drops kohya's dora_scale with a warning and loads another change; ComfyUI and A1111 do not."""
    lora = load_lora(saved(trained(tiny_folder), tmp_path), tiny_networks)
    file = tmp_path / "ours.safetensors"
    save_lora(file, lora.parts, INFO, lora_format=lora_format)
    same_weights(merged(tiny_folder, load_lora(file, tiny_networks)), merged(tiny_folder, lora), tolerance=0)
    if lora_format == "peft":
        same_weights(in_a_pipeline(tiny_folder, file), merged(tiny_folder, lora))
    shapes = {
        tuple(t.shape) for key, t in load_file(file).items() if key.endswith((".dora_scale", "magnitude_vector.weight"))
    }
    expected = {(32, 1), (32, 1, 1, 1)} if lora_format == "kohya" else {(32,), (1, 32, 1, 1)}
    assert expected <= shapes


def test_other_spellings_of_the_magnitude_are_read(
    tiny_folder: Path, tiny_networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    """OneTrainer's ends in .weight; half precision is as good."""
    lora = load_lora(saved(trained(tiny_folder), tmp_path), tiny_networks)
    state = {f"{key}.weight" if key.endswith("magnitude_vector") else key: t.half()
             for key, t in load_file(tmp_path / "pytorch_lora_weights.safetensors").items()}  # fmt: skip
    again = load_lora(write(tmp_path / "b.safetensors", state), tiny_networks)
    for path, given in lora.parts["unet"].items():
        magnitude = again.parts["unet"][path].magnitude
        assert magnitude is not None
        assert given.magnitude is not None
        assert torch.equal(magnitude, given.magnitude.half())


@pytest.fixture
def dora(tiny_folder: Path) -> dict[str, LoRAWeights]:
    """Of each layer of the UNet."""
    generator = torch.Generator().manual_seed(2)
    doras = {}
    for path, layer in adaptable_layers(load_unet(tiny_folder)).items():
        out, *inner = layer.weight.shape
        up, down = torch.randn(out, 3, generator=generator), torch.randn(3, *inner, generator=generator)
        up = up.reshape(out, 3, *[1] * (len(inner) - 1))
        doras[path] = LoRAWeights(0.2 * down, up, 2.0, torch.rand(out, generator=generator))
    return doras


def test_strength_is_a_line_from_the_base_to_the_dora(tiny_folder: Path, dora: dict[str, LoRAWeights]) -> None:
    unet = load_unet(tiny_folder).double()
    base = {path: layer.weight.clone() for path, layer in adaptable_layers(unet).items()}
    add_lora(unet, dora, name="style")
    layers = adaptable_layers(unet)
    merge_lora(unet)
    for path, lora in dora.items():
        rows = layers[path].weight.flatten(1)
        assert lora.magnitude is not None
        close(rows.norm(dim=1), lora.magnitude.double(), 1e-10)  # equation 5: m is the length of each row
        direction = (base[path] + 2 / 3 * lora.product(torch.float64)).flatten(1)
        close(rows / rows.norm(dim=1, keepdim=True), direction / direction.norm(dim=1, keepdim=True), 1e-10)
    full = {path: layer.weight.clone() for path, layer in layers.items()}
    for strength in (0.0, 0.4, -1.0, 1.3):
        unmerge_lora(unet)
        set_lora_scale(unet, "style", strength)
        merge_lora(unet)
        for path, layer in layers.items():
            expected = base[path] + strength * (full[path] - base[path])
            close(layer.weight, expected, 0 if strength == 0 else 1e-12)


def test_adapters_side_by_side_add_their_changes_of_the_base(tiny_folder: Path, dora: dict[str, LoRAWeights]) -> None:
    plain = {path: replace(lora, magnitude=None) for path, lora in dora.items()}
    sums = {}
    for weights in (plain, dora):
        unet = load_unet(tiny_folder).double()
        add_lora(unet, weights, name="one")
        merge_lora(unet)
        for path, layer in adaptable_layers(unet).items():
            assert layer.base_weight is not None
            sums[path] = sums.get(path, layer.base_weight) + layer.weight - layer.base_weight
    unet = load_unet(tiny_folder).double()
    for name, weights in (("plain", plain), ("dora", dora)):
        add_lora(unet, weights, name=name)
    outputs = run_of(unet)
    merge_lora(unet)
    for path, layer in adaptable_layers(unet).items():
        close(layer.weight, sums[path], 1e-11)
    close(outputs, run_of(unet), 1e-9)


def run_of(unet: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, context = (torch.randn(*size, generator=generator).double() for size in ((1, 4, 16, 16), (1, 7, 32)))
    with torch.no_grad():
        return unet(sample, torch.tensor([3]), context)


def test_a_row_of_zeros_stays_zero() -> None:
    lora = LoRAWeights(torch.ones(1, 3), torch.tensor([[0.0], [1.0]]), 1.0, torch.tensor([5.0, 2.0]))
    weight = torch.zeros(2, 3)
    close(weight + lora.change(weight), torch.tensor([[0.0] * 3, [2 / 3**0.5] * 3]), 1e-6)


def test_a_dora_is_not_trained_and_not_mixed_into_pefts_layout(
    tiny_folder: Path, dora: dict[str, LoRAWeights], tmp_path: Path
) -> None:
    unet = load_unet(tiny_folder)
    inject_lora(unet, ["to_q"], rank=3, alpha=2.0)
    assert all(w.magnitude is None for w in lora_weights(unet).values())
    path = next(path for path in dora if path.endswith("to_q"))
    with pytest.raises(ValueError, match="it is a DoRA, which can be used and merged but not trained"):
        copy_lora_weights({path: dora[path]}, unet)
    parts = {"unet": {**dora, path: replace(dora[path], magnitude=None)}}
    with pytest.raises(ValueError, match="PEFT cannot mix LoRA and DoRA in one network, as the unet has"):
        save_lora(tmp_path / "a.safetensors", parts, INFO, lora_format="peft")
    save_lora(tmp_path / "a.safetensors", parts, INFO)
    again = load_lora(tmp_path / "a.safetensors", {"unet": unet})
    same_weights(merged(tiny_folder, again), merged(tiny_folder, LoRA(parts, {}, INFO)), tolerance=0)
    with pytest.raises(ValueError, match=r"DoRA's magnitude is \[2\], one for each output, got \[3\]"):
        LoRAWeights(torch.ones(1, 3), torch.ones(2, 1), 1.0, torch.ones(3))
