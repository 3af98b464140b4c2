"""Which files a model folder in diffusers layout holds, what is missing, and what to do about it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from minisd.errors import WeightsError
from minisd.model_files import CONVERT_HINT, PICKLE_SUFFIXES, read_json

# The networks of a model and the stem of their weight files; the last is of SDXL only.
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
LAYOUT = "A model folder (diffusers layout) holds unet/, vae/, text_encoder/, tokenizer/ and scheduler/"
# Folders that tell another model by its layout.
_OTHER_MODELS = {
    "transformer": "a diffusion transformer, such as Stable Diffusion 3 or FLUX",
    "movq": "Kandinsky",
    "vqvae": "latent diffusion with a vector-quantised autoencoder",
    "prior": "a model of two stages, such as Kandinsky or Stable Cascade",
    "decoder": "a model of two stages, such as Stable Cascade or unCLIP",
    "image_encoder": "a model that reads pictures, such as Stable Video Diffusion",
}
SUPPORTED = "minisd reads Stable Diffusion 1.x, 2.x and SDXL base"


def check_folder(folder: Path, variant: str | None) -> None:
    """Raise WeightsError if a file that a model needs is not in the folder."""
    names = _file_names(folder)
    parts = networks_in(folder)
    missing = missing_files(names, variant, parts)
    if missing:
        raise WeightsError(f"{folder}: {explain(missing, names, variant)}")
    for part in parts:
        weight_files(folder, part, variant)


def networks_in(folder: Path) -> list[str]:
    """The networks that a model folder is to have, in the order of STEMS."""
    unet = folder / "unet" / "config.json"
    # Where another program has cached a part of an XL model, its UNet alone may tell that the rest is missing.
    xl = unet.is_file() and read_json(unet).get("addition_embed_type") == "text_time"
    return list(STEMS) if xl else networks_among(_file_names(folder))


def networks_among(names: Collection[str]) -> list[str]:
    """The networks of a model with these files, given relative to its folder."""
    xl = any(name.startswith("text_encoder_2/") for name in names)
    return [part for part in STEMS if part != "text_encoder_2" or xl]


def tokenizer_of(text_encoder: str) -> str:
    """The folder of a text encoder's tokenizer."""
    return text_encoder.replace("text_encoder", "tokenizer")


def weight_files(folder: Path, part: str, variant: str | None = None) -> list[Path]:
    """Find the weight files of one network in a model folder: one file, or the shards that an index lists.

    Raises:
        WeightsError: there are none, a shard is missing, or both forms are there.
    """
    single, index = (folder / part / name for name in weight_names(part, variant))
    if not index.is_file():
        if not single.is_file():
            raise WeightsError(f"{folder}: {explain([f'{part}/{single.name}'], _file_names(folder), variant)}")
        return [single]
    if single.is_file():
        raise WeightsError(f"{folder / part}: both {single.name} and {index.name} are there. Delete the outdated one.")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise WeightsError(f"{index}: expected a weight_map from keys to files. Download it again.")
    files = [folder / part / name for name in sorted(set(shards.values()))]
    for file in files:
        # A plain name beside the index: anything else would read outside the model.
        if file.parent != folder / part or file.suffix != ".safetensors":
            raise WeightsError(f"{index}: {file.name!r} is not a safetensors file beside it.")
        if not file.is_file():
            raise WeightsError(f"{file}: missing, but listed in {index.name}. Download the model again.")
    return files


def weight_names(part: str, variant: str | None) -> tuple[str, str]:
    """File names of a network's weights, as one file and as an index of shards."""
    # The rule of diffusers and transformers: the variant goes before the last extension.
    tag = f".{variant}" if variant else ""
    return f"{STEMS[part]}{tag}.safetensors", f"{STEMS[part]}.safetensors.index{tag}.json"


def missing_files(names: Collection[str], variant: str | None, parts: Collection[str]) -> list[str]:
    """List what a model of these networks needs that is not among the names of files, relative to its folder."""
    needed = [[f"{part}/config.json"] for part in parts] + [["scheduler/scheduler_config.json"]]
    tokenizers = [tokenizer_of(part) for part in parts if part.startswith("text_encoder")]
    needed += [[f"{tokenizer}/vocab.json", f"{tokenizer}/tokenizer.json"] for tokenizer in tokenizers]
    needed += [[f"{part}/{name}" for name in weight_names(part, variant)] for part in parts]
    return [either[0] for either in needed if not any(name in names for name in either)]


def explain(missing: list[str], names: Collection[str], variant: str | None) -> str:
    """Say in one line why a model with these files, some missing, cannot be loaded, and what to do."""
    first = missing[0]
    folder, _, name = first.partition("/")
    if name == "config.json":
        for other, kind in _OTHER_MODELS.items():
            if any(path.startswith(f"{other}/") for path in names):
                return f"{kind} is not supported. {SUPPORTED}."
        if folder == "text_encoder" and "text_encoder_2/config.json" in names:
            return f"the SDXL refiner is not supported. {SUPPORTED}."
        return f"not a model that can be read: {', '.join(missing)} missing. {LAYOUT}."
    beside = sorted(other.partition("/")[2] for other in names if other.startswith(f"{folder}/"))
    pickles = [other for other in beside if other.endswith(PICKLE_SUFFIXES)]
    plain = weight_names(folder, None) if folder in STEMS else ()
    variants = [other for other in beside if other.endswith(".safetensors") and other not in plain]
    if variant is not None and any(other in plain for other in beside):
        return f"{first} missing: there is no variant {variant!r}. Leave out --variant."
    if variants and "-of-" not in variants[0]:
        return f"{first} missing, but {folder}/{variants[0]} is there: choose it with --variant."
    if pickles:
        return f"{first} missing, only {folder}/{pickles[0]} is there. {CONVERT_HINT}."
    return f"{', '.join(missing)} missing. {LAYOUT}."


def _file_names(folder: Path) -> set[str]:
    """Names of the files in a model folder, relative to it; a link to nothing does not count."""
    parts = (folder / part for part in (*STEMS, "scheduler", "tokenizer", "tokenizer_2", *_OTHER_MODELS))
    return {f"{part.name}/{path.name}" for part in parts for path in part.glob("*") if path.is_file()}
