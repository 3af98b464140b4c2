"""CLIP's text network and tokenizer out of a model folder, read strictly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minisd.errors import WeightsError
from minisd.model_files import read_json

# The numbers of text_encoder/config.json that shape the network, and what bounds them: a billion layers, say, would be
# built for ever before any weight is missed.
_SIZES = {
    "vocab_size": 1_000_000,
    "hidden_size": 16_384,
    "intermediate_size": 65_536,
    "num_hidden_layers": 128,
    "num_attention_heads": 256,
    "max_position_embeddings": 4_096,
}


def clip_on_meta(raw: Mapping[str, Any], *, projection: bool = False) -> nn.Module:
    """Build the CLIP text network that a text_encoder/config.json describes, without weights.

    With `projection` it is the one of XL's text_encoder_2, with a pooled output besides. Only the fields that shape the
    network are taken over: transformers would act on others (download an attention kernel, for one).

    Raises:
        ValueError: the file describes another kind of network, or a field is missing or of the wrong type.
    """
    # Seconds to import, so not before it is needed.
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if raw.get("model_type") != "clip_text_model":
        raise ValueError(f"model_type={raw.get('model_type')!r} is not supported (only 'clip_text_model' is)")
    if raw.get("use_attention_mask"):
        raise ValueError("use_attention_mask=true is not supported")
    sizes = {name: raw.get(name) for name in (*_SIZES, *(["projection_dim"] if projection else []))}
    for name, value in sizes.items():
        most = _SIZES.get(name, _SIZES["hidden_size"])
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name}={value!r} is not a whole number from 1 to {most}")
    if raw["hidden_size"] % raw["num_attention_heads"]:
        raise ValueError(f"hidden_size={raw['hidden_size']} is not a multiple of {raw['num_attention_heads']} heads")
    activation, eps = raw.get("hidden_act", "quick_gelu"), raw.get("layer_norm_eps", 1e-5)
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"hidden_act={activation!r} is not supported (only 'quick_gelu' and 'gelu' are)")
    if type(eps) is not float or not 0 < eps < 1:
        raise ValueError(f"layer_norm_eps={eps!r} is not a small number")
    # The token ids are those of the published files. Only the pooled output of transformers' own depends on them.
    config = CLIPTextConfig(
        **sizes, hidden_act=activation, layer_norm_eps=eps, bos_token_id=0, eos_token_id=2, pad_token_id=1
    )
    with torch.device("meta"):
        network: nn.Module = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    for module in network.modules():
        if isinstance(getattr(module, "position_ids", None), Tensor):  # not in the checkpoint, so nothing would fill it
            module.position_ids = torch.arange(config.max_position_embeddings).unsqueeze(0)
    return network


def clip_keys(network: nn.Module) -> Callable[[str], str | None]:
    """Make the function that gives a checkpoint's key the network's name for it: None for what no text network uses.

    Files on the Hub have the prefix "text_model."; since 5.6 transformers has it in the network with a projection only.
    """
    prefix = "text_model." if hasattr(network, "text_model") else ""

    def rename(key: str) -> str | None:
        if key.endswith("embeddings.position_ids") or key == "logit_scale":  # a constant in older files; the loss's
            return None
        if key.startswith(("vision_model.", "visual_projection.")):
            return None
        return key if key == "text_projection.weight" else prefix + key.removeprefix("text_model.")

    return rename


def load_tokenizer(folder: Path) -> Any:
    """Load the CLIP tokenizer in folder, without any request to the Hub.

    Which token pads is decided by special_tokens_map.json where there is one: "!" in SD 2.x, whatever
    tokenizer_config.json says.

    Raises:
        WeightsError: a file is missing or damaged.
    """
    from transformers import CLIPTokenizer

    # Without these transformers would build a tokenizer of three tokens, silently.
    vocabulary = folder / ("tokenizer.json" if (folder / "tokenizer.json").is_file() else "vocab.json")
    if not read_json(vocabulary):
        raise WeightsError(f"{vocabulary}: empty. Download it again.")
    if vocabulary.name == "vocab.json" and not (folder / "merges.txt").is_file():
        raise WeightsError(f"{folder / 'merges.txt'}: missing. Download the tokenizer again.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a file it cannot parse
        raise WeightsError(
            f"{folder}: the tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})."
        ) from error
    if type(tokenizer.model_max_length) is not int or tokenizer.model_max_length < 3:
        raise WeightsError(f"{folder}: model_max_length={tokenizer.model_max_length!r} is not a number of tokens.")
    return tokenizer
