"""Prompts to `encoder_hidden_states`, through CLIP's text encoder (arXiv:2103.00020), which transformers provides.

Shape letters: B batch, S tokens of a prompt (77 in the published models), E width (768 in SD 1.x, 1024 in SD 2.x).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class TextEncoder:
    """CLIP's tokenizer and text network, frozen. What the UNet was trained on: every position, padding included.

    Args:
        network: transformers' CLIPTextModel.
        tokenizer: transformers' CLIPTokenizer.
    """

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        self.network = network
        self.tokenizer = tokenizer
        config: Any = network.config
        self.width: int = config.hidden_size
        self.vocabulary_size: int = config.vocab_size
        self.max_tokens: int = min(tokenizer.model_max_length, config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Encode captions [B] to [B, S, E], the last layer after its LayerNorm, in the network's dtype.

        A caption is cut to S tokens, start and end marks included, or padded to S.
        """
        assert not isinstance(captions, str), "pass a list of captions"
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        # No attention mask: Stable Diffusion was trained with padding attended to like any other token.
        return self.network(tokens.input_ids.to(self.device)).last_hidden_state

    def token_count(self, caption: str) -> int:
        """Tokens in a caption, without the start and end marks."""
        return len(self.tokenizer(caption, add_special_tokens=False, verbose=False).input_ids)

    def is_truncated(self, caption: str) -> bool:
        """Whether the end of the caption is cut off, for being longer than S - 2 tokens (75)."""
        return self.token_count(caption) > self.max_tokens - 2

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEncoder:
        """Move the network, in place like nn.Module.to; None leaves that property alone."""
        self.network.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the network is and the embeddings come out."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network and of the embeddings."""
        return next(self.network.parameters()).dtype


def clip_on_meta(raw: Mapping[str, Any]) -> nn.Module:
    """Build the CLIP text network that a text_encoder/config.json describes, without weights.

    Only the fields that shape the network are taken over: transformers would act on others (download an attention
    kernel, for one).

    Raises:
        ValueError: the file describes another kind of network, or a field is missing or of the wrong type.
    """
    from transformers import CLIPTextConfig, CLIPTextModel  # seconds to import, so not before it is needed

    if raw.get("model_type") != "clip_text_model":
        raise ValueError(f"model_type={raw.get('model_type')!r} is not supported (only 'clip_text_model' is)")
    if raw.get("use_attention_mask"):
        raise ValueError("use_attention_mask=true is not supported")
    sizes = {name: raw.get(name) for name in _SIZES}
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= _SIZES[name]:
            raise ValueError(f"{name}={value!r} is not a whole number from 1 to {_SIZES[name]}")
    if raw["hidden_size"] % raw["num_attention_heads"]:
        raise ValueError(f"hidden_size={raw['hidden_size']} is not a multiple of {raw['num_attention_heads']} heads")
    activation, eps = raw.get("hidden_act", "quick_gelu"), raw.get("layer_norm_eps", 1e-5)
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"hidden_act={activation!r} is not supported (only 'quick_gelu' and 'gelu' are)")
    if type(eps) is not float or not 0 < eps < 1:
        raise ValueError(f"layer_norm_eps={eps!r} is not a small number")
    # The token ids are those of the published files. Only the pooled output, unused here, depends on them.
    config = CLIPTextConfig(
        **sizes, hidden_act=activation, layer_norm_eps=eps, bos_token_id=0, eos_token_id=2, pad_token_id=1
    )
    with torch.device("meta"):
        network: nn.Module = CLIPTextModel(config)
    for module in network.modules():
        if isinstance(getattr(module, "position_ids", None), Tensor):  # not in the checkpoint, so nothing would fill it
            module.position_ids = torch.arange(config.max_position_embeddings).unsqueeze(0)
    return network


def clip_key(key: str) -> str | None:
    """Give a checkpoint's key the name that the network has for it, or None for what no text network uses.

    Files on the Hub have the prefix "text_model."; transformers has dropped it from its network, and writes none, since
    5.6.
    """
    if key.endswith("embeddings.position_ids") or key == "logit_scale":  # a constant in older files; the loss's
        return None
    if key.startswith(("vision_model.", "visual_projection.")):
        return None
    return key.removeprefix("text_model.")


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
