"""Laws of the adapters: what they change, and above all what they do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minisd.lora import (
    TARGETS,
    LoRALayer,
    LoRALinear,
    LoRAWeights,
    adaptable_layers,
    add_lora,
    bake_lora,
    inject_lora,
    lora_parameters,
    lora_weights,
    merge_lora,
    remove_lora,
    set_lora_scale,
    unmerge_lora,
)
from minisd.unet import UNet2DConditionModel
from minisd.unet_config import UNetConfig

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
    weights = {}
    for path, layer in adaptable_layers(unet).items():
        out, *inner = layer.weight.shape
        if path.endswith(("to_q", "to_v", "conv1", "conv_shortcut", "proj_in", "samplers.0.conv")):
            down = torch.randn(rank, *inner, generator=generator) / math.sqrt(math.prod(inner))
            up = 0.3 * torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator)
            weights[path] = LoRAWeights(down, up, alpha)
    return weights


@pytest.mark.parametrize("fields", [SD1_LIKE, SD2_LIKE])
@pytest.mark.parametrize("targets", ["attn+ff", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_new_adapter_changes_no_bit(fields: dict[str, Any], targets: str, dtype: torch.dtype) -> None:
    unet = tiny_unet(**fields).to(dtype)
    before = run(unet, dtype)
    inject_lora(unet, TARGETS[targets], rank=4, alpha=8)
    assert torch.equal(run(unet, dtype), before)
    learn(unet)
    after = run(unet, dtype)
    assert after.dtype == dtype
    assert not torch.allclose(after, before, atol=1e-2)
    after.float().pow(2).mean().backward()
    assert {parameter.grad.dtype for _, parameter in lora_parameters(unet)} == {torch.float32}


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), (3, 8)),
    "of a vector": (lambda: nn.Linear(8, 6), (8,)),
    "of a sequence": (lambda: nn.Linear(8, 6, bias=False), (2, 5, 8)),
    "of a grid": (lambda: nn.Linear(8, 6), (2, 5, 4, 8)),
    "3 x 3": (lambda: nn.Conv2d(8, 6, 3, padding=1), (2, 8, 5, 7)),
    "strided": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), (2, 8, 5, 7)),
    "oblong": (lambda: nn.Conv2d(8, 6, (3, 1), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (2, 8, 9, 7)),
    "padded otherwise": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect", bias=False), (2, 8, 5, 7)),
    "1 x 1": (lambda: nn.Conv2d(8, 6, 1), (2, 8, 5, 7)),
}
EVERY_LAYER = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


@EVERY_LAYER
def test_the_equation(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """A layer with an adapter is the layer whose weight is W + scale (alpha / r) B A, and so are its gradients."""
    layer, by_hand = nn.Sequential(make()).double(), nn.Sequential(make()).double()
    by_hand.load_state_dict(layer.state_dict())
    inject_lora(layer, ["0"], rank=2, alpha=7)
    learn(layer)
    set_lora_scale(layer, "default", 0.25)
    w = lora_weights(layer)["0"]
    assert (w.down.dtype, w.shape) == (torch.float32, by_hand[0].weight.shape)
    down, up = w.down.double().requires_grad_(), w.up.double().requires_grad_()
    change = 0.25 * (7 / 2) * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view(w.shape)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    expected = torch.func.functional_call(by_hand, {"0.weight": by_hand[0].weight.detach() + change}, (x,))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    towards = torch.randn(out.shape, dtype=torch.float64)
    adapter = layer[0].adapter("default")
    ours = torch.autograd.grad((out * towards).sum(), [x, adapter.lora_down, adapter.lora_up])
    theirs = torch.autograd.grad((expected * towards).sum(), [x, down, up])
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-12)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):  # rounded to float32 once, when they arrive
        assert torch.equal(mine, other.float()) or (mine - other).abs().max() < 1e-6 * other.abs().max()


@EVERY_LAYER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_to_the_activations_not_the_reverse(
    make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = nn.Sequential(make()).to(dtype)
    inject_lora(layer, ["0"], rank=2, alpha=2)
    learn(layer)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = layer(torch.randn(shape).to(dtype).requires_grad_())
    assert out.dtype == dtype
    assert {tensor.dtype for tensor in kept} == {dtype}
    out.float().sum().backward()
    assert {(parameter.dtype, parameter.grad.dtype) for _, parameter in lora_parameters(layer)} == {
        (torch.float32, torch.float32)
    }


def test_float64_is_computed_in_float64() -> None:
    layer = nn.Sequential(nn.Linear(8, 6)).double()
    inject_lora(layer, ["0"], rank=2, alpha=2)
    learn(layer)
    x = torch.randn(3, 8, dtype=torch.float64)
    before = layer(x)
    merge_lora(layer)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-14)


def test_an_input_of_another_memory_layout() -> None:
    unet = tiny_unet(**SD2_LIKE)
    image = torch.randn(2, 32, 64)
    proj = unet.down_blocks[0].attentions[0].proj_in
    tokens = image.transpose(1, 2)
    before = proj(tokens)
    add_lora(unet, random_weights(unet, 1, rank=3, alpha=5.0), name="one")
    layer = unet.down_blocks[0].attentions[0].proj_in
    torch.testing.assert_close(layer(tokens), layer(tokens.contiguous()), rtol=0, atol=1e-6)
    assert not torch.allclose(layer(tokens), before, atol=0.1)


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 6), lambda: nn.Conv2d(8, 6, 3, padding=1)])
def test_an_adapter_costs_a_graphics_card_few_kernels(make: Callable[[], nn.Module]) -> None:
    """Product, factor and sum of a linear layer are one operation, and no activation is copied."""
    layer = nn.Sequential(make())
    x = torch.randn(3, 8) if isinstance(layer[0], nn.Linear) else torch.randn(1, 8, 5, 5)
    inject_lora(layer, ["0"], rank=2, alpha=4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    kernels = ("aten::addmm", "aten::addmm_", "aten::mm", "aten::convolution", "aten::add", "aten::add_", "aten::mul")
    expected = {"aten::addmm": 1, "aten::addmm_": 1, "aten::mm": 1}
    if isinstance(layer[0], nn.Conv2d):
        expected = {"aten::convolution": 3, "aten::add_": 1}
    assert {key: counts[key] for key in kernels if key in counts} == expected


def test_a_compiler_sees_one_graph() -> None:
    unet = tiny_unet()
    add_lora(unet, random_weights(unet, 1, rank=3, alpha=5.0), name="one", lora_scale=-0.7)
    add_lora(unet, random_weights(unet, 2, rank=2, alpha=1.0), name="two")
    compiled = torch.compile(unet, backend="eager", fullgraph=True)  # raises where it would break in two
    torch.testing.assert_close(run(compiled), run(unet), rtol=0, atol=1e-5)
    torch._dynamo.reset()


def test_the_bases_parameters_stay_the_same_objects_under_the_same_names() -> None:
    unet = tiny_unet()
    before = dict(unet.named_parameters())
    shapes = {key: value.shape for key, value in unet.state_dict().items()}
    inject_lora(unet, TARGETS["all"], rank=4, alpha=8)
    after = dict(unet.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name for name in after if name not in before} == {name for name, _ in lora_parameters(unet)}
    assert all(".lora_" in name for name, _ in lora_parameters(unet))
    assert {key: value.shape for key, value in unet.state_dict().items() if ".lora_" not in key} == shapes
    remove_lora(unet, "default")
    assert {name: id(parameter) for name, parameter in unet.named_parameters()} == {n: id(p) for n, p in before.items()}
    assert not any(isinstance(module, LoRALayer) for module in unet.modules())


def test_only_adapters_get_gradients_and_down_gets_none_at_first() -> None:
    unet = tiny_unet().requires_grad_(True)
    inject_lora(unet, TARGETS["all"], rank=4, alpha=8)
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
    assert names == [f"{p}.adapters.default.lora_{part}" for p in paths for part in ("down", "up")]
    assert paths == [path for path in adaptable_layers(unet) if path in paths]


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


def test_baked_in_weights_stay_and_the_layers_are_plain_again() -> None:
    unet = tiny_unet()
    keys = list(unet.state_dict())
    add_lora(unet, random_weights(unet, 1, rank=3, alpha=5.0), name="one", lora_scale=-0.7)
    with pytest.raises(ValueError, match="no merged LoRA to bake in"):
        bake_lora(unet)
    merge_lora(unet)
    merged = {key: tensor.clone() for key, tensor in unet.state_dict().items() if key in keys}
    bake_lora(unet)
    assert list(unet.state_dict()) == keys
    assert all(torch.equal(tensor, merged[key]) for key, tensor in unet.state_dict().items())
    assert not lora_parameters(unet)


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
    for path, layer in adaptable_layers(by_hand).items():
        for weights, scale in ((one, 0.5), (two, -2.0)):
            if path in weights:
                w = weights[path]
                layer.weight.data += scale * w.alpha / w.rank * w.product(torch.float64)
    add_lora(unet, one, name="one", lora_scale=0.5)
    add_lora(unet, two, name="two")
    set_lora_scale(unet, "two", -2.0)
    torch.testing.assert_close(run(unet.double(), torch.float64), run(by_hand, torch.float64), rtol=0, atol=1e-10)


def test_scale_zero_is_exactly_the_base() -> None:
    unet = tiny_unet()
    before = run(unet)
    add_lora(unet, random_weights(unet, 1, rank=3, alpha=5.0), name="one", lora_scale=0)
    assert torch.equal(run(unet), before)
    assert not any(layer.active for layer in unet.modules() if isinstance(layer, LoRALayer))  # nor does it cost time
    base = {path: layer.weight.clone() for path, layer in adaptable_layers(unet).items()}
    merge_lora(unet)
    assert all(torch.equal(layer.weight, base[path]) for path, layer in adaptable_layers(unet).items())


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
        with pytest.raises(ValueError, match="matches no linear layer or convolution"):
            inject_lora(unet, [part_of_a_word], rank=2, alpha=2, name="e")


SD1: dict[str, Any] = {"cross_attention_dim": 768}
SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}


@pytest.mark.parametrize(
    ("fields", "targets", "layers", "parameters"),
    [
        (SD1, "attn", 128, 3_188_736),
        (SD1, "attn+ff", 160, 5_984_256),
        (SD1, "all", 278, 16_813_056),
        (SD2, "attn", 128, 3_319_808),
        (SD2, "all", 278, 16_944_128),
    ],
)
def test_counts_at_full_size(fields: dict[str, Any], targets: str, layers: int, parameters: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig(**fields))
    assert len(inject_lora(unet, TARGETS[targets], rank=16, alpha=16)) == layers
    assert sum(parameter.numel() for _, parameter in lora_parameters(unet)) == parameters
    assert all(parameter.is_meta for parameter in unet.parameters())
    assert unet(
        torch.empty(1, 4, 8, 8, device="meta"),
        torch.zeros(1, device="meta"),
        torch.empty(1, 7, fields["cross_attention_dim"], device="meta"),
    ).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("targets", TARGETS)
def test_no_preset_allows_a_smaller_rank_than_another(targets: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig(**SD1))
    with pytest.raises(ValueError, match="rank must be from 1 to 320, "):
        inject_lora(unet, TARGETS[targets], rank=321, alpha=1)


def test_all_is_every_linear_layer_and_convolution_inside_the_blocks() -> None:
    unet = tiny_unet()
    outside = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    every = {path for path, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert set(inject_lora(unet, TARGETS["all"], rank=2, alpha=2)) == every - outside


def test_a_preset_takes_what_a_model_has_and_a_target_by_name_must_be_there() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"to_q": nn.Linear(8, 6), "conv1": nn.Conv2d(3, 6, 3)})

    assert inject_lora(model(), TARGETS["all"], rank=2, alpha=2) == ["to_q", "conv1"]
    assert inject_lora(model(), TARGETS["attn"], rank=2, alpha=2) == ["to_q"]
    with pytest.raises(ValueError, match=r"'conv_shortcut' matches no .*; layers of this model are: conv1, to_q"):
        inject_lora(model(), ["to_q", "conv_shortcut"], rank=2, alpha=2)
    with pytest.raises(ValueError, match="'to_q' matches no"):
        inject_lora(nn.Sequential(nn.Linear(8, 6)), TARGETS["all"], rank=2, alpha=2)


def test_a_convolution_in_groups_gets_no_adapter() -> None:
    with pytest.raises(ValueError, match="'0' matches no"):
        inject_lora(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), ["0"], rank=2, alpha=2)


@EVERY_LAYER
def test_a_layer_is_itself_again_when_its_adapter_is_gone(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    layer = nn.Sequential(make()).eval()
    kind, text, x = type(layer[0]), repr(layer), torch.randn(shape)
    before = layer(x)
    inject_lora(layer, ["0"], rank=2, alpha=2)
    learn(layer)
    assert layer(x).shape == before.shape
    assert not torch.equal(layer(x), before)
    remove_lora(layer, "default")
    assert type(layer[0]) is kind
    assert not layer[0].training
    assert repr(layer) == text
    assert torch.equal(layer(x), before)


def test_initial_weights_depend_on_seed_and_path_only() -> None:
    def downs(targets: list[str], seed: int, rank: int = 4) -> dict[str, Tensor]:
        unet = tiny_unet()
        torch.manual_seed(torch.seed() % 1000)  # the global generator has no say
        inject_lora(unet, targets, rank=rank, alpha=1, seed=seed)
        return {path: w.down for path, w in lora_weights(unet).items()}

    all_at_once, few = downs(["to_q", "to_k", "to_v", "conv2"], 5), downs(["to_v"], 5)
    assert all(torch.equal(all_at_once[path], down) for path, down in few.items())
    assert not any(torch.equal(down, downs(["to_v"], 6)[path]) for path, down in few.items())
    assert len({down.flatten()[0].item() for down in all_at_once.values()}) == len(all_at_once)
    assert all(torch.equal(down[:2], downs(["to_v"], 5, rank=2)[path]) for path, down in few.items())
    for down in all_at_once.values():
        assert down.abs().max() <= 1 / math.sqrt(down[0].numel())
        assert down.std() == pytest.approx(1 / math.sqrt(3 * down[0].numel()), rel=0.25)


@EVERY_LAYER
def test_dropout_is_for_training_only(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    layer = nn.Sequential(make())
    inject_lora(layer, ["0"], rank=2, alpha=2, dropout=0.5)
    learn(layer)
    x = torch.randn(shape)
    layer.train()
    assert len({layer(x).sum().item() for _ in range(8)}) > 1
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
        ({"targets": ["to_q", "to_z"]}, "'to_z' matches no linear layer or convolution; .*to_q"),
        ({"rank": 0}, "rank must be from 1 to 32.*to_q; got 0"),
        ({"rank": 33}, "rank must be from 1 to 32.*to_q; got 33"),
        ({"rank": 37, "targets": ["conv_in"]}, "rank must be from 1 to 32, the smaller side of conv_in; got 37"),
        ({"rank": 5, "targets": ["conv_out"]}, "rank must be from 1 to 4, the smaller side of conv_out; got 5"),
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
        (lambda: bake_lora(tiny_unet()), "no merged LoRA to bake in"),
        (lambda: unmerge_lora(tiny_unet()), "none is merged"),
        (lambda: lora_weights(merged_layer(), "other"), "no LoRA is called 'other'; the model has: default"),
        (lambda: lora_weights(tiny_unet()), "the model has: none"),
        (lambda: set_lora_scale(tiny_unet(), "default", math.inf), "finite"),
        (lambda: add_lora(nn.Sequential(nn.Linear(8, 6)), {"0": GOOD}, name="a", lora_scale=math.nan), "finite"),
        (lambda: add_lora(nn.Sequential(nn.Linear(8, 6)), {"1": GOOD}, name="a"), "no linear layer or convolution '1'"),
        (lambda: add_lora(nn.Sequential(nn.Linear(6, 8)), {"0": GOOD}, name="a"), r"\[8, 6\], got \[6, 8\]"),
        (lambda: add_lora(nn.Sequential(nn.Linear(8, 6)), {}, name="a"), "no weights"),
        (lambda: LoRAWeights(torch.zeros(2, 8), torch.zeros(6, 3), 1.0), r"got \[2, 8\] and \[6, 3\]"),
        (lambda: LoRAWeights(torch.zeros(0, 8), torch.zeros(6, 0), 1.0), r"got \[0, 8\]"),
        (lambda: add_lora(nn.Sequential(nn.Conv2d(8, 6, 1)), {"0": GOOD}, name="a"), r"\[6, 8, 1, 1\], got \[6, 8\]"),
        (lambda: LoRAWeights(torch.zeros(2, 8, 1, 1), torch.zeros(6, 2), 1.0), r"got \[2, 8, 1, 1\] and \[6, 2\]"),
        (lambda: LoRAWeights(torch.zeros(2, 8, 3, 3), torch.zeros(6, 2, 3, 3), 1.0), r"and \[6, 2, 3, 3\]"),
        (lambda: LoRAWeights(torch.zeros(2, 8, 3), torch.zeros(6, 2, 1), 1.0), r"and \[6, 2, 1\]"),
        (lambda: LoRAWeights(torch.zeros(2), torch.zeros(6), 1.0), r"got \[2\] and \[6\]"),
        (lambda: LoRAWeights(torch.tensor(1.0), torch.tensor(1.0), 1.0), r"got \[\] and \[\]"),
    ],
)
def test_refusals(act: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()
