"""LoRA files against diffusers and PEFT: what we write they read, what they write we read, what we cannot we refuse."""

from __future__ import annotations

import json
import logging
import math
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from minisd.atomic import write_atomically
from minisd.errors import DiskError, NonFiniteError, WeightsError, run_script
from minisd.lora import (
    TARGETS,
    LoRAWeights,
    adaptable_layers,
    add_lora,
    inject_lora,
    lora_parameters,
    lora_weights,
    merge_lora,
)
from minisd.lora_dialects import target_names
from minisd.lora_file import inspect, load_lora, lora_bytes, main, read_lora_info, save_lora
from minisd.lora_info import LoRAInfo, base_model_version, public_name
from minisd.model_files import read_header
from minisd.unet import UNet2DConditionModel, UNetConfig
from minisd.weights import load_unet
from tests.tiny import write_tiny_model

INFO = LoRAInfo(
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    base_model_version="sd_v1",
    rank=4,
    alpha=6.0,
    targets=TARGETS["attn"],
    trigger="8bit",
    title="my style",
    prediction_type="epsilon",
    resolution=512,
    steps=1000,
    seed=0,
    recipe={"learning_rate": 1e-4, "rank": 4},
)
PREFIX = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, family=request.param)
    return folder


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> UNet2DConditionModel:
    folder = tmp_path_factory.mktemp("one")
    write_tiny_model(folder)
    return load_unet(folder)


def random_lora(
    model: nn.Module, *, rank: int = 4, alpha: float = 6.0, targets: str = "attn"
) -> dict[str, LoRAWeights]:
    """Weights of visible effect for each target, ranks and alphas as given."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for path, layer in adaptable_layers(model).items():
        out, *inner = layer.weight.shape
        if path.endswith(TARGETS[targets]):
            down = torch.randn(rank, *inner, generator=generator) / math.sqrt(math.prod(inner))
            up = 0.3 * torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator)
            weights[path] = LoRAWeights(down, up, alpha)
    return weights


def run_ours(
    folder: Path, weights: Mapping[str, LoRAWeights], dtype: torch.dtype = torch.float64, *, merged: bool = False
) -> Tensor:
    unet = load_unet(folder)
    if weights:
        add_lora(unet, weights, name="file")
    unet.to(dtype)
    if merged:
        merge_lora(unet)
    sample, context = inputs(dtype)
    with torch.no_grad():
        return unet(sample, torch.tensor([3, 700]), context)


def run_theirs(unet: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    sample, context = inputs(dtype)
    with torch.no_grad():
        return unet.to(dtype)(sample, torch.tensor([3, 700]), context).sample


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 16, 16, generator=generator).to(dtype),
        torch.randn(2, 7, 32, generator=generator).to(dtype),
    )


def through_diffusers(folder: Path, file: Path, dtype: torch.dtype = torch.float64) -> Tensor:
    """The base's UNet output after diffusers has loaded a LoRA file into its pipeline."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    return run_theirs(pipe.unet, dtype)


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# --- what we write


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("targets", ["attn", "attn+ff", "all"])
def test_diffusers_reads_our_file_as_we_do(
    folder: Path, tmp_path: Path, targets: str, dtype: torch.dtype, tolerance: float
) -> None:
    file = tmp_path / "ours.safetensors"
    trained = random_lora(load_unet(folder), targets=targets)
    save_lora(file, trained, INFO)
    weights, _ = load_lora(file, load_unet(folder))
    ours = run_ours(folder, weights, dtype)
    close(ours, through_diffusers(folder, file, dtype), tolerance)
    assert torch.equal(ours, run_ours(folder, trained, dtype))
    close(ours, run_ours(folder, weights, dtype, merged=True), tolerance)
    base = run_ours(folder, {}, dtype)
    assert (ours - base).abs().max() > 0.05
    halved = {path: LoRAWeights(w.down, w.up, w.alpha / 2) for path, w in trained.items()}
    assert (ours - run_ours(folder, halved, dtype)).abs().max() > 0.02  # alpha counts


@pytest.mark.parametrize("alpha", [6.0, 1.0, 0.1, 1e-3, 64.0])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("targets", ["attn", "all"])
def test_round_trip_keeps_weights_alphas_and_information(
    sd1: UNet2DConditionModel, tmp_path: Path, alpha: float, dtype: torch.dtype | None, targets: str
) -> None:
    file = tmp_path / "ours.safetensors"
    trained = random_lora(sd1, rank=3, alpha=alpha, targets=targets)
    info = LoRAInfo(rank=3, alpha=alpha, base_model="pocket", base_model_version="pocket", targets=TARGETS[targets])
    save_lora(file, trained, info, dtype=dtype)
    weights, read = load_lora(file, sd1)
    assert list(weights) != []
    assert weights.keys() == trained.keys()
    for path, given in trained.items():
        assert weights[path].alpha == alpha
        assert weights[path].down.dtype == (dtype or torch.float32)
        assert torch.equal(weights[path].down, given.down.to(dtype or torch.float32))
        assert torch.equal(weights[path].up, given.up.to(dtype or torch.float32))
    assert read == info
    assert read_lora_info(file) == info
    again = tmp_path / "again.safetensors"
    save_lora(again, weights, read)
    assert again.read_bytes() == file.read_bytes()


def test_our_names_of_all_are_kohyas(folder: Path) -> None:
    """LoRANetwork of its scripts: each linear layer and convolution that is a child of a module of these classes."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    expected = {}
    for name, module in unet.named_modules():
        if type(module).__name__ in ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"):
            for child, layer in module.named_modules():
                if type(layer).__name__ in ("Linear", "Conv2d"):
                    expected[f"lora_unet.{name}.{child}".replace(".", "_")] = layer.weight
    ours = load_unet(folder)
    inject_lora(ours, TARGETS["all"], rank=3, alpha=6)
    written = load(lora_bytes(lora_weights(ours), INFO))
    assert {key.partition(".")[0] for key in written} == expected.keys()
    assert len(written) == 3 * len(expected)
    for name, weight in expected.items():
        ones = (1,) * (weight.dim() - 2)
        assert written[f"{name}.lora_down.weight"].shape == (3, *weight.shape[1:])
        assert written[f"{name}.lora_up.weight"].shape == (len(weight), 3, *ones)
        assert written[f"{name}.alpha"] == 6


def test_ranks_and_alphas_may_differ_between_modules(sd1: UNet2DConditionModel, tmp_path: Path) -> None:
    file = tmp_path / "ours.safetensors"
    paths = list(random_lora(sd1))
    mixed = random_lora(sd1) | {path: w for path, w in random_lora(sd1, rank=2, alpha=0.5).items() if path in paths[:3]}
    save_lora(file, mixed, INFO)
    weights, info = load_lora(file, sd1)
    assert {path: (w.rank, w.alpha) for path, w in weights.items()} == {
        path: (2, 0.5) if path in paths[:3] else (4, 6.0) for path in paths
    }
    assert (info.rank, info.alpha) == (4, 6.0)


def test_the_header_says_what_other_programs_ask_for(sd1: UNet2DConditionModel, tmp_path: Path) -> None:
    file = tmp_path / "ours.safetensors"
    save_lora(file, random_lora(sd1), INFO)
    header = read_header(file)
    assert header.metadata == {
        "format": "pt",
        "minisd.base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "minisd.format_version": "1",
        "minisd.recipe": '{"learning_rate": 0.0001, "rank": 4}',
        "minisd.targets": '["to_q", "to_k", "to_v", "to_out.0"]',
        "minisd.trigger": "8bit",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "512x512",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "my style",
        "modelspec.trigger_phrase": "8bit",
        "ss_base_model_version": "sd_v1",
        "ss_network_alpha": "6.0",
        "ss_network_args": "{}",
        "ss_network_dim": "4",
        "ss_network_module": "networks.lora",
        "ss_output_name": "my style",
        "ss_resolution": "(512, 512)",
        "ss_sd_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "ss_seed": "0",
        "ss_steps": "1000",
        "ss_v2": "False",
    }
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {key.removeprefix(name) for key in header.tensors if key.startswith(name)} == {
        ".lora_down.weight",
        ".lora_up.weight",
        ".alpha",
    }
    assert header.tensors[f"{name}.alpha"].shape == ()


def test_the_header_of_convolutions_is_kohyas(sd1: UNet2DConditionModel, tmp_path: Path) -> None:
    info = LoRAInfo(rank=4, alpha=6.0, targets=TARGETS["all"])
    save_lora(tmp_path / "a.safetensors", random_lora(sd1, targets="all"), info)
    metadata = read_header(tmp_path / "a.safetensors").metadata
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "6.0"}
    assert json.loads(metadata["minisd.targets"]) == list(TARGETS["all"])


@pytest.mark.parametrize("flat", [False, True])
def test_the_targets_of_others_are_guessed_from_the_ends_of_their_names(sd1: UNet2DConditionModel, flat: bool) -> None:
    paths = [path for path in adaptable_layers(sd1) if path.endswith(TARGETS["all"])]
    names = target_names([path.replace(".", "_") if flat else path for path in paths])
    assert set(names) == {target.replace(".", "_") if flat else target for target in TARGETS["all"]}
    assert target_names(["conv_in", "time_embedding.linear_1"]) == ("conv_in", "time_embedding.linear_1")


def test_equal_runs_write_equal_bytes() -> None:
    weights = {name: LoRAWeights(torch.ones(2, 3), torch.ones(4, 2), 0.1) for name in ("b.c", "a")}
    data = lora_bytes(weights, LoRAInfo(rank=2, alpha=0.1, trigger="t", recipe={"b": 1, "a": (2, "\u00e9")}))
    # Exact to the byte: the library alone would write the text fields in another order in each process.
    end = 8 + int.from_bytes(data[:8], "little")
    assert end % 8 == 0
    fields = {
        "format": "pt",
        "minisd.format_version": "1",
        "minisd.targets": "[]",
        "minisd.trigger": "t",
        "minisd.recipe": '{"a": [2, "\\u00e9"], "b": 1}',
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "unknown/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.trigger_phrase": "t",
        "ss_base_model_version": "unknown",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "0.1",
        "ss_network_args": "{}",
        "ss_v2": "False",
    }
    metadata = json.dumps(fields, separators=(",", ":"))
    assert data[8:end].decode().rstrip().endswith(f',"__metadata__":{metadata}}}')
    assert all(
        lora_bytes(
            dict(reversed(weights.items())),
            LoRAInfo(rank=2, alpha=0.1, trigger="t", recipe={"a": [2, "\u00e9"], "b": 1}),
        )
        == data
        for _ in range(8)
    )


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("owner/name", "owner/name"),
        ("pocket", "pocket"),
        ("/home/alice/models/sd15", "sd15"),
        ("~/models/sd15/", "sd15"),
        ("./sd15", "sd15"),
        ("../alice/sd15", "sd15"),
        ("alice/models/sd15", "sd15"),
        (r"C:\Users\alice\sd15", "sd15"),
        ("C:/Users/alice/sd15", "sd15"),
        ("~alice", ""),
        ("", ""),
    ],
)
def test_a_local_path_never_gets_into_a_file(model: str, name: str) -> None:
    assert public_name(model) == name
    info = LoRAInfo(rank=2, alpha=1, base_model=model, recipe={"model": model, "path": Path(model), "all": [model]})
    data = lora_bytes({"a": LoRAWeights(torch.ones(2, 3), torch.ones(4, 2), 1.0)}, info)
    assert b"alice" not in data or model == "alice/models/sd15"  # in a recipe that one could be any text
    assert b"Users" not in data


def test_a_folder_that_looks_like_a_repository_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alice" / "sd15").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("alice/sd15") == "sd15"


def test_other_slashes_in_a_recipe_stay(sd1: UNet2DConditionModel, tmp_path: Path) -> None:
    recipe = {"prompt": "a city, 8bit/16bit", "betas": [0.9, 0.999], "none": None, "escaped": r"a \(cat\)"}
    save_lora(tmp_path / "a.safetensors", random_lora(sd1), LoRAInfo(rank=4, alpha=6, recipe=recipe))
    assert read_lora_info(tmp_path / "a.safetensors").recipe == recipe


@pytest.mark.parametrize(
    ("width", "prediction", "version"),
    [
        (768, "epsilon", "sd_v1"),
        (1024, "epsilon", "sd_v2"),
        (1024, "v_prediction", "sd_v2_v"),
        (64, "v_prediction", "pocket"),
        (32, "epsilon", "unknown"),
    ],
)
def test_names_of_bases(width: int, prediction: str, version: str) -> None:
    assert base_model_version(width, prediction) == version


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_what_is_not_finite_is_not_written(sd1: UNet2DConditionModel, tmp_path: Path, value: float) -> None:
    file = tmp_path / "ours.safetensors"
    file.write_bytes(b"older")
    trained = random_lora(sd1)
    next(iter(trained.values())).up[0, 0] = value
    with pytest.raises(NonFiniteError, match=r"attn1_to_q\.lora_up\.weight has values that are NaN or too large"):
        save_lora(file, trained, INFO, dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == b"older"


def test_other_refusals_of_the_writer(sd1: UNet2DConditionModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no LoRA weights"):
        save_lora(tmp_path / "a.safetensors", {}, INFO)
    with pytest.raises(ValueError, match="float64"):
        save_lora(tmp_path / "a.safetensors", random_lora(sd1), INFO, dtype=torch.float64)
    for recipe in ({"loss": math.nan}, {"what": object()}):
        with pytest.raises(ValueError, match="JSON"):
            save_lora(tmp_path / "a.safetensors", random_lora(sd1), LoRAInfo(rank=4, alpha=6, recipe=recipe))
    assert not list(tmp_path.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.bin"
    write_atomically(file, b"one")
    write_atomically(file, b"two")
    assert file.read_bytes() == b"two"
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match=r"a\.bin: cannot be written \(5 bytes\): No space left on device"):
        write_atomically(file, b"three")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "plain"]
    assert file.read_bytes() == b"two"
    monkeypatch.undo()
    for path in (tmp_path / "missing" / "a", tmp_path / ("x" * 300), tmp_path):
        with pytest.raises(DiskError):
            write_atomically(path, b"three")


# --- what others write


def trained_by_peft(folder: Path, targets: str = "attn", **fields: Any) -> diffusers.UNet2DConditionModel:
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
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
def test_we_read_what_diffusers_writes(folder: Path, tmp_path: Path, writer: Writer, targets: str) -> None:
    keeps_alpha = WRITERS[writer]
    unet = trained_by_peft(folder, targets)
    file = writer(unet, tmp_path)
    weights, info = load_lora(file, load_unet(folder))
    assert info.rank == 4
    assert {w.alpha for w in weights.values()} == {6.0 if keeps_alpha else 4.0}
    ours = run_ours(folder, weights)
    # save_lora_adapter's file is for unet.load_lora_adapter. Of a file that has both .lora.down and .lora_A, as the
    # scripts write for layers outside attention, the pipeline looks at the first key only and drops all .lora.down.
    mixed = targets == "all" and writer in (by_diffusers_script, by_diffusers_script_with_metadata)
    if writer is not by_save_lora_adapter and not mixed:
        close(ours, through_diffusers(folder, file), 1e-10)
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
def test_we_read_what_peft_writes(folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    torch.manual_seed(3)
    settings = {"target_modules": list(TARGETS["attn"])} | fields
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    model = peft.get_peft_model(diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"), config)
    model.save_pretrained(tmp_path)
    weights, _ = load_lora(tmp_path / "adapter_model.safetensors", load_unet(folder))
    close(run_ours(folder, weights), run_theirs(model), 1e-10)
    if not fields:
        (tmp_path / "adapter_config.json").unlink()
        with pytest.raises(WeightsError, match=r"keeps alpha in adapter_config\.json"):
            load_lora(tmp_path / "adapter_model.safetensors", load_unet(folder))


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 3}}])
def test_the_header_of_diffusers_counts(folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    unet = trained_by_peft(folder, **fields)
    weights, _ = load_lora(by_diffusers_script_with_metadata(unet, tmp_path), load_unet(folder))
    close(run_ours(folder, weights), run_theirs(unet), 1e-10)


def kohya(weights: Mapping[str, LoRAWeights]) -> dict[str, Tensor]:
    """What kohya's scripts would write."""
    state = {}
    for path, w in weights.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        state |= {f"{name}.lora_down.weight": w.down, f"{name}.lora_up.weight": w.up}
        state[f"{name}.alpha"] = torch.tensor(w.alpha)
    return state


def write(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.clone().contiguous() for key, value in state.items()}, path, metadata)
    return path


def test_kohya_without_alpha_means_alpha_is_the_rank(folder: Path, tmp_path: Path) -> None:
    state = kohya(random_lora(load_unet(folder)))
    file = write(tmp_path / "k.safetensors", {key: t for key, t in state.items() if not key.endswith(".alpha")})
    weights, info = load_lora(file, load_unet(folder))
    assert {w.alpha for w in weights.values()} == {4.0}
    assert info == LoRAInfo(rank=4, alpha=4.0, targets=("to_k", "to_out.0", "to_q", "to_v"))
    close(run_ours(folder, weights), through_diffusers(folder, file), 1e-10)


def test_layers_outside_the_blocks_are_adapted_too(folder: Path, tmp_path: Path) -> None:
    model = load_unet(folder)
    outside = [path for path in adaptable_layers(model) if not path.endswith(TARGETS["all"])]
    inject_lora(model, outside, rank=3, alpha=6)
    for _, parameter in lora_parameters(model):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    assert outside == ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out"]
    file = write(tmp_path / "k.safetensors", kohya(lora_weights(model)))
    weights, _ = load_lora(file, model)
    ours = run_ours(folder, weights)
    close(ours, through_diffusers(folder, file), 1e-10)
    assert (ours - run_ours(folder, {})).abs().max() > 0.05


@pytest.mark.parametrize("dims", [2, 4])
def test_a_projection_is_a_matrix_or_a_1x1_convolution(folder: Path, tmp_path: Path, dims: int) -> None:
    """SD 1.x has 1 x 1 convolutions for proj_in and proj_out, SD 2.x linear layers; a file may have either for both."""
    model = load_unet(folder)
    given = {path: w for path, w in random_lora(model, targets="all").items() if ".proj_" in path}
    state = {
        key: tensor.flatten(1)[(...,) + (None,) * (dims - 2)] if tensor.dim() else tensor
        for key, tensor in kohya(given).items()
    }
    weights, _ = load_lora(write(tmp_path / "k.safetensors", state), model)
    assert {w.shape for w in weights.values()} == {tuple(adaptable_layers(model)[path].weight.shape) for path in given}
    assert torch.equal(run_ours(folder, weights), run_ours(folder, given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_1x1_convolution_shapes(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {
        key: t.to(dtype) if t.dim() == 0 else t[:, :, None, None].to(dtype)
        for key, t in kohya(random_lora(load_unet(folder))).items()
    }
    weights, _ = load_lora(write(tmp_path / "k.safetensors", state), load_unet(folder))
    assert {w.down.dtype for w in weights.values()} == {dtype}
    expected = {
        path: LoRAWeights(w.down.to(dtype).float(), w.up.to(dtype).float(), 6.0)
        for path, w in random_lora(load_unet(folder)).items()
    }
    assert torch.equal(run_ours(folder, weights), run_ours(folder, expected))


def test_a_model_with_adapters_reads_files_all_the_same(sd1: UNet2DConditionModel, tmp_path: Path) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sd1.config)
    inject_lora(unet, TARGETS["attn"], rank=2, alpha=2)
    save_lora(tmp_path / "a.safetensors", random_lora(sd1), INFO)
    weights, _ = load_lora(tmp_path / "a.safetensors", unet)
    assert add_lora(unet, weights, name="second") == list(lora_weights(unet))
    assert len(lora_parameters(unet)) == 4 * len(weights)


def test_kohyas_header_is_understood(sd1: UNet2DConditionModel, tmp_path: Path) -> None:
    metadata = {
        "ss_base_model_version": "sd_v1",
        "ss_output_name": "style",
        "ss_resolution": "(512, 768)",
        "ss_steps": "1600",
        "ss_seed": "None",
        "ss_sd_model_name": "/home/alice/model.ckpt",
        "modelspec.trigger_phrase": "sks",
        "modelspec.prediction_type": "v",
    }
    _, info = load_lora(write(tmp_path / "k.safetensors", kohya(random_lora(sd1)), metadata), sd1)
    assert info == LoRAInfo(
        base_model_version="sd_v1",
        rank=4,
        alpha=6.0,
        targets=("to_k", "to_out.0", "to_q", "to_v"),
        trigger="sks",
        title="style",
        prediction_type="v_prediction",
        resolution=512,
        steps=1600,
    )


def test_a_file_without_effect_is_loaded_with_a_warning(
    sd1: UNet2DConditionModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zero = {path: LoRAWeights(w.down, torch.zeros_like(w.up), w.alpha) for path, w in random_lora(sd1).items()}
    save_lora(tmp_path / "a.safetensors", zero, INFO)
    with caplog.at_level(logging.WARNING):
        load_lora(tmp_path / "a.safetensors", sd1)
    assert "no effect" in caplog.text


def test_inspect_shows_the_header_and_no_control_characters(
    sd1: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.safetensors"
    save_lora(file, random_lora(sd1), LoRAInfo(rank=4, alpha=6, trigger="\x1b[2Jred\n", recipe={"seed": 3}))
    assert "\x1b" not in inspect(file)
    monkeypatch.setattr("sys.argv", ["lora_file", "inspect", str(file)])
    assert run_script(main, debug=False) == 0
    shown = capsys.readouterr().out
    assert shown == inspect(file) + "\n"
    for row in ("rank             4", "alpha            6", "modules          48 in the UNet, 0 in text encoders"):
        assert row in shown
    for arguments, code in ((["inspect", str(tmp_path / "none")], 4), ([], 2), (["convert", str(file)], 2)):
        monkeypatch.setattr("sys.argv", ["lora_file", *arguments])
        assert run_script(main, debug=False) == code
        assert capsys.readouterr().err.count("\n") == 1


# --- what we refuse


def changed(state: dict[str, Tensor], **parts: Tensor | None) -> dict[str, Tensor]:
    """A copy of a kohya state with tensors of one module replaced or (None) left out."""
    name = f"lora_unet_{(PREFIX + 'to_q').replace('.', '_')}"
    new = {f"{name}.{part if part == 'alpha' else f'lora_{part}.weight'}": value for part, value in parts.items()}
    return {key: value for key, value in (state | new).items() if value is not None}


REFUSED: list[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    ("up without down", lambda s: changed(s, down=None), r"incomplete, down or up is missing .* 1 \('down_blocks_0"),
    ("alpha alone", lambda s: changed(s, down=None, up=None), "incomplete"),
    ("rank 0", lambda s: changed(s, down=torch.zeros(0, 32), up=torch.zeros(32, 0)), r"got \[0, 32\]"),
    ("ranks differ", lambda s: changed(s, down=torch.zeros(2, 32)), r"got \[2, 32\] and \[32, 4\]"),
    ("alpha 0", lambda s: changed(s, alpha=torch.tensor(0.0)), "alpha must be a positive number, got 0.0"),
    ("alpha NaN", lambda s: changed(s, alpha=torch.tensor(math.nan)), "alpha' has values that are NaN"),
    ("alpha negative", lambda s: changed(s, alpha=torch.tensor(-1.0)), "alpha must be a positive number"),
    ("alpha a vector", lambda s: changed(s, alpha=torch.ones(3)), "'down_blocks_0.*to_q'"),
    ("alpha a bool", lambda s: changed(s, alpha=torch.tensor(True)), "is torch.bool"),
    ("NaN", lambda s: changed(s, up=torch.full((32, 4), math.nan)), "NaN or infinite"),
    ("infinite", lambda s: changed(s, down=torch.full((4, 32), math.inf)), "NaN or infinite"),
    ("float64", lambda s: changed(s, down=torch.zeros(4, 32).double()), "is torch.float64; supported are"),
    ("int8", lambda s: changed(s, down=torch.zeros(4, 32).char()), "is torch.int8; supported are"),
    ("a vector", lambda s: changed(s, down=torch.zeros(32)), r"no weight, its shape is \[32\]"),
    ("a scalar", lambda s: changed(s, down=torch.tensor(1.0)), r"no weight, its shape is \[\]"),
    (
        "one of another size",
        lambda s: changed(s, down=torch.zeros(4, 33)),
        r"another size: 1 \('down_blocks_0.*_to_q: expected \[32, 32\], got \[32, 33\]'\)",
    ),
    (
        "3 x 3 for a linear layer",
        lambda s: changed(s, down=torch.zeros(4, 32, 3, 3), up=torch.zeros(32, 4, 1, 1)),
        r"another size: 1 \(.*_to_q: expected \[32, 32\], got \[32, 32, 3, 3\]'\)",
    ),
    ("half a convolution", lambda s: changed(s, down=torch.zeros(4, 32, 3, 3)), r"got \[4, 32, 3, 3\] and \[32, 4\]"),
    (
        "3 x 3 after 3 x 3",
        lambda s: changed(s, down=torch.zeros(4, 32, 3, 3), up=torch.zeros(32, 4, 3, 3)),
        r"got \[4, 32, 3, 3\] and \[32, 4, 3, 3\]",
    ),
    (
        "3 x 3 for a 1 x 1 convolution",
        lambda s: (
            s
            | {
                "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 32, 3, 3),
                "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.zeros(32, 4, 1, 1),
            }
        ),
        r"_proj_in: expected \[32, 32, 1, 1\], got \[32, 32, 3, 3\]'\)",
    ),
    (
        "a matrix for a 3 x 3 convolution",
        lambda s: s | pair("lora_unet_conv_in", 4, 32),
        r"conv_in: expected \[32, 4, 3, 3\], got \[32, 4, 1, 1\]",
    ),
    (
        "a norm",
        lambda s: s | pair("lora_unet_down_blocks_0_resnets_0_norm1", 1, 32),
        r"also adapts layers of another kind: 1 \('down_blocks_0_resnets_0_norm1'\); only",
    ),
    (
        "text encoder, kohya",
        lambda s: (
            s
            | {
                f"lora_te_text_model_encoder_layers_{i}_mlp_fc1.lora_{part}.weight": torch.zeros(2, 2)
                for i in range(2)
                for part in ("down", "up")
            }
        ),
        r"also adapts modules of the text encoder: 2 \('lora_te_text_model_encoder_layers_0_mlp_fc1'",
    ),
    (
        "text encoder, diffusers",
        lambda s: {
            f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{part}.weight": torch.zeros(
                2, 2
            )
            for part in ("down", "up")
        },
        "also adapts modules of the text encoder: 1 ",
    ),
    (
        "one unknown module",
        lambda s: s | {f"lora_unet_extra.lora_{part}.weight": torch.zeros(2, 2) for part in ("down", "up")},
        r"not in this model: 1 \('extra'\)",
    ),
    (
        "the same module in two dialects",
        lambda s: (
            s
            | {
                f"unet.{PREFIX}to_q.lora.{p}.weight": s[
                    f"lora_unet_{(PREFIX + 'to_q').replace('.', '_')}.lora_{p}.weight"
                ]
                for p in ("down", "up")
            }
        ),
        f"{PREFIX}to_q is there twice",
    ),
    (
        "the same key in two spellings",
        lambda s: s | {f"{PREFIX}to_q.{k}.weight": torch.zeros(2, 2) for k in ("lora_A", "lora.down", "lora_B")},
        "is there twice, under two names",
    ),
    ("an unknown key", lambda s: s | {"<s1>": torch.zeros(768)}, r"no known meaning: 1 \('<s1>'\)"),
    ("hostile key", lambda s: s | {"\x1b[2J\n": torch.zeros(1)}, r"'\\x1b\[2J\\n'"),
    ("nothing", lambda s: {}, "not a LoRA"),
    ("a model", lambda s: {"conv_in.weight": torch.zeros(1)}, r"not a LoRA that can be read.*'conv_in\.weight'"),
    ("LoHa", lambda s: changed(s) | {"lora_unet_x.hada_w1_a": torch.zeros(1)}, "not supported: LyCORIS LoHa"),
    ("LoKr", lambda s: changed(s) | {"lora_unet_x.lokr_w1": torch.zeros(1)}, "not supported: LyCORIS LoKr"),
    ("LoCon", lambda s: changed(s) | {"lora_unet_x.lora_mid.weight": torch.zeros(1)}, "not supported: .*lora_mid"),
    ("DoRA, kohya", lambda s: changed(s) | {"lora_unet_x.dora_scale": torch.zeros(1)}, "not supported: DoRA"),
    ("DoRA, PEFT", lambda s: changed(s) | {"x.lora_magnitude_vector": torch.zeros(1)}, "not supported: DoRA"),
    ("difference", lambda s: changed(s) | {"lora_unet_x.diff_b": torch.zeros(1)}, "not supported: a full difference"),
    (
        "cloneofsimo",
        lambda s: {f"unet:{i}:{part}": torch.zeros(2, 2) for i in range(3) for part in ("up", "down")},
        "not supported: the layout of cloneofsimo/lora",
    ),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refusals(
    sd1: UNet2DConditionModel,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    file = write(tmp_path / "k.safetensors", change(kohya(random_lora(sd1))))
    with pytest.raises(WeightsError, match=message) as caught:
        load_lora(file, sd1)
    assert str(caught.value).startswith(f"{file}: ")
    assert str(caught.value).isprintable()


def pair(module: str, width: int, out: int = 320) -> dict[str, Tensor]:
    return {
        f"{module}.lora_down.weight": torch.zeros(4, width),
        f"{module}.lora_up.weight": torch.zeros(out, 4),
    }


BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_"


@pytest.mark.parametrize(
    ("state", "metadata", "family"),
    [
        (pair(f"{BLOCK}k", 768), None, r"SD 1\.x \(prompts 768 wide\)"),
        (pair(f"{BLOCK}k", 1024) | pair(f"{BLOCK}v", 1024), None, r"SD 2\.x \(prompts 1024 wide\)"),
        (pair(f"{BLOCK}k", 64, 32), None, r"pocket \(prompts 64 wide\)"),
        (pair(f"{BLOCK}k", 2048), None, r"SDXL \(prompts 2048 wide\)"),
        (pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 640), None, "SDXL"),
        (pair(f"{BLOCK}q", 320) | pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280), None, "SDXL"),
        (pair("lora_unet_double_blocks_0_img_attn_qkv", 3072), None, "FLUX or SD 3"),
        (
            {
                f"transformer.single_transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.zeros(4, 4)
                for part in "AB"
            },
            None,
            "FLUX or SD 3",
        ),
        (pair(f"{BLOCK}q", 320), {"ss_base_model_version": "sd_v2_v"}, "sd_v2_v"),
        (pair(f"{BLOCK}q", 320), None, "of no known family"),
    ],
)
def test_a_lora_for_another_base_is_named(
    tmp_path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None, family: str
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            UNetConfig(cross_attention_dim=640, block_out_channels=(64, 64, 64, 64), attention_head_dim=4)
        )
    file = write(tmp_path / "k.safetensors", state, metadata)
    with pytest.raises(WeightsError, match=rf"The file is for {family}, the model is of no known family \(prompts 640"):
        load_lora(file, unet)


def test_every_module_of_a_wrong_base_is_counted(tmp_path: Path) -> None:
    with torch.device("meta"):
        sd15 = UNet2DConditionModel(UNetConfig(cross_attention_dim=768))
        sd21 = UNet2DConditionModel(UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20)))
    file = write(tmp_path / "k.safetensors", kohya(random_lora(sd21)))
    assert len(load_lora(file, sd21)[0]) == 128
    with pytest.raises(
        WeightsError, match=r"another size: 32 \(.*for SD 2\.x .*1024 wide\), the model is SD 1\.x .*768"
    ):
        load_lora(file, sd15)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"unet.r": 4}', "lora_alpha must be a number, got 'None'"),
        ('{"unet.lora_alpha": "6"}', "lora_alpha must be a number, got '6'"),
        ('{"unet.lora_alpha": true}', "lora_alpha must be a number"),
        ('{"unet.lora_alpha": NaN}', "alpha must be a positive number"),
        ('{"unet.lora_alpha": 0}', "alpha must be a positive number"),
        ('{"unet.lora_alpha": 6, "unet.use_dora": true}', "use_dora is not supported"),
        ('{"unet.lora_alpha": 6, "unet.use_qalora": true}', "use_qalora is not supported"),
        ('{"unet.lora_alpha": 6, "unet.alpha_pattern": {"(a+)+": 1}}', "not a plain name"),
        ('{"unet.lora_alpha": 6, "unet.alpha_pattern": [1]}', "must be an object"),
    ],
)
def test_a_damaged_peft_configuration_is_refused(
    sd1: UNet2DConditionModel, tmp_path: Path, config: str, message: str
) -> None:
    state = {
        f"unet.{path}.lora_{part}.weight": tensor
        for path, w in random_lora(sd1).items()
        for part, tensor in (("A", w.down), ("B", w.up))
    }
    file = write(tmp_path / "p.safetensors", state, {"lora_adapter_metadata": config})
    with pytest.raises(WeightsError, match=message):
        load_lora(file, sd1)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"minisd.format_version": "2"}, "format '2' of minisd's LoRA files"),
        ({"minisd.recipe": "{"}, r"minisd\.recipe is not JSON"),
        ({"minisd.recipe": "[]"}, r"minisd\.recipe is not a JSON dict"),
        ({"minisd.targets": '"to_q"'}, r"minisd\.targets is not a JSON list"),
        ({"minisd.recipe": "[" * 100_000}, r"minisd\.recipe is not JSON"),
    ],
)
def test_a_damaged_header_is_refused(
    sd1: UNet2DConditionModel, tmp_path: Path, metadata: dict[str, str], message: str
) -> None:
    file = write(tmp_path / "k.safetensors", kohya(random_lora(sd1)), metadata)
    with pytest.raises(WeightsError, match=message) as caught:
        load_lora(file, sd1)
    assert str(file) in str(caught.value)


def with_header(data: bytes, edit: Callable[[str], str]) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    header = edit(data[8:end].decode()).encode()
    return len(header).to_bytes(8, "little") + header + data[end:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: data + b"\0", "damaged"),
        (lambda data: b"", "empty"),
        (lambda data: b"<!DOCTYPE html><html>" + bytes(600), "HTML page"),
        (lambda data: b"\x80\x02pickle" + bytes(600), "pickle"),
        (lambda data: with_header(data, lambda h: h.rstrip()[:-1] + "," + h[1 : h.index("},") + 1] + "}"), "twice"),
    ],
)
def test_damaged_files_are_refused(
    sd1: UNet2DConditionModel, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    file = tmp_path / "k.safetensors"
    file.write_bytes(damage(save(kohya(random_lora(sd1)))))
    with pytest.raises(WeightsError, match=message):
        load_lora(file, sd1)


def test_a_model_passed_as_a_lora_is_refused_unread(sd1: UNet2DConditionModel, tmp_path: Path) -> None:
    entries = {f"lora_unet_{i}.alpha": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_001)}
    raw = json.dumps(entries).encode()
    many = tmp_path / "many.safetensors"
    many.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(WeightsError, match="20001 tensors"):
        load_lora(many, sd1)
    huge = tmp_path / "huge.safetensors"
    size = 4 * 2**30
    header = json.dumps(
        {"a.lora_down.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    ).encode()
    with huge.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # sparse
    with pytest.raises(WeightsError, match="larger than 4 GiB"):
        load_lora(huge, sd1)


def test_our_tensors_are_kohyas(sd1: UNet2DConditionModel, tmp_path: Path) -> None:
    file = tmp_path / "ours.safetensors"
    save_lora(file, random_lora(sd1), INFO)
    state = load_file(file)
    expected = kohya(random_lora(sd1))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
