"""Both halves of CLIP (arXiv:2103.00020), for pictures and for texts: transformers' network, read strictly.

Shape letters: B pictures or texts, H W pixels, T tokens, P width of what the two halves have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from minisd.clip import load_tokenizer
from minisd.errors import WeightsError
from minisd.model_files import read_json
from minisd.strict_load import fill
from minisd.vision_files import TEXT_SIZES, VISION_SIZES, WEIGHTS, WIDEST, checked_section

# What a file leaves out is as transformers has it, which are ViT-B/32's sizes. These two are looked at here.
_TEXT_DEFAULTS = {"hidden_size": 512, "num_attention_heads": 8}
_VISION_DEFAULTS = {"hidden_size": 768, "num_attention_heads": 12}
_BATCH = 16  # pictures at a time


class Clip:
    """A CLIP model, frozen, in float32.

    Args:
        network: transformers' CLIPModel.
        tokenizer: transformers' CLIPTokenizer.
        prepare_pictures: transformers' CLIPImageProcessor.
    """

    def __init__(self, network: Any, tokenizer: Any, prepare_pictures: Any) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.prepare_pictures = prepare_pictures

    @torch.no_grad()
    def embed_pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed RGB pictures of any sizes, their middle square: rows of length 1 [B, P] float32 on the CPU."""
        rows = []
        for start in range(0, len(images), _BATCH):
            batch = list(images[start : start + _BATCH])
            pixel_values = self.prepare_pictures(batch, return_tensors="pt")["pixel_values"]  # [B, 3, H, W]
            state = self.network.vision_model(pixel_values.to(self.network.device)).pooler_output
            rows.append(normalize(self.network.visual_projection(state), dim=1).cpu())  # [B, P]
        return torch.cat(rows)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, what goes beyond CLIP's 77 tokens left out: rows of length 1 [B, P] float32 on the CPU."""
        most = self.network.config.text_config.max_position_embeddings
        asked = {"padding": True, "truncation": True, "max_length": most, "return_tensors": "pt"}
        input_ids = self.tokenizer(list(texts), **asked).input_ids.to(self.network.device)  # [B, T]
        # No attention mask: the state taken is that of a text's end, which does not see what comes behind it.
        state = self.network.text_model(input_ids).pooler_output
        return normalize(self.network.text_projection(state), dim=1).cpu()  # [B, P]


def load_clip(folder: Path, device: torch.device | str = "cpu") -> Clip:
    """Load a CLIP model from a folder that vision_files.resolve_vision_model has found.

    Args:
        folder: with the weights as safetensors; nothing is unpickled.
        device: where it works.

    Raises:
        WeightsError: a file is damaged, or of another kind of model.
    """
    tokenizer = load_tokenizer(folder)
    path = folder / "config.json"
    try:
        network = clip_model_on_meta(read_json(path), end=tokenizer.eos_token_id)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {' '.join(str(error).split())[:300]}. This model cannot be read.") from error
    text, vision = network.config.text_config, network.config.vision_config
    if len(tokenizer) > text.vocab_size:
        sizes = f"the tokenizer has {len(tokenizer)} tokens, config.json {text.vocab_size}"
        raise WeightsError(f"{folder}: {sizes}. They are of different models.")
    prepare_pictures = _load_picture_preparation(folder, vision.image_size)
    complaint = f"{folder}: the weights do not fit config.json"
    fill(network, [folder / WEIGHTS], _rename, torch.float32, device, complaint=complaint)
    return Clip(network, tokenizer, prepare_pictures)


def clip_model_on_meta(raw: Mapping[str, Any], *, end: int) -> Any:
    """Build the CLIP that a config.json describes, without weights.

    Only the fields that shape the network are taken over: transformers would act on others.

    Args:
        raw: the file's content.
        end: the token that ends a text, whose state stands for it. Older files give a wrong one.

    Raises:
        ValueError: the file describes another kind of network, or a field is of the wrong type or too large.
    """
    from transformers import CLIPConfig, CLIPModel  # seconds to import, so not before it is needed

    if raw.get("model_type") != "clip":
        raise ValueError(f"model_type={raw.get('model_type')!r} is not supported (only 'clip' is)")
    width = raw.get("projection_dim", 512)
    if type(width) is not int or not 1 <= width <= WIDEST:
        raise ValueError(f"projection_dim={width!r} is not a whole number from 1 to {WIDEST}")
    text = _section(raw, "text_config", TEXT_SIZES, _TEXT_DEFAULTS)
    text |= {"bos_token_id": 0, "eos_token_id": end, "pad_token_id": 1}
    vision = _section(raw, "vision_config", VISION_SIZES, _VISION_DEFAULTS)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
    with torch.device("meta"):
        network = CLIPModel(config)
    for embeddings in (network.text_model.embeddings, network.vision_model.embeddings):
        # Not in the file, so nothing would fill them.
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings).unsqueeze(0)
    return network


def _section(
    raw: Mapping[str, Any], section: str, sizes: Mapping[str, int], defaults: Mapping[str, int]
) -> dict[str, Any]:
    """The checked fields of one of the two networks."""
    # Older files have each section twice, and transformers lets the second win.
    values = (raw.get(section) or {}) | (raw.get(f"{section}_dict") or {})
    given = {**defaults, **checked_section(section, values, sizes, ["quick_gelu", "gelu"])}
    width, heads = given["hidden_size"], given["num_attention_heads"]
    if width % heads:
        raise ValueError(f"{section}: hidden_size={width} is not a multiple of {heads} heads")
    return given


def _rename(key: str) -> str | None:
    return None if key.endswith("embeddings.position_ids") else key  # a constant in older files


def _load_picture_preparation(folder: Path, side: int) -> Any:
    """Load how pictures are prepared, and see that it is what CLIP expects. Raises WeightsError."""
    from transformers import CLIPImageProcessor

    try:
        prepare = CLIPImageProcessor.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises of many kinds, plain Exception among them
        why = " ".join(str(error).split())[:200]
        raise WeightsError(f"{folder}: the preparation of pictures cannot be loaded ({why}).") from error
    crop = {name: value for name, value in dict(prepare.crop_size or {}).items() if value is not None}
    if crop != {"height": side, "width": side}:
        raise WeightsError(f"{folder}: pictures are made {crop!r}, config.json has {side} x {side}. Correct one.")
    fixed = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255,
             "do_normalize": True}  # fmt: skip
    for name, only in fixed.items():
        if getattr(prepare, name) != only:
            raise WeightsError(f"{folder}: {name}={getattr(prepare, name)!r} is not supported (only {only!r} is).")
    return prepare
