"""Fixtures shared by the tests: a tiny model, a small dataset, and quiet single-threaded arithmetic."""

import os

# Before torch: threads that wait for each other make small tests slow, and the same thread count everywhere keeps the
# order of additions, and with it the last bit, the same in this process and in those it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

from minisd.pocket import scenes
from minisd.weights import load_model, load_text_encoder, load_unet, load_vae
from tests.tiny import write_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny SD1-like model in diffusers layout, 64 x 64 pixels, 16 x 16 latents."""
    folder = tmp_path_factory.mktemp("tiny-sd1")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def sd_folder(request, tmp_path_factory):
    """The same, and one like SD 2.x, in turn."""
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, family=request.param)
    return folder


@pytest.fixture(scope="module")
def tiny_unet(tiny_folder):
    """The tiny model's UNet."""
    return load_unet(tiny_folder)


@pytest.fixture(scope="module")
def tiny_networks(tiny_folder):
    """The tiny model's networks that a LoRA may adapt, by part."""
    return load_model(str(tiny_folder)).networks()


@pytest.fixture(scope="module")
def vae(tiny_folder):
    """The tiny model's VAE."""
    return load_vae(tiny_folder)


@pytest.fixture(scope="module")
def text_encoder(tiny_folder):
    """The tiny model's text encoder."""
    return load_text_encoder(tiny_folder)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Seven captioned pictures in the layout of a Hugging Face imagefolder."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "train").mkdir()
    rows = ["file_name,text"]
    for index in range(7):
        scene = scenes.scene_at(index, 0)
        scenes.draw(scene, "8bit").save(folder / "train" / f"{index}.png")
        rows.append(f"{index}.png,8bit {scenes.caption(scene)}")
    (folder / "train" / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder
