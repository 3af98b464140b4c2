"""A tiny random BLIP in the layout of the published captioners, written by transformers' own classes.

Its words mean nothing, but depend on the picture: the weights are larger than BLIP's beginnings, which are next to zero
on the side of the picture. As in the published ones, the mark that begins a caption has no token of its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

SIDE = 32
TEXT = """a an the of on in with and red green blue yellow house tree city boat car castle rocket flower fish night day
sunset sky hill view pixel small large man woman dog cat ##s ##ing , ."""


def write_tiny_blip(folder: Path, *, seed: int = 3) -> BlipForConditionalGeneration:
    """Write a model that BlipForConditionalGeneration.from_pretrained and BlipProcessor.from_pretrained open.

    Of the first seeds the third says something else of each picture, the second little or nothing.
    """
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXT.split()]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    pictures = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    pictures.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    marks = {"bos_token_id": len(words), "sep_token_id": 3, "pad_token_id": 0}
    text = {**sizes, **marks, "vocab_size": len(words) + 2, "max_position_embeddings": 64}
    config = BlipConfig(text_config=text, vision_config={**sizes, "image_size": SIDE, "patch_size": 8})
    torch.manual_seed(seed)
    network = BlipForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(std=1.0 if "crossattention" in name or "vision" in name else 0.3)
    network.save_pretrained(folder)
    return network
