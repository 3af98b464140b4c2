"""What a unet/config.json says, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minisd.model_config import check_counts, check_groups, known_fields, refuse_others

# The only value that the network is written for; where a file leaves a field out, it means this one.
_FIXED = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The fields of unet/config.json that vary between Stable Diffusion models.

    The three fields of the addition embedding come together: they are what makes a model an XL one.

    Attributes:
        cross_attention_dim: E, the width of the prompt's embeddings.
        in_channels, out_channels: of the latents.
        block_out_channels: channels of each level, from the largest feature maps to the smallest.
        down_block_types, up_block_types: whether a level has attention, in the order in which the levels run.
        layers_per_block: residual blocks of a level on the way down; on the way up there is one more.
        transformer_layers_per_block: depth of the transformers, one for all levels or one each.
        attention_head_dim: the NUMBER of heads, likewise: the Hub's name, kept by 40,000 files.
        use_linear_projection: linear layers around the transformers, not 1 x 1 convolutions.
        norm_num_groups: of every GroupNorm.
        norm_eps: of every GroupNorm but those of the transformers, which have 1e-6.
        sample_size: side of the latents that the model was trained on; None where the file does not say.
        addition_embed_type: "text_time" of an XL model.
        addition_time_embed_dim: XL: width of the embedding of each of the six sizes.
        projection_class_embeddings_input_dim: XL: that of all six and the pooled prompt together.
    """

    cross_attention_dim: int
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> UNetConfig:
        """Read the Hub's unet/config.json. Raises ValueError naming a field that is not supported."""
        config = cls(**known_fields(raw, cls))
        # diffusers reads upcast_attention only where it computes the softmax by hand, which it no longer does.
        refuse_others(raw, cls, _FIXED, inert={"upcast_attention"})
        config.check()
        return config

    def check(self) -> None:
        """Raise ValueError where the fields contradict each other or name an unknown block."""
        levels = len(self.block_out_channels)
        blocks = {"down_block_types": self.down_block_types, "up_block_types": self.up_block_types}
        by_level = {"attention_head_dim": self.heads, "transformer_layers_per_block": self.depths}
        for name, values in {**blocks, **by_level}.items():
            if len(values) != levels:
                raise ValueError(f"{name} has {len(values)} entries, block_out_channels has {levels}")
        for name, kind in (("down_block_types", "DownBlock2D"), ("up_block_types", "UpBlock2D")):
            for block in blocks[name]:
                if block not in (kind, f"CrossAttn{kind}"):
                    raise ValueError(f"{name}: {block!r} is not supported (only {kind} and CrossAttn{kind} are)")
        check_groups(self.block_out_channels, self.norm_num_groups)
        for level, (width, heads) in enumerate(zip(self.block_out_channels, self.heads, strict=True)):
            # The middle attends with the last level's heads; a level without attention may name any number.
            attends = level == levels - 1 or "CrossAttn" in self.down_block_types[level] + self.up_block_types[~level]
            if attends and width % heads:
                raise ValueError(f"attention_head_dim: {heads} heads do not divide {width} channels")
        check_counts({"layers_per_block": self.layers_per_block, "transformer_layers_per_block": max(self.depths)})
        self._check_addition()

    def _check_addition(self) -> None:
        """Raise ValueError unless the fields of the addition embedding are all there and make sense, or none is."""
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(f"addition_embed_type={self.addition_embed_type!r} is not supported (only 'text_time' is)")
        for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            value = getattr(self, name)
            if value is not None and not self.is_xl:
                raise ValueError(f"{name}={value} is not supported without addition_embed_type='text_time'")
            if value is None and self.is_xl:
                raise ValueError(f"addition_embed_type='text_time' is not supported without {name}")
        if self.is_xl and self.pooled_width < 1:
            width = f"projection_class_embeddings_input_dim={self.projection_class_embeddings_input_dim}"
            raise ValueError(f"{width} is not more than six times addition_time_embed_dim={self.size_width}")

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads at each level."""
        return self._by_level(self.attention_head_dim)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks in a transformer at each level."""
        return self._by_level(self.transformer_layers_per_block)

    @property
    def is_xl(self) -> bool:
        """Whether the network also takes a pooled prompt and sizes, as Stable Diffusion XL's does."""
        return self.addition_embed_type is not None

    @property
    def size_width(self) -> int:
        """XL: width of the embedding of each of the six sizes."""
        return self.addition_time_embed_dim or 0

    @property
    def pooled_width(self) -> int:
        """XL: width of the pooled prompt, P."""
        return (self.projection_class_embeddings_input_dim or 0) - 6 * self.size_width

    def _by_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)
