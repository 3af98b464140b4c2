"""LoRA files of the UNet against diffusers and PEFT: what we write they read, and what they write we read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from minisd.errors import WeightsError
from minisd.lora import (
    TARGETS,
    LoRAWeights,
    adaptable_layers,
    inject_lora,
    lora_parameters,
    lora_weights,
)
from minisd.lora_info import LoRAInfo
from minisd.lora_reader import load_lora
from minisd.lora_writer import save_lora
from minisd.weights import load_unet
from tests.lora_files import INFO, PREFIX, close, kohya, random_lora, read_unet, run_ours, run_theirs, write


def through_diffusers(sd_folder: Path, file: Path, dtype: torch.dtype = torch.float64) -> Tensor:
    """The base's UNet output after diffusers has loaded a LoRA file into its pipeline."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    return run_theirs(pipe.unet, dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("targets", ["attn", "attn+ff", "all"])
def test_diffusers_reads_our_file_as_we_do(
    sd_folder: Path, tmp_path: Path, targets: str, dtype: torch.dtype, tolerance: float
) -> None:
    file = tmp_path / "ours.safetensors"
    trained = random_lora(load_unet(sd_folder), targets=targets)
    save_lora(file, {"unet": trained}, INFO)
    weights, _ = read_unet(file, load_unet(sd_folder))
    ours = run_ours(sd_folder, weights, dtype)
    close(ours, through_diffusers(sd_folder, file, dtype), tolerance)
    assert torch.equal(ours, run_ours(sd_folder, trained, dtype))
    close(ours, run_ours(sd_folder, weights, dtype, merged=True), tolerance)
    base = run_ours(sd_folder, {}, dtype)
    assert (ours - base).abs().max() > 0.05
    halved = {path: LoRAWeights(w.down, w.up, w.alpha / 2) for path, w in trained.items()}
    assert (ours - run_ours(sd_folder, halved, dtype)).abs().max() > 0.02  # alpha counts


def trained_by_peft(sd_folder: Path, targets: str = "attn", **fields: Any) -> diffusers.UNet2DConditionModel:
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    torch.manual_seed(3)
    unet.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS[targets]), init_lora_weights=False, **fields)
    )
    for name, parameter in unet.named_parameters():  # PEFT's B is as large as its A: far from any that was learnt
        if "lora_B" in name:
            parameter.data *= 0.3
    return unet


def by_diffusers_script(unet: nn.Module, to: Path) -> Path:
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    diffusers.StableDiffusionPipeline.save_lora_weights(to, unet_lora_layers=state)
    return to / "pytorch_lora_weights.safetensors"


def by_diffusers_script_with_metadata(unet: nn.Module, to: Path) -> Path:
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    metadata = _collate_lora_metadata({"unet": unet})
    diffusers.StableDiffusionPipeline.save_lora_weights(to, unet_lora_layers=state, **metadata)
    return to / "pytorch_lora_weights.safetensors"


def by_diffusers_in_pefts_keys(unet: nn.Module, to: Path) -> Path:
    diffusers.StableDiffusionPipeline.save_lora_weights(to, unet_lora_layers=get_peft_model_state_dict(unet))
    return to / "pytorch_lora_weights.safetensors"


def by_save_lora_adapter(unet: Any, to: Path) -> Path:
    unet.save_lora_adapter(to)
    return to / "pytorch_lora_weights.safetensors"


def by_convert_to_kohya(unet: nn.Module, to: Path) -> Path:
    """diffusers' own conversion: an alpha for each module, equal to the rank, as int64."""
    state = convert_state_dict_to_kohya({f"unet.{key}": t for key, t in get_peft_model_state_dict(unet).items()})
    save_file({key: value.contiguous() for key, value in state.items()}, to / "kohya.safetensors")
    return to / "kohya.safetensors"


def by_old_attention_processors(unet: nn.Module, to: Path) -> Path:
    state = {}
    for key, value in get_peft_model_state_dict(unet).items():
        module, part = key.replace(".to_out.0", ".to_out").rsplit(".lora_", 1)
        block, projection = module.rsplit(".", 1)
        side = "down" if part.startswith("A") else "up"
        state[f"unet.{block}.processor.{projection}_lora.{side}.weight"] = value
    save_file(state, to / "old.safetensors")
    return to / "old.safetensors"


Writer = Callable[[Any, Path], Path]

WRITERS: dict[Writer, bool] = {  # -> whether alpha is in the file
    by_diffusers_script: False,
    by_diffusers_script_with_metadata: True,
    by_diffusers_in_pefts_keys: False,
    by_save_lora_adapter: True,
    by_convert_to_kohya: False,
    by_old_attention_processors: False,
}


@pytest.mark.parametrize(
    ("writer", "targets"),
    [*((writer, "attn") for writer in WRITERS), *((w, "all") for w in WRITERS if w is not by_old_attention_processors)],
)
def test_we_read_what_diffusers_writes(sd_folder: Path, tmp_path: Path, writer: Writer, targets: str) -> None:
    keeps_alpha = WRITERS[writer]
    unet = trained_by_peft(sd_folder, targets)
    file = writer(unet, tmp_path)
    weights, info = read_unet(file, load_unet(sd_folder))
    assert info.rank == 4
    assert {w.alpha for w in weights.values()} == {6.0 if keeps_alpha else 4.0}
    ours = run_ours(sd_folder, weights)
    # save_lora_adapter's file is for unet.load_lora_adapter. Of a file that has both .lora.down and .lora_A, as the
    # scripts write for layers outside attention, the pipeline looks at the first key only and drops all .lora.down.
    mixed = targets == "all" and writer in (by_diffusers_script, by_diffusers_script_with_metadata)
    if writer is not by_save_lora_adapter and not mixed:
        close(ours, through_diffusers(sd_folder, file), 1e-10)
    if not keeps_alpha:
        assert (ours - run_theirs(unet)).abs().max() > 0.01
        for layer in unet.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.scaling["default"] = 1.0
    close(ours, run_theirs(unet), 1e-10)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"target_modules": list(TARGETS["all"])},
        {"target_modules": ["conv_in", "conv_out", "linear_1", "to_q"], "use_rslora": True},
        {"target_modules": list(TARGETS["all"]), "rank_pattern": {"conv1": 2}, "alpha_pattern": {"conv1": 3}},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 3, "attn2.to_k": 1}},
        {"alpha_pattern": {f"{PREFIX}to_out.0": 9}},
        {"alpha_pattern": {"^mid_block.attentions.0.transformer_blocks.0.attn1.to_q$": 9}},
    ],
)
def test_we_read_what_peft_writes(sd_folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    torch.manual_seed(3)
    settings = {"target_modules": list(TARGETS["attn"])} | fields
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    model = peft.get_peft_model(diffusers.UNet2DConditionModel.from_pretrained(sd_folder / "unet"), config)
    model.save_pretrained(tmp_path)
    weights, _ = read_unet(tmp_path / "adapter_model.safetensors", load_unet(sd_folder))
    close(run_ours(sd_folder, weights), run_theirs(model), 1e-10)
    if not fields:
        (tmp_path / "adapter_config.json").unlink()
        with pytest.raises(WeightsError, match=r"keeps alpha in adapter_config\.json"):
            load_lora(tmp_path / "adapter_model.safetensors", {"unet": load_unet(sd_folder)})


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 3}}])
def test_the_header_of_diffusers_counts(sd_folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    unet = trained_by_peft(sd_folder, **fields)
    weights, _ = read_unet(by_diffusers_script_with_metadata(unet, tmp_path), load_unet(sd_folder))
    close(run_ours(sd_folder, weights), run_theirs(unet), 1e-10)


def test_kohya_without_alpha_means_alpha_is_the_rank(sd_folder: Path, tmp_path: Path) -> None:
    state = kohya(random_lora(load_unet(sd_folder)))
    file = write(tmp_path / "k.safetensors", {key: t for key, t in state.items() if not key.endswith(".alpha")})
    weights, info = read_unet(file, load_unet(sd_folder))
    assert {w.alpha for w in weights.values()} == {4.0}
    assert info == LoRAInfo(rank=4, alpha=4.0, targets=("to_k", "to_out.0", "to_q", "to_v"))
    close(run_ours(sd_folder, weights), through_diffusers(sd_folder, file), 1e-10)


def test_layers_outside_the_blocks_are_adapted_too(sd_folder: Path, tmp_path: Path) -> None:
    model = load_unet(sd_folder)
    outside = [path for path in adaptable_layers(model) if not path.endswith(TARGETS["all"])]
    inject_lora(model, outside, rank=3, alpha=6)
    for _, parameter in lora_parameters(model):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    assert outside == ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out"]
    file = write(tmp_path / "k.safetensors", kohya(lora_weights(model)))
    weights, _ = read_unet(file, model)
    ours = run_ours(sd_folder, weights)
    close(ours, through_diffusers(sd_folder, file), 1e-10)
    assert (ours - run_ours(sd_folder, {})).abs().max() > 0.05
