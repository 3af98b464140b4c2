"""Prompts to what the UNet reads, through one or two CLIP text encoders (arXiv:2103.00020), which transformers has.

A prompt longer than the 75 tokens that CLIP takes is encoded in chunks, each with a start and an end mark of its own,
and the UNet attends to all of them.

Shape letters: B prompts, K chunks, T tokens of a chunk, marks and padding included (77 in the published models),
S = K T positions, E width (768 in SD 1.x, 1024 in SD 2.x, 768 + 1280 in XL), P width of the pooled prompt (XL: 1280).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minisd.errors import UsageError
from minisd.prompts import parse_weights

MAX_CHUNKS = 20
_MAX_CHARACTERS = 100_000  # as many tokens would take minutes to count


@dataclass(frozen=True)
class TextEmbeddings:
    """What the UNet reads of B prompts.

    Attributes:
        hidden_states: [B, S, E].
        pooled: [B, P] of an XL model, else None.
    """

    hidden_states: Tensor
    pooled: Tensor | None


class CLIP:
    """One tokenizer and its text network, frozen.

    Args:
        network: transformers' CLIPTextModel, or CLIPTextModelWithProjection, whose pooled output is used.
        tokenizer: transformers' CLIPTokenizer.
    """

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        self.network = network
        self.tokenizer = tokenizer
        config: Any = network.config
        self.width: int = config.hidden_size
        self.vocabulary_size: int = config.vocab_size
        self.layers: int = config.num_hidden_layers
        self.max_tokens: int = min(tokenizer.model_max_length, config.max_position_embeddings)
        self._transformer: Any = getattr(network, "text_model", network)  # of CLIPTextModelWithProjection
        self._vectors: dict[int, list[int]] = {}  # token of a textual inversion -> its rows of the embedding

    @property
    def pooled_width(self) -> int | None:
        """P; None if the network has no projection."""
        projection = getattr(self.network, "text_projection", None)
        return None if projection is None else len(projection.weight)

    def add_token(self, token: str, vectors: Tensor) -> None:
        """Teach a word its vectors [n, E] (textual inversion, arXiv:2208.01618): they take the place of n tokens.

        Raises:
            UsageError: the vectors are of another width, or the word is a token already.
        """
        if vectors.dim() != 2 or vectors.shape[1] != self.width:
            raise UsageError(f"the word {token!r}: its vectors are {list(vectors.shape)}, expected [n, {self.width}].")
        if self.tokenizer.add_tokens([token]) != 1:
            raise UsageError(f"the word {token!r} has a meaning already, of the model or of another LoRA. Rename it.")
        embedding = self._transformer.embeddings.token_embedding
        first, table = embedding.num_embeddings, embedding.weight
        grown = nn.Embedding.from_pretrained(torch.cat([table, vectors.to(table)]))
        self._transformer.embeddings.token_embedding = grown
        rows = list(range(first, first + len(vectors)))
        self._vectors[self.tokenizer.convert_tokens_to_ids(token)] = rows

    def tokens(self, text: str) -> list[int]:
        """Rows of the embedding for a text, without the marks."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return [row for token in ids for row in self._vectors.get(token, [token])]

    def encode(self, chunks: Sequence[Sequence[int]], clip_skip: int, *, penultimate: bool) -> tuple[Tensor, Tensor]:
        """Encode chunks of at most T - 2 tokens: [K, T, E], and the end mark's final state [K, E].

        Args:
            chunks: K of them, as `tokens` gives them.
            clip_skip: layers left out at the end.
            penultimate: read one layer before that, as it is; else normalised like a last layer.
        """
        start, end, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        rows = [[start, *chunk, end, *[pad] * (self.max_tokens - 2 - len(chunk))] for chunk in chunks]
        input_ids = torch.tensor(rows, device=next(self.network.parameters()).device)
        # No attention mask: Stable Diffusion was trained with padding attended to like any other token.
        output = self._transformer(input_ids, output_hidden_states=True)
        final: Tensor = output.last_hidden_state
        ends = torch.tensor([len(chunk) + 1 for chunk in chunks], device=final.device)
        pooled = final[torch.arange(len(chunks), device=final.device), ends]
        if not penultimate and clip_skip == 0:
            return final, pooled
        hidden: Tensor = output.hidden_states[-1 - clip_skip - penultimate]
        return hidden if penultimate else self._transformer.final_layer_norm(hidden), pooled


class TextEncoder:
    """The text side of a model: one CLIP in SD 1.x and 2.x, two side by side in XL (arXiv:2307.01952, 2.1).

    Args:
        clips: the encoders, in the order in which the UNet reads them. The last of two gives the pooled prompt.
        zeros_when_absent: whether zeros stand for a prompt that is not given, as XL was trained; else "" does.
    """

    def __init__(self, clips: Sequence[CLIP], *, zeros_when_absent: bool = False) -> None:
        assert len(clips) in (1, 2)
        self.clips = list(clips)
        self.zeros_when_absent = zeros_when_absent
        self.width = sum(clip.width for clip in clips)
        self.pooled_width = clips[-1].pooled_width if len(clips) == 2 else None
        self.max_tokens = min(clip.max_tokens for clip in clips)

    @torch.no_grad()
    def __call__(
        self,
        captions: Sequence[str | None],
        *,
        weighted: bool = False,
        clip_skip: int = 0,
        chunks: int | None = None,
    ) -> TextEmbeddings:
        """Encode captions, in the networks' dtype.

        Args:
            captions: B texts; None is a prompt that is not given.
            weighted: read `(word:1.2)` as in prompts.parse_weights.
            clip_skip: layers left out at the end of each network (A1111 counts one more: its 1 is 0 here).
            chunks: K, to which shorter captions are padded with empty chunks and longer ones are cut; None for what the
                longest needs.

        Raises:
            UsageError: a caption needs more than MAX_CHUNKS chunks, or the network has no such layer.
        """
        assert not isinstance(captions, str), "pass a list of captions"
        if chunks is None and any(len(text or "") > _MAX_CHARACTERS for text in captions):
            raise UsageError(
                f"a prompt is longer than {_MAX_CHARACTERS} characters, the most that is read. Shorten it."
            )
        pieces = [parse_weights(text or "") if weighted else [(text or "", 1.0)] for text in captions]
        needed = chunks or max(self._chunks_of(clip, caption) for clip in self.clips for caption in pieces)
        if needed > MAX_CHUNKS:
            most = MAX_CHUNKS * (self.max_tokens - 2)
            raise UsageError(f"a prompt is longer than {most} tokens, the most that is taken. Shorten it.")
        columns = [[self._encode(clip, caption, clip_skip, needed) for caption in pieces] for clip in self.clips]
        hidden = torch.cat([torch.stack([states for states, _ in column]) for column in columns], dim=-1)
        pooled = None
        if self.pooled_width is not None:
            projection: Any = self.clips[-1].network.text_projection
            pooled = projection(torch.stack([state for _, state in columns[-1]]))  # [B, E] -> [B, P]
        if self.zeros_when_absent:
            absent = [index for index, text in enumerate(captions) if text is None]
            for tensor in (hidden, pooled):
                if tensor is not None:
                    tensor[absent] = 0
        return TextEmbeddings(hidden, pooled)

    def _encode(
        self, clip: CLIP, pieces: Sequence[tuple[str, float]], clip_skip: int, chunks: int
    ) -> tuple[Tensor, Tensor]:
        """One caption through one network: [K T, E], and the pooled state of its first chunk [E]."""
        most = clip.layers - len(self.clips)  # XL reads one layer before the last as it is
        if not 0 <= clip_skip <= most:
            raise UsageError(f"--clip-skip {clip_skip}: expected 0 to {most}, of {clip.layers} layers.")
        size = self.max_tokens - 2
        tokens = [(token, weight) for text, weight in pieces for token in clip.tokens(text)]
        cut = [tokens[i * size : (i + 1) * size] for i in range(chunks)]
        ids = [[token for token, _ in chunk] for chunk in cut]
        hidden, pooled = clip.encode(ids, clip_skip, penultimate=len(self.clips) == 2)
        if any(weight != 1 for _, weight in tokens):
            rows = [[1.0, *(weight for _, weight in chunk), *[1.0] * (size + 1 - len(chunk))] for chunk in cut]
            states = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            weighted = states * torch.tensor(rows, dtype=states.dtype, device=states.device)[..., None]  # [K, T, E]
            # A1111's rule: what the weights do to the mean of a chunk is undone.
            before, after = (tensor.mean((1, 2), keepdim=True) for tensor in (states, weighted))  # [K, 1, 1] each
            hidden = (weighted * (before / after)).to(hidden.dtype)
        return hidden.flatten(0, 1), pooled[0]

    def _chunks_of(self, clip: CLIP, pieces: Sequence[tuple[str, float]]) -> int:
        return self._chunks_for(sum(len(clip.tokens(text)) for text, _ in pieces))

    def _chunks_for(self, tokens: int) -> int:
        return max(1, math.ceil(tokens / (self.max_tokens - 2)))

    def token_count(self, caption: str) -> int:
        """Tokens in a caption, without the start and end marks."""
        return max(len(clip.tokens(caption)) for clip in self.clips)

    def chunks(self, captions: Sequence[str]) -> int:
        """Chunks that the longest caption needs, at least 1."""
        return max(self._chunks_for(self.token_count(caption)) for caption in captions)

    def add_tokens(self, vectors: Mapping[str, Tensor]) -> None:
        """Teach words their vectors, see CLIP.add_token.

        Raises:
            UsageError: they do not fit, or this is a model of two text encoders, which have different widths.
        """
        if vectors and len(self.clips) != 1:
            raise UsageError(f"the words {', '.join(vectors)} have vectors for SD 1.x or 2.x, not for an XL model.")
        for token, values in vectors.items():
            self.clips[0].add_token(token, values)

    def networks(self) -> dict[str, nn.Module]:
        """The networks by their names in a model folder."""
        names = ("text_encoder", "text_encoder_2")
        return {name: clip.network for name, clip in zip(names, self.clips, strict=False)}

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEncoder:
        """Move the networks, in place like nn.Module.to; None leaves that property alone."""
        for clip in self.clips:
            clip.network.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are and the embeddings come out."""
        return next(self.clips[0].network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the networks and of the embeddings."""
        return next(self.clips[0].network.parameters()).dtype
