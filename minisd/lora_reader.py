"""LoRA files read in all common layouts (lora_dialects.py) and placed in the networks they are for.

Reading is strict: a file is applied whole or refused, because a LoRA of which a part is left out makes another picture.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from minisd.errors import WeightsError, one_line
from minisd.ldm_modules import layout_of, ldm_module_name
from minisd.lora import add_lora
from minisd.lora_dialects import flat_name, target_names
from minisd.lora_info import FAMILIES, LoRAInfo, from_header
from minisd.lora_layers import LoRAWeights
from minisd.lora_positional import numbered_layers
from minisd.lora_raw import RawLoRA, read_raw, some
from minisd.lora_targets import adaptable_layers

log = logging.getLogger(__name__)

Layers = Mapping[str, Mapping[str, nn.Linear | nn.Conv2d]]  # part -> path -> layer


@dataclass(frozen=True)
class LoRA:
    """A LoRA file's contents, placed in the networks it was read for.

    Attributes:
        parts: "unet", "text_encoder", "text_encoder_2" -> path of a layer -> its adapter; only parts that have any.
        embeddings: token ("<s1>") -> its vectors [n, E] of textual inversion; usually empty.
        info: what the header says.
    """

    parts: dict[str, dict[str, LoRAWeights]]
    embeddings: dict[str, Tensor]
    info: LoRAInfo


def load_lora(path: Path, networks: Mapping[str, nn.Module], *, allow_partial: bool = False) -> LoRA:
    """Read a LoRA file for the networks of a model, which are not changed: `add_lora_to` does that.

    Args:
        path: a safetensors file in any dialect of lora_dialects.py, or the folder of a PEFT adapter.
        networks: "unet", "text_encoder", "text_encoder_2" -> the network, with or without adapters; they say what the
            file's names mean.
        allow_partial: log what has no place in the networks and leave it out, instead of refusing the file.

    Returns:
        The adapters, on the CPU in the file's dtype; and what the header says.

    Raises:
        WeightsError: the file is damaged, is of a kind that is not supported, or is not for this model.
    """
    raw = read_raw(path)
    layers: Layers = {part: adaptable_layers(network) for part, network in networks.items()}
    parts, left_out = _placed(raw, networks, layers)
    embeddings = _fitting_embeddings(raw, networks["text_encoder"]) if "text_encoder" in networks else {}
    left_out["embeddings of tokens, without a text encoder"] = sorted(raw.embeddings.keys() - embeddings.keys())
    left_out["keys of no known meaning"] = raw.unknown
    reasons = "; ".join(f"{reason}: {some(names)}" for reason, names in left_out.items() if names)
    if not parts:
        raise WeightsError(f"{raw.path}: nothing of it fits this model: {reasons}. {_families(raw, layers)}")
    if reasons and not allow_partial:
        rest = "To use the rest all the same, give --allow-partial."
        raise WeightsError(f"{raw.path}: not all of it can be used: {reasons}. {_families(raw, layers)} {rest}")
    if reasons:
        log.warning("%s: left out, as allowed: %s", raw.path, one_line(reasons))
    weights = [lora for part in parts.values() for lora in part.values()]
    if not embeddings and not any(lora.magnitude is not None or lora.up.count_nonzero() for lora in weights):
        log.warning("%s has no effect: all of its lora_up weights are zero", raw.path)
    return LoRA(parts, embeddings, info_of(raw, parts))


def read_lora_info(path: Path) -> LoRAInfo:
    """Read what a LoRA file says about itself, before there is a model. Raises WeightsError."""
    return info_of(read_raw(path))


def add_lora_to(networks: Mapping[str, nn.Module], lora: LoRA, *, name: str, lora_scale: float = 1.0) -> None:
    """Put a LoRA's adapters into all of its networks, as `lora.add_lora` does for one. Raises ValueError as there."""
    for part, weights in lora.parts.items():
        add_lora(networks[part], weights, name=name, lora_scale=lora_scale)


def info_of(raw: RawLoRA, parts: Mapping[str, Collection[str]] | None = None) -> LoRAInfo:
    """What the header says, with the rank and alpha that most modules have.

    Args:
        raw: the file.
        parts: part -> paths of the layers it adapts, if they are known; else the file's own names count.

    Raises:
        WeightsError: the header is damaged.
    """
    sizes = Counter((lora.rank, lora.alpha) for lora in raw.modules.values())
    rank, alpha = sizes.most_common(1)[0][0]
    if parts is None:
        parts = {part: [module.ending for module in raw.modules if module.part == part] for part, _ in raw.modules}
    try:
        targets = target_names(parts.get("unet") or next(iter(parts.values())))
        return from_header(raw.metadata, rank=rank, alpha=alpha, targets=targets)
    except WeightsError as error:
        raise WeightsError(f"{raw.path}: {error}") from error


def family_name(guess: str | int | None) -> str:
    """A RawLoRA's guess in words."""
    if isinstance(guess, int):
        return FAMILIES.get(guess, "of no known family") + f" (prompts {guess} wide)"
    return "of no known family" if guess is None else guess[:50]


def _placed(
    raw: RawLoRA, networks: Mapping[str, nn.Module], layers: Layers
) -> tuple[dict[str, dict[str, LoRAWeights]], dict[str, list[str]]]:
    """Find the layers by the file's names.

    Returns:
        Part -> path of a layer -> adapter, in the networks' order; and the modules without a place, by the reason.

    Raises:
        WeightsError: a module is of another size than its layer, or there twice, or its number is of another model.
    """
    _check_numbers(raw, layers)
    tables = {part: _paths_by_name(part, network, layers[part]) for part, network in networks.items()}
    others = {
        part: {flat_name(part, name) for name, _ in network.named_modules()} for part, network in networks.items()
    }
    found: dict[str, dict[str, LoRAWeights]] = {part: {} for part in networks}
    absent: list[str] = []
    elsewhere: list[str] = []
    misfits: list[str] = []
    for module, lora in raw.modules.items():
        flat = flat_name(module.part, module.name)
        path = tables.get(module.part, {}).get(flat)
        if path is None:
            (elsewhere if flat in others.get(module.part, ()) else absent).append(module.label)
            continue
        expected = tuple(layers[module.part][path].weight.shape)
        lora = _with_dims(lora, len(expected))
        if lora.shape != expected:
            misfits.append(f"{module.label}: expected {list(expected)}, got {list(lora.shape)}")
        if path in found[module.part]:
            raise WeightsError(f"{raw.path}: {path} is there twice, under two names. Get the file again.")
        found[module.part][path] = lora
    if misfits:
        raise WeightsError(f"{raw.path}: modules of another size: {some(misfits)}. {_families(raw, layers)}")
    parts = {part: {path: found[part][path] for path in layers[part] if path in found[part]} for part in networks}
    reasons = {"modules not in this model": absent, "layers other than linear layers and convolutions": elsewhere}
    return {part: weights for part, weights in parts.items() if weights}, reasons


def _fitting_embeddings(raw: RawLoRA, text_encoder: nn.Module) -> dict[str, Tensor]:
    """The file's embeddings. Raises WeightsError if one is not as wide as the text encoder's own."""
    width = next(module.embedding_dim for module in text_encoder.modules() if isinstance(module, nn.Embedding))
    for token, vectors in raw.embeddings.items():
        if vectors.shape[1] != width:
            wide = f"the embedding of {token[:100]!r} is {vectors.shape[1]} wide, the text encoder's are {width}"
            raise WeightsError(f"{raw.path}: {wide}. Choose with --model what the LoRA was made for.")
    return raw.embeddings


def _paths_by_name(part: str, network: nn.Module, paths: Collection[str]) -> dict[str, str]:
    """Every flat name that a dialect has for a layer -> the layer's path."""
    table = {flat_name(part, path): path for path in paths}
    assert len(table) == len(paths), "two layers share a flat name"
    if part == "unet":
        layout = layout_of(name for name, _ in network.named_modules())
        table |= {flat_name(part, ldm_module_name(path, layout)): path for path in paths}
    if part in ("unet", "text_encoder"):
        table |= {str(number): path for number, path in enumerate(numbered_layers(part, paths))}
    return table


def _check_numbers(raw: RawLoRA, layers: Layers) -> None:
    """Refuse numbered modules unless they are as many as the model has: else the numbers mean other layers."""
    for part, paths in layers.items():
        numbers = sum(module.numbered for module in raw.modules if module.part == part)
        places = len(numbered_layers(part, paths)) if numbers else 0
        if numbers != places:
            counts = f"{numbers} numbered modules for the {part}, which has {places} layers to number"
            raise WeightsError(f"{raw.path}: {counts}. {_families(raw, layers)}")


def _with_dims(lora: LoRAWeights, dims: int) -> LoRAWeights:
    """A matrix as a 1 x 1 convolution or the reverse: files of SD 1.x have either for its proj_in and proj_out."""
    if dims == 4 and lora.down.dim() == 2:
        return replace(lora, down=lora.down[:, :, None, None], up=lora.up[:, :, None, None])
    if dims == 2 and lora.down.shape[2:] == (1, 1):
        return replace(lora, down=lora.down.flatten(1), up=lora.up.flatten(1))
    return lora


def _families(raw: RawLoRA, layers: Layers) -> str:
    """What the file is for, what the model is, and what to do about it."""
    unet = layers.get("unet", {})
    width = next((layer.weight.shape[1] for path, layer in unet.items() if path.endswith("attn2.to_k")), None)
    model = "" if width is None else f", the model is {family_name(width)}"
    return f"The file is for {family_name(raw.guess)}{model}. Choose with --model what the LoRA was made for."
