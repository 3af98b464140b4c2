"""What other programs may have written is understood, and what we cannot use is refused in one line."""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from minisd.errors import WeightsError
from minisd.lora import (
    TARGETS,
    LoRAWeights,
    adaptable_layers,
    add_lora,
    inject_lora,
    lora_parameters,
    lora_weights,
)
from minisd.lora_info import LoRAInfo
from minisd.lora_reader import load_lora
from minisd.lora_writer import save_lora
from minisd.unet import UNet2DConditionModel
from minisd.unet_config import UNetConfig
from minisd.weights import load_unet
from tests.lora_files import INFO, PREFIX, kohya, random_lora, read_unet, run_ours, write


@pytest.mark.parametrize("dims", [2, 4])
def test_a_projection_is_a_matrix_or_a_1x1_convolution(sd_folder: Path, tmp_path: Path, dims: int) -> None:
    """SD 1.x has 1 x 1 convolutions for proj_in and proj_out, SD 2.x linear layers; a file may have either for both."""
    model = load_unet(sd_folder)
    given = {path: w for path, w in random_lora(model, targets="all").items() if ".proj_" in path}
    state = {
        key: tensor.flatten(1)[(...,) + (None,) * (dims - 2)] if tensor.dim() else tensor
        for key, tensor in kohya(given).items()
    }
    weights, _ = read_unet(write(tmp_path / "k.safetensors", state), model)
    assert {w.shape for w in weights.values()} == {tuple(adaptable_layers(model)[path].weight.shape) for path in given}
    assert torch.equal(run_ours(sd_folder, weights), run_ours(sd_folder, given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_1x1_convolution_shapes(sd_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {
        key: t.to(dtype) if t.dim() == 0 else t[:, :, None, None].to(dtype)
        for key, t in kohya(random_lora(load_unet(sd_folder))).items()
    }
    weights, _ = read_unet(write(tmp_path / "k.safetensors", state), load_unet(sd_folder))
    assert {w.down.dtype for w in weights.values()} == {dtype}
    expected = {
        path: LoRAWeights(w.down.to(dtype).float(), w.up.to(dtype).float(), 6.0)
        for path, w in random_lora(load_unet(sd_folder)).items()
    }
    assert torch.equal(run_ours(sd_folder, weights), run_ours(sd_folder, expected))


def test_a_model_with_adapters_reads_files_all_the_same(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(tiny_unet.config)
    inject_lora(unet, TARGETS["attn"], rank=2, alpha=2)
    save_lora(tmp_path / "a.safetensors", {"unet": random_lora(tiny_unet)}, INFO)
    weights, _ = read_unet(tmp_path / "a.safetensors", unet)
    assert add_lora(unet, weights, name="second") == list(lora_weights(unet))
    assert len(lora_parameters(unet)) == 4 * len(weights)


def test_kohyas_header_is_understood(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
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
    _, info = read_unet(write(tmp_path / "k.safetensors", kohya(random_lora(tiny_unet)), metadata), tiny_unet)
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
    tiny_unet: UNet2DConditionModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zero = {path: LoRAWeights(w.down, torch.zeros_like(w.up), w.alpha) for path, w in random_lora(tiny_unet).items()}
    save_lora(tmp_path / "a.safetensors", {"unet": zero}, INFO)
    with caplog.at_level(logging.WARNING):
        load_lora(tmp_path / "a.safetensors", {"unet": tiny_unet})
    assert "no effect" in caplog.text


def changed(state: dict[str, Tensor], **parts: Tensor | None) -> dict[str, Tensor]:
    """A copy of a kohya state with tensors of one module replaced or (None) left out."""
    name = f"lora_unet_{(PREFIX + 'to_q').replace('.', '_')}"
    new = {f"{name}.{part if part == 'alpha' else f'lora_{part}.weight'}": value for part, value in parts.items()}
    return {key: value for key, value in (state | new).items() if value is not None}


def magnitude(state: dict[str, Tensor], name: str, *shape: int) -> dict[str, Tensor]:
    return state | {f"lora_unet_{(PREFIX + 'to_q').replace('.', '_')}.{name}": torch.ones(shape)}


REFUSED: list[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    ("up without down", lambda s: changed(s, down=None), r"incomplete, down or up is missing .* 1 \('down_blocks_0"),
    ("alpha alone", lambda s: changed(s, down=None, up=None), "incomplete"),
    ("rank 0", lambda s: changed(s, down=torch.zeros(0, 32), up=torch.zeros(32, 0)), r"got \[0, 32\]"),
    ("ranks differ", lambda s: changed(s, down=torch.zeros(2, 32)), r"got \[2, 32\] and \[32, 4\]"),
    ("alpha 0", lambda s: changed(s, alpha=torch.tensor(0.0)), "alpha must be a positive number, got 0.0"),
    (
        "alpha 0 everywhere",
        lambda s: s | {key: torch.tensor(0.0) for key in s if key.endswith(".alpha")},
        r"cannot be used: 48 \('down_blocks_0[^)]*, \.\.\.\): LoRA alpha must be a positive number",
    ),
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
        r"not all of it can be used: layers other than .*: 1 \('down_blocks_0_resnets_0_norm1'\)\. The file is for",
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
        r"not all .* modules not in this model: 2 \('text_encoder: text_model_encoder_layers_0_mlp_fc1'",
    ),
    (
        "text encoder, diffusers",
        lambda s: {
            f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{part}.weight": torch.zeros(
                2, 2
            )
            for part in ("down", "up")
        },
        r"nothing of it fits this model: modules not in this model: 1 \('text_encoder: text_model\.encoder\.layers",
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
    ("key of a megabyte", lambda s: s | {"x" * 1_000_000: torch.zeros(1)}, "no known meaning: 1 "),
    ("module of a megabyte", lambda s: s | pair("x" * 1_000_000, 1), "modules not in this model: 1 "),
    ("nothing", lambda s: {}, "not a LoRA"),
    ("a model", lambda s: {"conv_in.weight": torch.zeros(1)}, r"not a LoRA that can be read.*'conv_in\.weight'"),
    (
        "a network",
        lambda s: {f"conv{i}.weight": torch.zeros(1) for i in range(20)},
        r"no known meaning: 20 .* It looks like a model: pass it with --model\.",
    ),
    (
        "a model in the original names",
        lambda s: {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)},
        "not a LoRA that can be read.* A model is passed with --model",
    ),
    ("LoHa", lambda s: changed(s) | {"lora_unet_x.hada_w1_a": torch.zeros(1)}, "not supported: LyCORIS LoHa"),
    ("LoKr", lambda s: changed(s) | {"lora_unet_x.lokr_w1": torch.zeros(1)}, "not supported: LyCORIS LoKr"),
    ("LoCon", lambda s: changed(s) | {"lora_unet_x.lora_mid.weight": torch.zeros(1)}, "not supported: .*lora_mid"),
    ("GLoRA", lambda s: changed(s) | {"lora_unet_x.a1.weight": torch.zeros(1)}, "not supported: GLoRA"),
    ("BOFT", lambda s: changed(s) | {"lora_unet_x.boft_blocks": torch.zeros(1)}, "not supported: BOFT"),
    ("OFT", lambda s: changed(s) | {"lora_unet_x.oft_blocks": torch.zeros(1)}, "not supported: OFT"),
    (
        "LoHa of FLUX",
        lambda s: {"lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a": torch.zeros(1)},
        "not supported: LyCORIS LoHa, for FLUX or SD 3",
    ),
    ("DoRA by input", lambda s: magnitude(s, "dora_scale", 1, 32), "not supported: a DoRA with a magnitude for each i"),
    ("DoRA too long", lambda s: magnitude(s, "dora_scale", 33, 1), r"one for each of 32 outputs, got \[33, 1\]"),
    ("DoRA of a matrix", lambda s: magnitude(s, "lora_magnitude_vector", 32, 2), r"of 32 outputs, got \[32, 2\]"),
    ("DoRA alone", lambda s: s | {"x.lora_magnitude_vector": torch.zeros(1)}, r"incomplete.* 1 \('x'\)"),
    *(
        ("difference", lambda s, key=key: changed(s) | {key: torch.zeros(1)}, "not supported: a full difference")
        for key in ("lora_unet_x.diff", "lora_unet_x.diff_b")
    ),
    (
        "numbers of another model",
        lambda s: {f"unet:{i}:{part}": torch.zeros(2, 2) for i in range(3) for part in ("up", "down")},
        "3 numbered modules for the unet, which has 54 layers to number",
    ),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refusals(
    tiny_unet: UNet2DConditionModel,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    file = write(tmp_path / "k.safetensors", change(kohya(random_lora(tiny_unet))))
    with pytest.raises(WeightsError, match=message) as caught:
        load_lora(file, {"unet": tiny_unet})
    assert str(caught.value).startswith(f"{file}: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


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
        load_lora(file, {"unet": unet})


def test_every_module_of_a_wrong_base_is_counted(tmp_path: Path) -> None:
    with torch.device("meta"):
        sd15 = UNet2DConditionModel(UNetConfig(cross_attention_dim=768))
        sd21 = UNet2DConditionModel(UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20)))
    file = write(tmp_path / "k.safetensors", kohya(random_lora(sd21)))
    assert len(read_unet(file, sd21)[0]) == 128
    with pytest.raises(
        WeightsError, match=r"another size: 32 \(.*for SD 2\.x .*1024 wide\), the model is SD 1\.x .*768"
    ):
        load_lora(file, {"unet": sd15})


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
        ('{"unet.lora_alpha": 6, "unet.use_dora": true}', "use_dora is set, and the file has no lora_magnitude_vector"),
        ('{"unet.lora_alpha": 6, "unet.init_lora_weights": "pissa_niter_4"}', "it changes the base model, too"),
        ('{"text_encoder.lora_alpha": 6}', "lora_alpha must be a number, got 'None'"),
        ('{"unet.lora_alpha": 6, "unet.use_qalora": true}', "use_qalora is not supported"),
        ('{"unet.lora_alpha": 6, "unet.alpha_pattern": {"(a+)+": 1}}', "not a plain name"),
        ('{"unet.lora_alpha": 6, "unet.alpha_pattern": [1]}', "must be an object"),
    ],
)
def test_a_damaged_peft_configuration_is_refused(
    tiny_unet: UNet2DConditionModel, tmp_path: Path, config: str, message: str
) -> None:
    state = {
        f"unet.{path}.lora_{part}.weight": tensor
        for path, w in random_lora(tiny_unet).items()
        for part, tensor in (("A", w.down), ("B", w.up))
    }
    file = write(tmp_path / "p.safetensors", state, {"lora_adapter_metadata": config})
    with pytest.raises(WeightsError, match=message):
        load_lora(file, {"unet": tiny_unet})


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
    tiny_unet: UNet2DConditionModel, tmp_path: Path, metadata: dict[str, str], message: str
) -> None:
    file = write(tmp_path / "k.safetensors", kohya(random_lora(tiny_unet)), metadata)
    with pytest.raises(WeightsError, match=message) as caught:
        load_lora(file, {"unet": tiny_unet})
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
    tiny_unet: UNet2DConditionModel, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    file = tmp_path / "k.safetensors"
    file.write_bytes(damage(save(kohya(random_lora(tiny_unet)))))
    with pytest.raises(WeightsError, match=message):
        load_lora(file, {"unet": tiny_unet})


def test_a_pickled_lora_is_refused_with_a_way_to_convert_it_that_works(
    tiny_unet: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = kohya(random_lora(tiny_unet))
    (tmp_path / "old.pkl").write_bytes(pickle.dumps(1, protocol=2) + bytes(600))
    (tmp_path / "peft").mkdir()
    for name in ("it's.ckpt", "peft/adapter_model.bin"):
        torch.save(state, tmp_path / name)
    for path in (Path("it's.ckpt"), Path("old.pkl"), Path("peft")):
        with pytest.raises(WeightsError, match="never opens them") as caught:
            load_lora(path, {"unet": tiny_unet})
        assert "spaces/safetensors" not in str(caught.value)
        if path.name == "old.pkl":
            continue
        code = str(caught.value).partition("you can lose: ")[2].removesuffix(".")
        monkeypatch.chdir(tmp_path / path if path.is_dir() else tmp_path)
        exec(code)
        monkeypatch.chdir(tmp_path)
    converted = load_file("it's.safetensors")
    assert converted.keys() == state.keys() == load_file("peft/adapter_model.safetensors").keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)


def test_a_model_folder_passed_as_a_lora_is_refused_by_name(sd_folder: Path, tiny_unet: UNet2DConditionModel) -> None:
    with pytest.raises(WeightsError, match="a model folder: pass it with --model") as caught:
        load_lora(sd_folder, {"unet": tiny_unet})
    assert str(caught.value).startswith(f"{sd_folder}: ")


def test_a_model_passed_as_a_lora_is_refused_unread(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    entries = {f"lora_unet_{i}.alpha": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_001)}
    raw = json.dumps(entries).encode()
    many = tmp_path / "many.safetensors"
    many.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(WeightsError, match="20001 tensors"):
        load_lora(many, {"unet": tiny_unet})
    huge = tmp_path / "huge.safetensors"
    size = 4 * 2**30
    header = json.dumps(
        {"a.lora_down.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    ).encode()
    with huge.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # sparse
    with pytest.raises(WeightsError, match="larger than 4 GiB"):
        load_lora(huge, {"unet": tiny_unet})
