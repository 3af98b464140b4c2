"""A loaded model -> a folder in diffusers layout, which diffusers and minisd open."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from minisd.atomic import delete, staging_name, sync_folder, write_synced
from minisd.errors import DiskError, NonFiniteError, UsageError
from minisd.families import network_on_meta
from minisd.model_folder import STEMS, tokenizer_of
from minisd.single_file import TOKENIZER
from minisd.weights import StableDiffusion


def write_model_folder(model: StableDiffusion, folder: Path) -> None:
    """Write a model in the dtypes it has, with the names of the Hub. The folder appears whole or not at all.

    Args:
        model: from a folder or a single file; with merged adapters, or none.
        folder: must not exist; the folders it is to be in are made.

    Raises:
        UsageError: the folder exists, or the model has learned words, which have no place in a folder.
        NonFiniteError: a weight is NaN or infinite, as after a cast to a dtype it is too large for.
        DiskError: it cannot be written.
    """
    if folder.exists():
        raise UsageError(f"{folder}: is there already. Choose another name, or delete it.")
    networks = {**model.networks(), "vae": model.vae}
    states = {part: _state(part, network, model) for part, network in networks.items()}
    staged = staging_name(folder)
    delete(staged)  # of a process with our number that was killed
    try:
        for name, value in _json_files(model):
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            write_synced(staged / name, (json.dumps(value, indent=2) + "\n").encode())
        for name, content in _tokenizer_files(model):
            (staged / name).parent.mkdir(exist_ok=True)
            write_synced(staged / name, content)
        for part, state in states.items():
            _write_weights(staged / part / f"{STEMS[part]}.safetensors", state)
        for path in (staged, *(path for path in staged.iterdir() if path.is_dir())):
            sync_folder(path)
        staged.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        where = error.filename or folder
        raise DiskError(f"{where}: {error.strerror}. Free some space or choose another folder.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # gone, if it was renamed


def _state(part: str, network: nn.Module, model: StableDiffusion) -> dict[str, Tensor]:
    """The weights of a network under the Hub's names."""
    state = network.state_dict()
    expected = network_on_meta(part, model.configs.networks[part]).state_dict()
    assert state.keys() == expected.keys(), "merge adapters first"
    grown = [key for key, tensor in state.items() if tensor.shape != expected[key].shape]
    if grown:
        raise UsageError(f"words that were learned cannot be saved in a model folder ({grown[0]} has grown).")
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise NonFiniteError(
                f"model not written: {part}.{key} has values that are NaN or too large for {tensor.dtype}."
            )
    return {_hub_key(part, key): tensor.contiguous() for key, tensor in state.items()}


def _hub_key(part: str, key: str) -> str:
    """The Hub's text encoders have a prefix that transformers has dropped from some of its networks."""
    if not part.startswith("text_encoder") or key.startswith(("text_model.", "text_projection.")):
        return key
    return f"text_model.{key}"


def _json_files(model: StableDiffusion) -> Iterator[tuple[str, Mapping[str, Any]]]:
    networks, scheduler = model.configs.networks, model.configs.scheduler
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if model.is_xl else "StableDiffusionPipeline",
        "scheduler": ["diffusers", scheduler.get("_class_name", "PNDMScheduler")],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if model.is_xl:
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": model.configs.zeros_when_absent,
        }
    else:
        nothing = [None, None]
        index |= {"safety_checker": nothing, "feature_extractor": nothing, "requires_safety_checker": False}
    yield "model_index.json", index
    yield "scheduler/scheduler_config.json", scheduler
    dtypes = {part: next(network.parameters()).dtype for part, network in model.networks().items()}
    for part, raw in networks.items():
        # _name_or_path is a path on the machine of whoever saved it.
        config = {name: value for name, value in raw.items() if name not in ("_name_or_path", "dtype", "torch_dtype")}
        if part.startswith("text_encoder"):  # transformers loads in the dtype that the config says
            config["torch_dtype"] = str(dtypes[part]).removeprefix("torch.")
        yield f"{part}/config.json", config


def _tokenizer_files(model: StableDiffusion) -> Iterator[tuple[str, bytes]]:
    parts = [part for part in model.configs.networks if part.startswith("text_encoder")]
    for part, clip in zip(parts, model.text_encoder.clips, strict=True):
        name = tokenizer_of(part)
        if model.source.is_dir():
            for path in sorted((model.source / name).iterdir()):
                if path.suffix in (".json", ".txt"):
                    yield f"{name}/{path.name}", path.read_bytes()
            continue
        for path in sorted(TOKENIZER.iterdir()):
            content = path.read_bytes()
            if path.name in ("special_tokens_map.json", "tokenizer_config.json"):
                marks = json.loads(content) | {"pad_token": clip.tokenizer.pad_token}
                content = (json.dumps(marks, indent=2) + "\n").encode()
            yield f"{name}/{path.name}", content


def _write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a safetensors file beside its config.json, and make it durable."""
    try:
        save_file(dict(state), path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for one
        raise DiskError(f"{path}: cannot be written ({error}). Free some space or choose another folder.") from error
    path.chmod(path.with_name("config.json").stat().st_mode)  # the library makes it readable for its owner only
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
