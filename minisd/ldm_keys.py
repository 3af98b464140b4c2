"""Parameter names of older checkpoints, each rename a pure function str -> str.

The networks carry the names diffusers writes today, so only older layouts need a rename.
"""

from __future__ import annotations

# diffusers before 0.17 wrote the left names; the VAE files of SD 1.x and 2.x on the Hub still have them.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_old_vae_attention(key: str) -> str:
    """Rename a projection of the VAE's attention to its present name; any other key comes back as it is.

    For example "encoder.mid_block.attentions.0.proj_attn.bias" -> "encoder.mid_block.attentions.0.to_out.0.bias".
    """
    parts = key.split(".")  # whole components: "key" is part of many words
    if len(parts) == 6 and parts[0] in ("encoder", "decoder") and parts[1:4] == ["mid_block", "attentions", "0"]:
        parts[4] = _OLD_VAE_ATTENTION.get(parts[4], parts[4])
    return ".".join(parts)
