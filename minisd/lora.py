"""Low-rank adapters in a model: put in, list, scale, merge, take out. lora_layers.py has the layers themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from minisd.lora_layers import LoRAAdapter as LoRAAdapter
from minisd.lora_layers import LoRAConv2d as LoRAConv2d
from minisd.lora_layers import LoRALayer as LoRALayer
from minisd.lora_layers import LoRALinear as LoRALinear
from minisd.lora_layers import LoRAWeights as LoRAWeights
from minisd.lora_targets import TARGETS as TARGETS
from minisd.lora_targets import adaptable_layers as adaptable_layers
from minisd.lora_targets import chosen_layers, initial_weights


def inject_lora(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    name: str = "default",
    seed: int = 0,
) -> list[str]:
    """Put a new adapter beside each layer whose path ends in a target, and freeze everything but adapters.

    The first weights of an adapter depend on the seed, the layer's path and the sizes only, not on other layers.

    Args:
        model: changed in place.
        targets: of linear layers and convolutions, as in `chosen_layers`; TARGETS has presets.
        rank: r, from 1 to the smaller side of the smallest layer.
        alpha: the change is multiplied by alpha / rank.
        dropout: probability in [0, 1) that an input of the adapter is zeroed, in training mode only.
        name: of the adapter, one of several.
        seed: of lora_down; lora_up is zero.

    Returns:
        The paths of the layers, in the model's order.

    Raises:
        ValueError: a target matches nothing, or a number is out of its range. The model is then unchanged.
    """
    chosen = chosen_layers(model, targets)
    weights = {path: initial_weights(layer, path, rank, alpha, seed) for path, layer in chosen.items()}
    return add_lora(model, weights, name=name, dropout=dropout)


def add_lora(
    model: nn.Module,
    weights: Mapping[str, LoRAWeights],
    *,
    name: str,
    lora_scale: float = 1.0,
    dropout: float = 0.0,
) -> list[str]:
    """Put an adapter with given weights beside each layer named, and freeze everything but adapters.

    Args:
        model: changed in place.
        weights: path of a layer -> its adapter, copied as float32 to the layer's device; ranks may differ.
        name: of the adapter, one of several.
        lora_scale: its strength; may be negative.
        dropout: probability in [0, 1) that an input of the adapter is zeroed, in training mode only.

    Returns:
        The paths of the layers, in the model's order.

    Raises:
        ValueError: a path, shape, number or name cannot be used. The model is then unchanged.
    """
    layers = adaptable_layers(model)
    _check_addition(layers, weights, name)
    _check_scale(lora_scale)
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRA dropout must be in [0, 1), got {dropout}")
    paths = [path for path in layers if path in weights]
    for path in paths:
        layer = layers[path]
        adapter = LoRAAdapter(weights[path], dropout).to(layer.weight.device).train(layer.training)
        adapter.lora_scale = lora_scale
        if not isinstance(layer, LoRALayer):
            layer = LoRAConv2d(layer) if isinstance(layer, nn.Conv2d) else LoRALinear(layer)
            _replace(model, path, layer)
        layer.adapters[name] = adapter
    for parameter in set(model.parameters()).difference(parameter for _, parameter in lora_parameters(model)):
        parameter.requires_grad_(False)
    return paths


def remove_lora(model: nn.Module, name: str) -> None:
    """Take an adapter out again; a layer without any other becomes the plain layer it was.

    Raises:
        ValueError: there is no adapter of that name, or the adapters are merged.
    """
    for path, layer in _with_adapter(model, name, merged=False).items():
        del layer.adapters[name]
        if not layer.adapters:
            _replace(model, path, layer.plain())


def lora_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All adapter weights with their names, in the model's order: a list, which can be gone through twice."""
    return [
        (f"{path}.{key}", parameter)
        for path, module in model.named_modules()
        if isinstance(module, LoRAAdapter)
        for key, parameter in module.named_parameters()
    ]


def lora_weights(model: nn.Module, name: str = "default") -> dict[str, LoRAWeights]:
    """One adapter's weights by path. The tensors share memory with the model: they change when it learns.

    Raises:
        ValueError: there is no adapter of that name.
    """
    return {path: layer.adapter(name).weights for path, layer in _with_adapter(model, name).items()}


def copy_lora_weights(weights: Mapping[str, LoRAWeights], model: nn.Module) -> None:
    """Copy weights of the same layers and shapes into the adapter "default", in place, to be trained further.

    Raises:
        ValueError: one is a DoRA, of which only sampling and merging are supported. Nothing is copied then.
    """
    dora = next((path for path, lora in weights.items() if lora.magnitude is not None), None)
    if dora is not None:
        raise ValueError(f"{dora} has a magnitude: it is a DoRA, which can be used and merged but not trained")
    current = lora_weights(model)
    with torch.no_grad():
        for path, lora in weights.items():
            current[path].down.copy_(lora.down)
            current[path].up.copy_(lora.up)


def set_lora_scale(model: nn.Module, name: str, lora_scale: float) -> None:
    """Set the strength of one adapter everywhere; 0 is exactly the model without it.

    Raises:
        ValueError: there is no adapter of that name, the number is not finite, or the adapters are merged.
    """
    _check_scale(lora_scale)
    for layer in _with_adapter(model, name, merged=False).values():
        layer.adapter(name).lora_scale = lora_scale


def merge_lora(model: nn.Module) -> None:
    """Add all adapters, at their strengths, to the weights beside them: the base's speed, and its rounding.

    Raises:
        ValueError: there is no adapter, or they are merged already.
    """
    layers = _lora_layers(model).values()
    if not layers:
        raise ValueError("no LoRA to merge: the model has none")
    if any(layer.merged for layer in layers):
        raise ValueError("the LoRA is merged already")
    for layer in layers:
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Put back the weights as they were before merge_lora, bit for bit.

    Raises:
        ValueError: nothing is merged.
    """
    layers = [layer for layer in _lora_layers(model).values() if layer.merged]
    if not layers:
        raise ValueError("no LoRA to unmerge: none is merged")
    for layer in layers:
        layer.unmerge()


def bake_lora(model: nn.Module) -> None:
    """Make merged weights the model's own: plain layers again, and no way back.

    Raises:
        ValueError: there is no adapter, or they are not merged.
    """
    layers = _lora_layers(model)
    if not layers or not all(layer.merged for layer in layers.values()):
        raise ValueError("no merged LoRA to bake in; call merge_lora first")
    for path, layer in layers.items():
        _replace(model, path, layer.plain())


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in another's place; setattr on the parent works in lists and sequences, too."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear | LoRAConv2d]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear | LoRAConv2d)}


def _with_adapter(model: nn.Module, name: str, *, merged: bool = True) -> dict[str, LoRALinear | LoRAConv2d]:
    """The layers that have this adapter. Raises ValueError if there are none, or are merged and must not be."""
    layers = _lora_layers(model)
    found = {path: layer for path, layer in layers.items() if name in layer.adapters}
    if not found:
        names = sorted({key for layer in layers.values() for key in layer.adapters})
        raise ValueError(f"no LoRA is called {name!r}; the model has: {', '.join(names) or 'none'}")
    if not merged and any(layer.merged for layer in found.values()):
        raise ValueError("the LoRA is merged into the weights; call unmerge_lora first")
    return found


def _check_scale(lora_scale: float) -> None:
    if not math.isfinite(lora_scale):
        raise ValueError(f"lora_scale must be a finite number, got {lora_scale}")


def _check_addition(layers: Mapping[str, nn.Linear | nn.Conv2d], weights: Mapping[str, LoRAWeights], name: str) -> None:
    """Raise ValueError if these weights do not fit these layers under this name."""
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"a LoRA cannot be called {name!r}; choose a word without a dot")
    if not weights:
        raise ValueError(f"LoRA {name!r} has no weights")
    for layer in layers.values():
        if isinstance(layer, LoRALayer) and name in layer.adapters:
            raise ValueError(f"the model already has a LoRA called {name!r}")
        if isinstance(layer, LoRALayer) and layer.merged:
            raise ValueError("a LoRA is merged into the weights; call unmerge_lora first")
    for path, lora in weights.items():
        if path not in layers:
            raise ValueError(f"LoRA {name!r}: the model has no linear layer or convolution {path!r}")
        if lora.shape != (expected := tuple(layers[path].weight.shape)):
            raise ValueError(f"LoRA {name!r}: {path} has a weight of {list(expected)}, got {list(lora.shape)}")
