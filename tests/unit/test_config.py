"""The checks of the options, and what follows from what."""

import pytest

from minisd.config import TrainConfig
from minisd.errors import UsageError
from minisd.sample_config import SampleConfig


def test_defaults_follow_from_each_other():
    assert TrainConfig(data="x", rank=8).scale_alpha == 8.0
    assert TrainConfig(data="x", alpha=2.0).scale_alpha == 2.0


@pytest.mark.parametrize("options", [{}, {"prompt": ("a",), "num_images": 0}, {"prompt": ("a",), "seed": -1},
                                     {"prompt": ("a",), "guidance_scale": float("nan")},
                                     {"prompt": ("a",), "height": 0}])  # fmt: skip
def test_sample_options_are_checked(options):
    with pytest.raises(UsageError):
        SampleConfig(**options)
