"""What an evaluation draws: prompts in the style's domain, and outside it."""

from __future__ import annotations

from collections.abc import Sequence

from minisd import draws
from minisd.data import Example, with_trigger
from minisd.errors import UsageError
from minisd.evaluate.judging import Prompt
from minisd.evaluate.options import EvaluateConfig

CAPTIONS = 4
# Of subjects and looks that few styles are about: what an adapter does to them, nobody asked for.
GENERAL = (
    "a photo of a dog on a beach",
    "portrait of an old woman",
    "a bowl of fruit on a wooden table",
    "a snowy mountain landscape",
)


def prompts_to_draw(
    config: EvaluateConfig,
    examples: Sequence[Example],
    trigger: str | None,
    defaults: tuple[list[str], list[str]] | None,
) -> list[Prompt]:
    """The prompts, those in the domain first; their seeds count up from --seed.

    Args:
        config: may name prompts of either kind.
        examples: the pictures whose captions are prompts if none are named.
        trigger: of the run; put into prompts in the domain, and into GENERAL, where it is missing.
        defaults: what takes the place of captions and GENERAL, in the domain and outside it; None for nothing.

    Raises:
        UsageError: there are no captions to draw.
    """
    inside = list(config.prompts)
    outside = list(config.outside_prompts)
    if not inside:
        inside = defaults[0] if defaults else captions_of(examples, config.seed)
    if not inside:
        raise UsageError('the pictures have no captions to draw. Give --prompts "...".')
    if not outside:
        outside = defaults[1] if defaults else [with_trigger(text, trigger) for text in GENERAL]
    texts = [(with_trigger(text, trigger), True) for text in inside] + [(text, False) for text in outside]
    return [Prompt(text, is_inside, config.seed + index) for index, (text, is_inside) in enumerate(texts)]


def captions_of(examples: Sequence[Example], seed: int) -> list[str]:
    """Different captions of a few pictures, drawn by the seed: the first of each picture that is not empty."""
    captions = (caption for example in examples for caption in example.captions[:1] if caption.strip())
    different = list(dict.fromkeys(captions))
    return [different[index] for index in draws.permutation(seed, 0, len(different))[:CAPTIONS]]
