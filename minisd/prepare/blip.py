"""BLIP (arXiv:2201.12086), which says in a few words what a picture shows: transformers' network, read strictly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from minisd.errors import UsageError, WeightsError
from minisd.model_files import read_header, read_json
from minisd.strict_load import fill
from minisd.vision_files import BLIP, TEXT_SIZES, VISION_SIZES, WEIGHTS, checked_section

_MARKS = ("bos_token_id", "sep_token_id", "pad_token_id")  # what begins a caption, ends it, and fills it up
_NO_REPEAT = 3  # words, or pieces of words, in a row that are not said twice

_DECODER = "text_decoder.cls.predictions.decoder"
# Weights that the network has twice: a file may have them once, under either name.
_SHARED = {
    f"{_DECODER}.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    f"{_DECODER}.bias": "text_decoder.cls.predictions.bias",
}


class Captioner:
    """A BLIP model and how it is asked.

    Args:
        network: transformers' BlipForConditionalGeneration, frozen.
        tokenizer: transformers' BertTokenizer.
        prepare_pictures: transformers' BlipImageProcessor.
        num_beams: how many wordings are followed at once.
        max_new_tokens: the longest caption, in tokens.
        repetition_penalty: 1 is none; above it, words that were said are less likely (arXiv:1909.05858, 4.1).
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any,
        prepare_pictures: Any,
        *,
        num_beams: int,
        max_new_tokens: int,
        repetition_penalty: float,
    ) -> None:
        self.network: Any = network
        self.tokenizer = tokenizer
        self.prepare_pictures = prepare_pictures
        self.num_beams = num_beams
        self.max_new_tokens = max_new_tokens
        self.repetition_penalty = repetition_penalty

    def describe(self, images: Sequence[Image.Image]) -> list[str]:
        """Describe RGB pictures of any sizes, as BLIP words it: one description for each, "" if it says nothing."""
        pixel_values = self.prepare_pictures(list(images), return_tensors="pt")["pixel_values"]  # [B, 3, H, W]
        ids = self.network.generate(  # [B, T]
            pixel_values.to(self.network.device, self.network.dtype),
            do_sample=False,
            num_beams=self.num_beams,
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=_NO_REPEAT,
        )
        said: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return said


def load_captioner(
    folder: Path,
    *,
    num_beams: int,
    max_new_tokens: int,
    repetition_penalty: float,
    device: torch.device | str = "cpu",
) -> Captioner:
    """Load a BLIP model from a folder that vision_files.resolve_vision_model has found.

    Args:
        folder: with the weights as safetensors; nothing is unpickled.
        num_beams: as for Captioner, with the two that follow.
        max_new_tokens: fewer than the model has positions.
        repetition_penalty: at least 1.
        device: where it works: on a GPU in bfloat16 or, on one that has none, in float16; else in float32.

    Raises:
        WeightsError: a file is damaged, or of another kind of model.
        UsageError: captions are to be longer than this model can write.
    """
    path = folder / "config.json"
    try:
        network = blip_on_meta(read_json(path))
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {' '.join(str(error).split())[:300]}. This model cannot be read.") from error
    text, vision = network.config.text_config, network.config.vision_config
    if max_new_tokens >= text.max_position_embeddings:
        most = text.max_position_embeddings - 1
        raise UsageError(f"--max-new-tokens {max_new_tokens}: expected at most {most}, which this model can write.")
    tokenizer = _load_tokenizer(folder, text.vocab_size, text.sep_token_id)
    prepare_pictures = _load_picture_preparation(folder, vision.image_size)
    _fill(network, folder, _dtype_on(torch.device(device)), device)
    return Captioner(
        network,
        tokenizer,
        prepare_pictures,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
    )


def blip_on_meta(raw: Mapping[str, Any]) -> Any:
    """Build the captioner that a BLIP config.json describes, without weights.

    Only the fields that shape the network are taken over: transformers would act on others.

    Raises:
        ValueError: the file describes another kind of network, or a field is of the wrong type or too large.
    """
    from transformers import BlipConfig, BlipForConditionalGeneration

    kinds = raw.get("architectures") or ["BlipForConditionalGeneration"]
    if raw.get("model_type") != "blip" or kinds != ["BlipForConditionalGeneration"]:
        got = f"a model of type {raw.get('model_type')!r}, {kinds!r}"
        raise ValueError(f"{got} is not supported (only a BLIP captioner is: 'blip', BlipForConditionalGeneration)")
    text, vision = _section(raw, "text_config", TEXT_SIZES), _section(raw, "vision_config", VISION_SIZES)
    # What a file leaves out is as transformers has it.
    config = BlipConfig(text_config=text, vision_config=vision)
    for name in _MARKS:
        mark = getattr(config.text_config, name)
        if type(mark) is not int or not 0 <= mark < config.text_config.vocab_size:
            raise ValueError(f"{name}={mark!r} is none of {config.text_config.vocab_size} tokens")
    for part in (config.text_config, config.vision_config):
        if part.hidden_size % part.num_attention_heads:
            raise ValueError(f"hidden_size={part.hidden_size} is not a multiple of {part.num_attention_heads} heads")
    with torch.device("meta"):
        network = BlipForConditionalGeneration(config)
    embeddings = network.text_decoder.bert.embeddings  # position_ids are not in the file, so nothing would fill them
    embeddings.position_ids = torch.arange(config.text_config.max_position_embeddings).unsqueeze(0)
    return network


def _section(raw: Mapping[str, Any], section: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The checked fields of one of the two networks."""
    values = raw.get(section) or {}
    marks = _MARKS if section == "text_config" else ()
    given = {name: values[name] for name in marks if values.get(name) is not None}
    return checked_section(section, values, sizes, ["gelu"]) | given


def _fill(network: Any, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give the network its weights; those that the file has once take both of their places."""
    names = read_header(folder / WEIGHTS).tensors
    once = {twin: name for twin, name in _SHARED.items() if twin not in names or name not in names}
    decoder = network.get_submodule(_DECODER)
    for twin in once:
        delattr(decoder, twin.rpartition(".")[2])

    def rename(key: str) -> str | None:
        return None if key.endswith("embeddings.position_ids") else once.get(key, key)  # a constant in older files

    complaint = f"{folder}: the weights do not fit config.json"
    fill(network, [folder / WEIGHTS], rename, dtype, device, complaint=complaint)
    for twin, name in once.items():
        setattr(decoder, twin.rpartition(".")[2], network.get_parameter(name))


def _dtype_on(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _load_tokenizer(folder: Path, vocabulary: int, end: int) -> Any:
    """Load the tokenizer, and see that it is the network's. Raises WeightsError."""
    from transformers import BertTokenizer

    tokenizer = _loaded(folder, "tokenizer", BertTokenizer.from_pretrained)
    # Without its files transformers builds a tokenizer of five tokens, silently.
    file = next(folder / name for name in BLIP.tokenizer if (folder / name).is_file())
    if len(tokenizer) > vocabulary or tokenizer.sep_token_id != end:
        got = f"{len(tokenizer)} tokens, {tokenizer.sep_token_id} the last of a caption"
        raise WeightsError(f"{file}: {got}; config.json has {vocabulary} and {end}. They are of different models.")
    return tokenizer


def _load_picture_preparation(folder: Path, side: int) -> Any:
    """Load how pictures are prepared, and see that it is what BLIP expects. Raises WeightsError."""
    from transformers import BlipImageProcessor

    prepare = _loaded(folder, "preparation of pictures", BlipImageProcessor.from_pretrained)
    size = dict(prepare.size)
    if size != {"height": side, "width": side}:
        raise WeightsError(f"{folder}: pictures are made {size!r}, config.json has {side} x {side}. Correct one.")
    fixed = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    for name, only in fixed.items():
        if getattr(prepare, name) != only:
            raise WeightsError(f"{folder}: {name}={getattr(prepare, name)!r} is not supported (only {only!r} is).")
    for name in ("image_mean", "image_std"):
        values = getattr(prepare, name)
        if len(values) != 3 or not all(type(value) is float and 0 < value < 1 for value in values):
            raise WeightsError(f"{folder}: {name}={values!r} is not three numbers between 0 and 1.")
    return prepare


def _loaded(folder: Path, what: str, load: Callable[..., Any]) -> Any:
    """What transformers loads from a folder. Raises WeightsError."""
    try:
        return load(str(folder), local_files_only=True)
    except Exception as error:  # the library raises of many kinds, plain Exception among them
        raise WeightsError(f"{folder}: the {what} cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
