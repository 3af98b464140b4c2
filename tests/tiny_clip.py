"""A tiny random CLIP in the layout of the published ones, written by transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from tests.tiny import text_config, write_tokenizer

SIDE = 32


def write_tiny_clip(folder: Path, *, activation: str = "quick_gelu", seed: int = 0) -> CLIPModel:
    """Write a model that CLIPModel.from_pretrained and CLIPProcessor.from_pretrained open.

    What ends a text is token 2 in its config.json, as in the older published files, and another one in truth.
    """
    write_tokenizer(folder, pad_token="<|endoftext|>")
    edge, square = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size=edge, crop_size=square).save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=8,
        hidden_act=activation,
    )
    text = text_config(width=32, activation=activation, projection=20)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=20)
    torch.manual_seed(seed)
    network = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim():  # not the loss's temperature
                parameter.normal_(std=0.3)
    network.save_pretrained(folder)
    return network
