"""Laws of the adapters: what they change, and above all what they do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.lora import (
    TARGETS,
    LoRALinear,
    LoRAWeights,
    add_lora,
    inject_lora,
    linear_layers,
    lora_parameters,
    lora_weights,
    merge_lora,
    remove_lora,
    set_lora_scale,
    unmerge_lora,
)
from minisd.unet import UNet2DConditionModel, UNetConfig

SD1_LIKE = {"attention_head_dim": 4, "use_linear_projection": False}
SD2_LIKE = {"attention_head_dim": (4, 8), "use_linear_projection": True}


def tiny_unet(**fields: Any) -> UNet2DConditionModel:
    config = UNetConfig(
        cross_attention_dim=48,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        **(fields or SD1_LIKE),
    )
    torch.manual_seed(0)
    return UNet2DConditionModel(config).requires_grad_(False)


def run(unet: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 16, 16, generator=generator).to(dtype)
    context = torch.randn(2, 7, 48, generator=generator).to(dtype)
    return unet(sample, torch.tensor([3, 700]), context)


def learn(unet: nn.Module, seed: int = 2) -> None:
    """Give the adapters weights as if they had learnt something visible."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(unet):
        if "lora_up" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


def random_weights(unet: nn.Module, seed: int, rank: int, alpha: float) -> dict[str, LoRAWeights]:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: LoRAWeights(
            torch.randn(rank, layer.in_features, generator=generator) / math.sqrt(layer.in_features),
            0.3 * torch.randn(layer.out_features, rank, generator=generator),
            alpha,
        )
        for path, layer in linear_layers(unet).items()
        if path.endswith(("to_q", "to_v"))
    }


@pytest.mark.parametrize("fields", [SD1_LIKE, SD2_LIKE])
def test_a_new_adapter_changes_no_bit(fields: dict[str, Any]) -> None:
    unet = tiny_unet(**fields)
    before = run(unet)
    inject_lora(unet, TARGETS["attn+ff"], rank=4, alpha=8)
    assert torch.equal(run(unet), before)
    learn(unet)
    assert not torch.allclose(run(unet), before, atol=1e-2)


def test_a_new_adapter_changes_no_bit_under_autocast_over_a_bfloat16_base() -> None:
    unet = tiny_unet().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        before = run(unet)
        inject_lora(unet, TARGETS["attn"], rank=4, alpha=8)
        assert torch.equal(run(unet), before)
    learn(unet)  # outside: autocast keeps its bfloat16 copies of float32 weights until it ends
    with torch.autocast("cpu", torch.bfloat16):
        after = run(unet)
        after.float().pow(2).mean().backward()
    assert after.dtype == before.dtype
    assert not torch.equal(after, before)
    assert {parameter.grad.dtype for _, parameter in lora_parameters(unet)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_output_has_the_bases_dtype_without_autocast(dtype: torch.dtype) -> None:
    layer = nn.Sequential(nn.Linear(8, 6)).to(dtype)
    inject_lora(layer, ["0"], rank=2, alpha=2)
    learn(layer)
    x = torch.randn(3, 8).to(dtype)
    adapter = layer[0].adapter("default")
    base = F.linear(x, layer[0].weight, layer[0].bias)
    change = x.float() @ adapter.lora_down.weight.T @ adapter.lora_up.weight.T
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), base + change.to(dtype), rtol=0, atol=1e-6 if dtype == torch.float32 else 0)
    assert {parameter.dtype for _, parameter in lora_parameters(layer)} == {torch.float32}


def test_the_equation() -> None:
    layer = nn.Sequential(nn.Linear(8, 6)).double()
    inject_lora(layer, ["0"], rank=2, alpha=7)
    learn(layer)
    layer.double()
    x = torch.randn(3, 8, dtype=torch.float64)
    w = lora_weights(layer)["0"]
    set_lora_scale(layer, "default", 0.25)
    expected = x @ layer[0].weight.T + layer[0].bias + 0.25 * (7 / 2) * (x @ w.down.T @ w.up.T)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


def test_the_bases_parameters_stay_the_same_objects_under_the_same_names() -> None:
    unet = tiny_unet()
    before = dict(unet.named_parameters())
    shapes = {key: value.shape for key, value in unet.state_dict().items()}
    inject_lora(unet, TARGETS["attn+ff"], rank=4, alpha=8)
    after = dict(unet.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name for name in after if name not in before} == {name for name, _ in lora_parameters(unet)}
    assert all(".lora_" in name for name, _ in lora_parameters(unet))
    assert {key: value.shape for key, value in unet.state_dict().items() if ".lora_" not in key} == shapes
    remove_lora(unet, "default")
    assert {name: id(parameter) for name, parameter in unet.named_parameters()} == {n: id(p) for n, p in before.items()}
    assert not any(isinstance(module, LoRALinear) for module in unet.modules())


def test_only_adapters_get_gradients_and_down_gets_none_at_first() -> None:
    unet = tiny_unet().requires_grad_(True)
    inject_lora(unet, TARGETS["attn"], rank=4, alpha=8)
    run(unet).pow(2).mean().backward()
    for name, parameter in unet.named_parameters():
        if ".lora_" not in name:
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name
        else:
            assert parameter.requires_grad, name
            assert parameter.grad.any() == ("lora_up" in name), name
    learn(unet)
    run(unet).pow(2).mean().backward()
    assert all(parameter.grad.any() for _, parameter in lora_parameters(unet))


def test_parameters_are_a_list_in_a_fixed_order() -> None:
    unet = tiny_unet()
    paths = inject_lora(unet, TARGETS["attn"], rank=4, alpha=8)
    names = [name for name, _ in lora_parameters(unet)]
    assert isinstance(lora_parameters(unet), list)
    assert names == [f"{p}.adapters.default.lora_{part}.weight" for p in paths for part in ("down", "up")]
    assert paths == [path for path in linear_layers(unet) if path in paths]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_merging_changes_nothing_and_unmerging_restores_every_bit(dtype: torch.dtype, tolerance: float) -> None:
    unet = tiny_unet()
    add_lora(unet, random_weights(unet, 1, rank=3, alpha=5.0), name="one", lora_scale=-0.7)
    add_lora(unet, random_weights(unet, 2, rank=2, alpha=1.0), name="two")
    unet.to(dtype)
    before = run(unet, dtype)
    base = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    merge_lora(unet)
    changed = {name for name, parameter in unet.named_parameters() if not torch.equal(parameter, base[name])}
    assert changed == {f"{path}.weight" for path in lora_weights(unet, "one")}
    scale = before.abs().max().item()
    torch.testing.assert_close(run(unet, dtype), before, rtol=0, atol=tolerance * max(1, scale))
    assert not any("base_weight" in key for key in unet.state_dict())
    unmerge_lora(unet)
    assert all(torch.equal(parameter, base[name]) for name, parameter in unet.named_parameters())
    assert torch.equal(run(unet, dtype), before)


def test_merging_into_bfloat16_rounds_once() -> None:
    layer = nn.Sequential(nn.Linear(8, 6)).bfloat16()
    weights = {"0": LoRAWeights(torch.randn(2, 8), torch.randn(6, 2), 3.0)}
    base = layer[0].weight.detach().clone()
    add_lora(layer, weights, name="a")
    add_lora(layer, weights, name="b", lora_scale=0.5)
    merge_lora(layer)
    exact = base.float() + 1.5 * (weights["0"].up @ weights["0"].down) * 1.5
    torch.testing.assert_close(layer[0].weight.float(), exact.bfloat16().float(), rtol=2**-7, atol=0)
    unmerge_lora(layer)
    assert torch.equal(layer[0].weight, base)


def test_two_adapters_add_up_with_their_scales() -> None:
    unet = tiny_unet()
    one, two = random_weights(unet, 1, rank=3, alpha=5.0), random_weights(unet, 2, rank=2, alpha=1.0)
    by_hand = tiny_unet().double()
    for path, layer in linear_layers(by_hand).items():
        for weights, scale in ((one, 0.5), (two, -2.0)):
            if path in weights:
                w = weights[path]
                layer.weight.data += scale * w.alpha / w.rank * (w.up.double() @ w.down.double())
    add_lora(unet, one, name="one", lora_scale=0.5)
    add_lora(unet, two, name="two")
    set_lora_scale(unet, "two", -2.0)
    torch.testing.assert_close(run(unet.double(), torch.float64), run(by_hand, torch.float64), rtol=0, atol=1e-10)


def test_scale_zero_is_exactly_the_base() -> None:
    unet = tiny_unet()
    before = run(unet)
    add_lora(unet, random_weights(unet, 1, rank=3, alpha=5.0), name="one", lora_scale=0)
    assert torch.equal(run(unet), before)
    assert not any(layer.active for layer in unet.modules() if isinstance(layer, LoRALinear))  # nor does it cost time
    base = {path: layer.weight.clone() for path, layer in linear_layers(unet).items()}
    merge_lora(unet)
    assert all(torch.equal(layer.weight, base[path]) for path, layer in linear_layers(unet).items())


def test_removing_one_of_two_leaves_the_other() -> None:
    unet, other = tiny_unet(), tiny_unet()
    one, two = random_weights(unet, 1, rank=3, alpha=5.0), random_weights(unet, 2, rank=2, alpha=1.0)
    add_lora(unet, one, name="one")
    add_lora(unet, two, name="two")
    remove_lora(unet, "one")
    add_lora(other, two, name="two")
    assert torch.equal(run(unet), run(other))


def test_weights_given_are_copied_and_come_back() -> None:
    unet = tiny_unet()
    given = random_weights(unet, 1, rank=3, alpha=5.0)
    kept = {path: w.down.clone() for path, w in given.items()}
    paths = add_lora(unet, given, name="one")
    assert list(lora_weights(unet, "one")) == paths
    assert all(
        w.alpha == 5.0 and torch.equal(w.down, given[path].down) for path, w in lora_weights(unet, "one").items()
    )
    for _, parameter in lora_parameters(unet):
        parameter.data.zero_()
    assert all(torch.equal(given[path].down, kept[path]) for path in kept)


@pytest.mark.parametrize("fields", [SD1_LIKE, SD2_LIKE])
def test_targets_are_path_suffixes_in_whole_components(fields: dict[str, Any]) -> None:
    unet = tiny_unet(**fields)
    blocks = 4  # transformer blocks: down 1, up 2, mid 1
    assert len(inject_lora(unet, ["to_out.0"], rank=2, alpha=2, name="a")) == 2 * blocks
    assert len(inject_lora(unet, ["attn2.to_k"], rank=2, alpha=2, name="b")) == blocks
    assert len(inject_lora(unet, ["ff.net.2"], rank=2, alpha=2, name="c")) == blocks
    assert len(inject_lora(unet, TARGETS["attn+ff"], rank=2, alpha=2, name="d")) == 10 * blocks
    assert isinstance(unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_out[0], LoRALinear)
    for part_of_a_word in ("o_q", "out.0", "net.0", "lora_down", "default.lora_up"):
        with pytest.raises(ValueError, match="matches no linear layer"):
            inject_lora(unet, [part_of_a_word], rank=2, alpha=2, name="e")


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"cross_attention_dim": 768}, 3_188_736),
        (
            {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
            3_319_808,
        ),
    ],
)
def test_counts_at_full_size(fields: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig(**fields))
    assert len(inject_lora(unet, TARGETS["attn"], rank=16, alpha=16)) == 128
    assert sum(parameter.numel() for _, parameter in lora_parameters(unet)) == parameters
    assert all(parameter.is_meta for parameter in unet.parameters())
    assert unet(
        torch.empty(1, 4, 8, 8, device="meta"),
        torch.zeros(1, device="meta"),
        torch.empty(1, 7, fields["cross_attention_dim"], device="meta"),
    ).shape == (1, 4, 8, 8)


def test_initial_weights_depend_on_seed_and_path_only() -> None:
    def downs(targets: list[str], seed: int, rank: int = 4) -> dict[str, Tensor]:
        unet = tiny_unet()
        torch.manual_seed(torch.seed() % 1000)  # the global generator has no say
        inject_lora(unet, targets, rank=rank, alpha=1, seed=seed)
        return {path: w.down for path, w in lora_weights(unet).items()}

    all_at_once, few = downs(["to_q", "to_k", "to_v"], 5), downs(["to_v"], 5)
    assert all(torch.equal(all_at_once[path], down) for path, down in few.items())
    assert not any(torch.equal(down, downs(["to_v"], 6)[path]) for path, down in few.items())
    assert len({down.flatten()[0].item() for down in all_at_once.values()}) == len(all_at_once)
    assert all(torch.equal(down[:2], downs(["to_v"], 5, rank=2)[path]) for path, down in few.items())
    for down in all_at_once.values():
        assert down.abs().max() <= 1 / math.sqrt(down.shape[1])
        assert down.std() == pytest.approx(1 / math.sqrt(3 * down.shape[1]), rel=0.25)


def test_dropout_is_for_training_only() -> None:
    layer = nn.Sequential(nn.Linear(64, 6))
    inject_lora(layer, ["0"], rank=2, alpha=2, dropout=0.5)
    learn(layer)
    x = torch.randn(3, 64)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_model_in_eval_mode_stays_in_it() -> None:
    unet = tiny_unet().eval()
    inject_lora(unet, TARGETS["attn"], rank=2, alpha=2, dropout=0.5)
    assert not any(module.training for module in unet.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": []}, "got none"),
        ({"targets": ["to_q", "to_z"]}, "'to_z' matches no linear layer; .*to_q"),
        ({"rank": 0}, "rank must be from 1 to 32.*to_q; got 0"),
        ({"rank": 33}, "rank must be from 1 to 32.*to_q; got 33"),
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"alpha": math.nan}, "alpha must be"),
        ({"alpha": -1}, "alpha must be"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": math.nan}, "dropout"),
        ({"name": "a.b"}, "cannot be called 'a.b'"),
        ({"name": "keys"}, "cannot be called"),
        ({"name": ""}, "cannot be called"),
    ],
)
def test_refusals_of_inject_leave_the_model_alone(change: dict[str, Any], message: str) -> None:
    unet = tiny_unet().requires_grad_(True)
    modules = list(unet.modules())
    arguments: dict[str, Any] = {"targets": ["to_q"], "rank": 4, "alpha": 4} | change
    with pytest.raises(ValueError, match=message):
        inject_lora(unet, arguments.pop("targets"), **arguments)
    assert list(unet.modules()) == modules
    assert all(parameter.requires_grad for parameter in unet.parameters())


def merged_layer() -> nn.Module:
    layer = nn.Sequential(nn.Linear(8, 6))
    inject_lora(layer, ["0"], rank=2, alpha=2)
    merge_lora(layer)
    return layer


GOOD = LoRAWeights(torch.zeros(2, 8), torch.zeros(6, 2), 1.0)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: merge_lora(merged_layer()), "merged already"),
        (lambda: remove_lora(merged_layer(), "default"), "call unmerge_lora"),
        (lambda: set_lora_scale(merged_layer(), "default", 0.5), "call unmerge_lora"),
        (lambda: add_lora(merged_layer(), {"0": GOOD}, name="b"), "call unmerge_lora"),
        (lambda: add_lora(merged_layer(), {"0": GOOD}, name="default"), "already has a LoRA called 'default'"),
        (lambda: merge_lora(tiny_unet()), "no LoRA to merge"),
        (lambda: unmerge_lora(tiny_unet()), "none is merged"),
        (lambda: lora_weights(merged_layer(), "other"), "no LoRA is called 'other'; the model has: default"),
        (lambda: lora_weights(tiny_unet()), "the model has: none"),
        (lambda: set_lora_scale(tiny_unet(), "default", math.inf), "finite"),
        (lambda: add_lora(nn.Sequential(nn.Linear(8, 6)), {"0": GOOD}, name="a", lora_scale=math.nan), "finite"),
        (lambda: add_lora(nn.Sequential(nn.Linear(8, 6)), {"1": GOOD}, name="a"), "no linear layer '1'"),
        (lambda: add_lora(nn.Sequential(nn.Linear(6, 8)), {"0": GOOD}, name="a"), r"\[8, 6\], got \[6, 8\]"),
        (lambda: add_lora(nn.Sequential(nn.Linear(8, 6)), {}, name="a"), "no weights"),
        (lambda: LoRAWeights(torch.zeros(2, 8), torch.zeros(6, 3), 1.0), r"got \[2, 8\] and \[6, 3\]"),
        (lambda: LoRAWeights(torch.zeros(0, 8), torch.zeros(6, 0), 1.0), r"got \[0, 8\]"),
        (lambda: LoRAWeights(torch.zeros(2, 8, 1, 1), torch.zeros(6, 2), 1.0), r"got \[2, 8, 1, 1\]"),
    ],
)
def test_refusals(act: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()
