"""The denoiser against diffusers' on the same weights: outputs and gradients.

float64 tells a correct network (differences of 1e-14) from one with a wrong epsilon or GELU (1e-5), which float32 does
not. The configs are small but not degenerate: at least 2 x 2 positions at the bottom, several channels per group.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel as ReferenceUNet
from torch import Tensor

from minisd.unet import UNet2DConditionModel
from minisd.unet_config import UNetConfig
from tests.tiny import randomise

CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
PLAIN = ("DownBlock2D", "UpBlock2D")
NAMES = ["sd1", "sd2", "plain-first", "xl"]


def _reference(name: str) -> ReferenceUNet:
    levels, options = {
        # As SD1.x: convolutions around the transformers, one number of heads, four levels, the last without attention.
        "sd1": (
            [CROSS, CROSS, CROSS, PLAIN],
            {
                "block_out_channels": (16, 32, 48, 48),
                "layers_per_block": 2,
                "attention_head_dim": 4,
                "cross_attention_dim": 24,
                "norm_num_groups": 8,
            },
        ),
        # As SD2.x: linear projections, heads by level. An epsilon of its own shows where norm_eps goes, and where not.
        "sd2": (
            [CROSS, CROSS, PLAIN],
            {
                "block_out_channels": (16, 32, 64),
                "layers_per_block": 1,
                "attention_head_dim": (2, 4, 8),
                "cross_attention_dim": 40,
                "norm_num_groups": 4,
                "norm_eps": 1e-3,
                "use_linear_projection": True,
            },
        ),
        # As XL: transformers of several blocks, deeper by level, and the sizes and the pooled prompt beside the time.
        "xl": (
            [PLAIN, CROSS, CROSS],
            {
                "block_out_channels": (16, 32, 64),
                "layers_per_block": 2,
                "transformer_layers_per_block": (1, 2, 3),
                "attention_head_dim": (1, 2, 8),
                "cross_attention_dim": 40,
                "norm_num_groups": 8,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 24 + 6 * 8,
            },
        ),
        # Attention everywhere but at the top, channels in and out that differ, one residual block per level.
        "plain-first": (
            [PLAIN, CROSS, CROSS],
            {
                "in_channels": 5,
                "out_channels": 3,
                "block_out_channels": (16, 24, 48),
                "layers_per_block": 1,
                "attention_head_dim": (1, 3, 6),
                "cross_attention_dim": 32,
                "norm_num_groups": 8,
            },
        ),
    }[name]
    down, up = zip(*levels, strict=True)
    torch.manual_seed(0)
    reference = ReferenceUNet(down_block_types=down, up_block_types=up[::-1], **options)
    randomise(reference)
    return reference.requires_grad_(True)


Pair = tuple[UNet2DConditionModel, ReferenceUNet]


def _pair(name: str, dtype: torch.dtype) -> Pair:
    """Ours and diffusers', with the same weights, by way of what a model folder holds: a JSON file and a state dict."""
    reference = _reference(name).to(dtype)
    ours = UNet2DConditionModel(UNetConfig.from_json(json.loads(reference.to_json_string()))).to(dtype)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


@pytest.fixture(scope="module")
def double() -> Callable[[str], Pair]:
    pairs: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in pairs:
            pairs[name] = _pair(name, torch.float64)
        return pairs[name]

    return pair


def _run_both(pair: Pair, sample: Tensor, timesteps: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of ours and of diffusers'."""
    ours, reference = pair
    if not ours.config.is_xl:
        return ours(sample, timesteps, context), reference(sample, timesteps, context).sample
    generator = torch.Generator().manual_seed(3)
    text_embeds = torch.randn(len(sample), ours.config.pooled_width, generator=generator).to(sample.dtype)
    time_ids = torch.tensor([[1024.0, 768, 0, 17, 512, 640], [333, 4000, 25, 0, 1024, 1024]])
    added = {"text_embeds": text_embeds, "time_ids": time_ids}
    expected = reference(sample, timesteps, context, added_cond_kwargs=added).sample
    return ours(sample, timesteps, context, text_embeds, time_ids), expected


def _inputs(config: UNetConfig, size: tuple[int, int], tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, config.in_channels, *size, generator=generator, dtype=torch.float64)
    context = torch.randn(2, tokens, config.cross_attention_dim, generator=generator, dtype=torch.float64)
    return sample.to(dtype), context.to(dtype)


@pytest.mark.parametrize(
    ("size", "tokens", "timesteps"),
    [
        pytest.param((16, 16), 77, [999.0, 0.37], id="16x16"),
        pytest.param((18, 13), 154, [1, 731], id="18x13-long-prompt-int-timesteps"),
        pytest.param((17, 22), 77, [500.5, 0.0], id="17x22"),
        pytest.param((16, 32), 154, [0, 999], id="16x32-long-prompt-int-timesteps"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_forward_in_float64(
    double: Callable[[str], Pair], name: str, size: tuple[int, int], tokens: int, timesteps: list[float]
) -> None:
    pair = double(name)
    sample, context = _inputs(pair[0].config, size, tokens, torch.float64)
    actual, expected = _run_both(pair, sample, torch.tensor(timesteps), context)
    assert expected.std() > 0.1  # a network that lets nothing through would agree with anything
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [(16, 16), (18, 13)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_forward_in_float32(name: str, size: tuple[int, int]) -> None:
    pair = _pair(name, torch.float32)
    sample, context = _inputs(pair[0].config, size, 77, torch.float32)
    actual, expected = _run_both(pair, sample, torch.tensor([999.0, 0.37]), context)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(double: Callable[[str], Pair], name: str) -> None:
    ours, reference = double(name)
    size = (18, 13)
    sample, context = _inputs(ours.config, size, 77, torch.float64)
    timesteps = torch.tensor([999.0, 0.37])
    weights = torch.randn(2, ours.config.out_channels, *size, generator=torch.Generator().manual_seed(2)).double()

    def gradients(network: torch.nn.Module, run: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        inputs = {"sample": sample.clone().requires_grad_(), "context": context.clone().requires_grad_()}
        wanted = inputs | dict(network.named_parameters())
        loss = (run(inputs["sample"], inputs["context"]) * weights).sum()
        return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))

    expected = gradients(reference, lambda x, context: _run_both(double(name), x, timesteps, context)[1])
    actual = gradients(ours, lambda x, context: _run_both(double(name), x, timesteps, context)[0])
    assert actual.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(actual[key], gradient, rtol=0, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
