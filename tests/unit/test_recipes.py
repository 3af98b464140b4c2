"""The recipes in recipes/: each is a valid config, and the original report's says what the report says."""

from pathlib import Path

import pytest

from minisd.command_line import parse_args, read_config_file
from minisd.config import TrainConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_a_config(recipe):
    config = parse_args(TrainConfig, ["--config", str(recipe), "--data", "x"])
    assert config.data == Path("x")
    for name, value in read_config_file(recipe, TrainConfig).items():
        assert name == "data" or getattr(config, name) == value


def test_the_numbers_of_the_original_report():
    recipe = next(path for path in RECIPES if path.name == "original-report.toml")
    config = parse_args(TrainConfig, ["--config", str(recipe)])
    assert config.model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert config.data == Path("gen_ai_custom_dataset")
    assert config.trigger == "8bit illustration"
    assert (config.train_batch_size, config.accumulation_steps(1)) == (1, 4)
    assert (config.max_train_steps, config.checkpointing_steps) == (15_000, 5_000)
    assert (config.lr_scheduler, config.lr_warmup_steps) == ("cosine", 0)
    assert (config.resolution, config.buckets, config.center_crop, config.random_flip) == (512, False, True, True)
    assert config.snr_gamma is None
    assert config.lora_targets == "attn"
    assert config.validation_prompts == ("8bit illustration of city view",)


def test_the_style_recipe_is_the_same_step_on_one_two_and_four_gpus():
    config = parse_args(TrainConfig, ["--config", str(RECIPES[-1]), "--data", "x"])
    assert [config.accumulation_steps(gpus) for gpus in (1, 2, 4)] == [4, 2, 1]
    assert config.lr_warmup_steps == 0.05 * config.max_train_steps
