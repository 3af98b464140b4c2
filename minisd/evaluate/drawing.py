"""The pictures of an evaluation, by the function that sample.py draws with. What is there is not drawn again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from minisd.a1111_text import parameters_text
from minisd.evaluate.judging import Prompt
from minisd.images import save_png, to_pil
from minisd.sampling import SamplingSettings, decode, denoise
from minisd.weights import StableDiffusion


def draw(
    model: StableDiffusion,
    prompts: Sequence[Prompt],
    paths: Sequence[Path],
    settings: SamplingSettings,
    details: Sequence[str],
    on_picture: Callable[[], object],
) -> list[Image.Image]:
    """Draw each prompt from its seed, as the adapters in the model are now.

    Args:
        model: on its device, in eval mode.
        prompts: one a picture.
        paths: where each goes. A picture that is there with the text that it would get is taken as it is.
        settings: how.
        details: "Name: value" for the text, which must say of which adapter the picture is.
        on_picture: called after each.

    Returns:
        The pictures, RGB.

    Raises:
        NonFiniteError: a picture is not finite.
        DiskError: it cannot be written.
    """
    images = []
    for prompt, path in zip(prompts, paths, strict=True):
        text = parameters_text(settings, prompt.text, prompt.seed, model.name, details)
        image = _drawn_before(path, text)
        if image is None:
            *_, latents = denoise(model, prompt.text, [prompt.seed], settings)
            image = to_pil(decode(model, latents))[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(image, path, parameters=text, overwrite=True)
        images.append(image)
        on_picture()
    return images


def _drawn_before(path: Path, text: str) -> Image.Image | None:
    """The picture at `path` if it is whole and has this text."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.convert("RGB") if image.info.get("parameters") == text else None
    except Exception:  # not there, cut short, of another program: decoders raise what they like
        return None
