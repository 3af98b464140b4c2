"""What `python -m minisd.lora_file` does to LoRA files: convert, merge, resize. lora_inspect.py has the fourth."""

from __future__ import annotations

import logging
import math
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from minisd.atomic import write_atomically
from minisd.errors import UsageError, WeightsError
from minisd.families import Family, meta_networks, network_on_meta
from minisd.hub import resolve_model
from minisd.lora import bake_lora, lora_parameters, merge_lora
from minisd.lora_choice import with_strength
from minisd.lora_dialects import FLUX
from minisd.lora_info import FAMILIES, base_model_version
from minisd.lora_layers import LoRAWeights
from minisd.lora_options import Convert, Merge, Resize
from minisd.lora_raw import read_raw
from minisd.lora_reader import LoRA, add_lora_to, family_name, load_lora
from minisd.lora_resize import Kept, concatenate, resize
from minisd.lora_writer import Parts, save_lora
from minisd.model_files import read_json
from minisd.model_folder import networks_in
from minisd.model_writer import write_model_folder
from minisd.single_file import identify
from minisd.unet import UNet2DConditionModel
from minisd.weights import load_model

log = logging.getLogger("lora_file")

# Width of the prompts, or what a header says -> the family whose names and sizes are known here.
_FAMILIES: Mapping[int | str | None, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl", "SDXL": "sdxl", "sd_v1": "sd1",
                                                "sd_v2": "sd2", "sd_v2_v": "sd2", "sdxl_base_v1-0": "sdxl"}  # fmt: skip


def convert(options: Convert) -> None:
    """Write a LoRA file in another layout. Raises UsageError, WeightsError, NetworkError or DiskError."""
    _check_suffix(options.output)
    _check_free(options.output, overwrite=options.overwrite)
    networks = _networks_for(options.file, options.model, variant=options.variant)
    lora = load_lora(options.file, networks, allow_partial=options.allow_partial)
    _write(options, _with_family(lora, networks))


def merge(options: Merge) -> None:
    """Add up LoRA files, into one or into a model. Raises UsageError, WeightsError, NetworkError or DiskError."""
    asked = [with_strength(text) for text in options.files]
    scaled = [(path, 1.0 if strength is None else strength) for path, strength in asked]
    if not scaled:
        raise UsageError("merge: expected at least one PATH or PATH:SCALE.")
    if options.rank is not None:
        _check_rank(options.rank)
    if options.output.suffix != ".safetensors":
        _merge_into_model(options, scaled)
        return
    _check_free(options.output, overwrite=options.overwrite)
    _check_one_family([path for path, _ in scaled])
    networks = _networks_for(scaled[0][0], options.model, revision=options.revision, variant=options.variant)
    loras = [load_lora(path, networks, allow_partial=options.allow_partial) for path, _ in scaled]
    try:
        parts = _added_up([(lora.parts, scale) for lora, (_, scale) in zip(loras, scaled, strict=True)])
    except ValueError as error:
        raise UsageError(f"merge: {error}. Merge it into its model instead: --output FOLDER --model MODEL.") from error
    if options.rank is not None:
        parts = _resized(parts, options.rank)
    info = replace(
        loras[0].info,
        trigger=", ".join(dict.fromkeys(lora.info.trigger for lora in loras if lora.info.trigger)),
        targets=tuple(dict.fromkeys(target for lora in loras for target in lora.info.targets)),
        title="",
        steps=None,
        seed=None,
        recipe={"merged": [{"file": path.name, "scale": scale} for path, scale in scaled]},
    )
    _write(options, _with_family(LoRA(parts, _all_embeddings(loras), info), networks))


def resize_file(options: Resize) -> None:
    """Bring a LoRA file to a lower rank. Raises UsageError, WeightsError, NetworkError or DiskError."""
    _check_rank(options.rank)
    _check_suffix(options.output)
    _check_free(options.output, overwrite=options.overwrite)
    networks = _networks_for(options.file, options.model, variant=options.variant)
    lora = load_lora(options.file, networks)
    _write(options, _with_family(replace(lora, parts=_resized(lora.parts, options.rank)), networks))


def _merge_into_model(options: Merge, scaled: Sequence[tuple[Path, float]]) -> None:
    """Write the model with the LoRAs' changes in its own weights."""
    if options.model is None:
        raise UsageError(f"merge: --output {options.output} is no .safetensors file. For a folder, give --model, too.")
    if options.rank is not None:
        raise UsageError("merge: --rank is for a merged LoRA file; a model has no rank.")
    _check_free(options.output, overwrite=False)
    _check_one_family([path for path, _ in scaled])
    model = load_model(  # in float32: rounded once, at the end
        options.model,
        revision=options.revision,
        variant=options.variant,
        prediction_type=options.prediction_type,
    )
    networks = model.networks()
    loras = [load_lora(path, networks, allow_partial=options.allow_partial) for path, _ in scaled]
    embeddings = _embedding_files(options.output, _all_embeddings(loras), overwrite=False)
    for index, (lora, (_, scale)) in enumerate(zip(loras, scaled, strict=True)):
        add_lora_to(networks, lora, name=f"lora{index}", lora_scale=scale)
    for network in networks.values():
        if lora_parameters(network):
            merge_lora(network)
            bake_lora(network)
        network.to(getattr(torch, options.dtype))
    if not model.is_xl:  # whose VAE overflows float16
        model.vae.to(getattr(torch, options.dtype))
    write_model_folder(model, options.output)
    shown = shlex.quote(str(options.output))
    log.info("wrote %s, a model folder; draw with: sample.py --model %s --lora none", options.output, shown)
    _write_embeddings(embeddings)


def _networks_for(
    path: Path, model: str | None, *, variant: str | None, revision: str | None = None
) -> dict[str, nn.Module]:
    """The networks a LoRA is for, without weights: they say what its names mean.

    Raises:
        UsageError: the file does not tell, and --model is not given.
        WeightsError: the file or the model cannot be read, or is of a kind that is not supported.
        NetworkError: the model has to be downloaded, and cannot be.
    """
    if model is None:
        raw = read_raw(path)
        family = _FAMILIES.get(raw.guess)
        if family is not None:
            return meta_networks(family)
        name = family_name(raw.guess)
        if name == FLUX:
            raise WeightsError(f"{path}: it is for {name}, which is not supported.")
        if not name.startswith("pocket"):
            raise UsageError(f"{path}: its family is {name}. Say with --model what it is for.")
        model = "pocket"
    source = resolve_model(model, revision=revision, variant=variant)
    if source.is_file():
        return meta_networks(identify(source, "epsilon")[0])  # what it predicts changes no name
    networks = {}
    for part in networks_in(source):
        config = source / part / "config.json"
        try:
            if part != "vae":
                networks[part] = network_on_meta(part, read_json(config))
        except ValueError as error:
            raise WeightsError(f"{config}: {error}. This model cannot be read.") from error
    return networks


def _with_family(lora: LoRA, networks: Mapping[str, nn.Module]) -> LoRA:
    """Fill in what the header did not say, from the networks and the weights."""
    weights = [weights for part in lora.parts.values() for weights in part.values()]
    rank, alpha = Counter((each.rank, each.alpha) for each in weights).most_common(1)[0][0]
    info = replace(lora.info, rank=rank, alpha=alpha)
    unet = networks["unet"]
    assert isinstance(unet, UNet2DConditionModel)
    said, version = info.base_model_version, base_model_version(unet.config.cross_attention_dim, info.prediction_type)
    # The weights fit these networks, so a header that names another family is wrong.
    if version != "unknown" and _FAMILIES.get(said, said) != _FAMILIES.get(version, version):
        # Of SD 2.x the version also says what it predicts.
        info = replace(info, base_model_version="" if version == "sd_v2" and not info.prediction_type else version)
    return replace(lora, info=info)


def _added_up(loras: Sequence[tuple[Parts, float]]) -> dict[str, dict[str, LoRAWeights]]:
    """Concatenate the adapters of each layer. Raises ValueError for a DoRA."""
    by_layer: dict[str, dict[str, list[tuple[LoRAWeights, float]]]] = {}
    for parts, scale in loras:
        for part, weights in parts.items():
            for path, lora in weights.items():
                by_layer.setdefault(part, {}).setdefault(path, []).append((lora, scale))
    ranks = Counter(sum(lora.rank for lora, _ in found) for paths in by_layer.values() for found in paths.values())
    alpha = float(ranks.most_common(1)[0][0])  # equal to the rank of most layers
    return {
        part: {path: concatenate(found, alpha) for path, found in paths.items()} for part, paths in by_layer.items()
    }


def _resized(parts: Parts, rank: int) -> dict[str, dict[str, LoRAWeights]]:
    """Bring every adapter to a rank, and say what is kept. Raises UsageError."""
    kept: dict[str, Kept] = {}
    resized: dict[str, dict[str, LoRAWeights]] = {part: {} for part in parts}
    for part, weights in parts.items():
        for path, lora in weights.items():
            try:
                resized[part][path], kept[f"{part}: {path}"] = resize(lora, rank)
            except ValueError as error:
                raise UsageError(f"--rank {rank}: {path}: {error}.") from error
    if all(lora.rank <= rank for weights in parts.values() for lora in weights.values()):
        print(f"no module has a rank above {rank}: nothing was made smaller")
        return resized
    shares = {name: found.share for name, found in kept.items()}
    worst = min(shares, key=lambda name: shares[name])
    total = Kept(math.fsum(found.kept for found in kept.values()), math.fsum(found.whole for found in kept.values()))
    print(
        f"energy kept: {total.share:.2%} in total, {statistics.fmean(shares.values()):.2%} in the mean of the modules"
    )
    print(f"least kept: {shares[worst]:.2%} in {worst}")
    return resized


def _check_one_family(paths: Sequence[Path]) -> None:
    """Refuse LoRAs whose weights show different families. Where only a header says one, the sizes will tell."""
    files: dict[str, list[str]] = {}
    for path in paths:
        guess = read_raw(path).guess
        if isinstance(guess, int):
            files.setdefault(FAMILIES.get(guess, family_name(guess)), []).append(path.name)
        elif guess == FAMILIES[2048]:  # by its keys
            files.setdefault(guess, []).append(path.name)
    if len(files) > 1:
        shown = ", ".join(f"{family} ({', '.join(names)})" for family, names in files.items())
        raise UsageError(f"merge: the LoRAs are for different bases: {shown}. Only LoRAs of one family can be merged.")


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise UsageError(f"--rank {rank}: expected a whole number of at least 1.")


def _check_suffix(output: Path) -> None:
    if output.suffix != ".safetensors":
        raise UsageError(f"--output {output}: expected the name of a file that ends in .safetensors.")


def _check_free(output: Path, *, overwrite: bool) -> None:
    if output.exists() and (output.is_dir() or not overwrite):
        allowed = "" if output.is_dir() else ", or --overwrite"
        raise UsageError(f"{output} is there already. Choose another --output{allowed}.")


def _write(options: Convert | Merge | Resize, lora: LoRA) -> None:
    """Write the file, and beside it the embeddings, for which LoRA files have no common place."""
    output, dtype = options.output, options.dtype
    embeddings = _embedding_files(output.with_suffix(""), lora.embeddings, overwrite=options.overwrite)
    try:
        save_lora(
            output,
            lora.parts,
            lora.info,
            dtype=None if dtype is None else getattr(torch, dtype),
            lora_format=options.lora_format,
        )
    except ValueError as error:
        raise UsageError(f"{output}: {error}.") from error
    log.info("wrote %s", output)
    _write_embeddings(embeddings)


def _all_embeddings(loras: Sequence[LoRA]) -> dict[str, Tensor]:
    """Token -> its vectors. Raises UsageError if two files have the same token."""
    embeddings = {token: vectors for lora in loras for token, vectors in lora.embeddings.items()}
    if len(embeddings) != sum(len(lora.embeddings) for lora in loras):
        raise UsageError("merge: two of the files have embeddings of the same token. Use them one at a time.")
    return embeddings


def _embedding_files(
    stem: Path, embeddings: Mapping[str, Tensor], *, overwrite: bool
) -> dict[Path, tuple[str, Tensor]]:
    """Choose a file for each token's vectors, of a name that any disk takes. Raises UsageError if one is there."""
    files: dict[Path, tuple[str, Tensor]] = {}
    for token, vectors in embeddings.items():
        word = re.sub(r"[^A-Za-z0-9]+", "", token)[:60] or "token"
        path = stem.with_name(f"{stem.name}-{word}.safetensors")
        while path in files:  # tokens that differ in other characters only
            word += "x"
            path = stem.with_name(f"{stem.name}-{word}.safetensors")
        _check_free(path, overwrite=overwrite)
        files[path] = token, vectors
    return files


def _write_embeddings(files: Mapping[Path, tuple[str, Tensor]]) -> None:
    """Write textual inversion files, as diffusers and A1111 read them."""
    for path, (token, vectors) in files.items():
        write_atomically(path, save({token: vectors.contiguous()}))
        log.info("wrote %s, the embedding of %r", path, token[:100])
