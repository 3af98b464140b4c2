"""Mutate weights files and LoRA files: `python -m tests.faults.fuzz_weights FOLDER careful|naive FIRST COUNT`.

Every mutant either loads, and then all in it is sound, or is refused by a WeightsError (exit code 4). Prints as JSON
how many did which, and what went wrong. A program of its own, so that a signal is seen for what it is. A mutant follows
from its number alone.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from minisd.errors import WeightsError, one_line
from minisd.lora_reader import load_lora
from minisd.strict_load import fill
from minisd.unet import UNet2DConditionModel
from minisd.unet_config import UNetConfig

Load = Callable[[Path], None]
_NUMBERS = (-1, 0, 1, 2, 3, 8, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, 1e400, True, None, "4", [])
_DTYPES = ("F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "f32", "", "F32\x1b[2J", 32, None)
_NAMES = ("", "__metadata__", "alpha", ".alpha", "a\nb", "\x1b[2J", "\ud800", "\0", "x" * 70_000, "unet:0:up")
_SUFFIXES = (".lora_up.weight", ".lora_A.weight", ".dora_scale", ".alpha", ".hada_w1_a", ".diff", ".lora_mid.weight")
_METADATA = ("minisd.recipe", "minisd.format_version", "minisd.targets", "lora_adapter_metadata", "ss_steps", "unet")
_TEXTS = (
    "",
    "{",
    "[]",
    "{}",
    "NaN",
    '{"lora_alpha": NaN}',
    '{"lora_alpha": "4"}',
    "2",
    "[" * 5_000,
    "\x1b[2J",
    '["GEGLU"]',
)


def unet() -> UNet2DConditionModel:
    """What a LoRA is for."""
    config = UNetConfig(
        cross_attention_dim=8,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    with torch.device("meta"):
        return UNet2DConditionModel(config)


def base() -> nn.Module:
    """What base weights are for."""
    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(4, 8), nn.Linear(8, 2))


def corpus() -> list[bytes]:
    """A file of each layout that fits the network: three dialects of LoRA, one of them DoRA, and the base weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    attn = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    conv = "down_blocks.0.resnets.0.conv1"
    kohya: dict[str, Tensor] = {}
    dora: dict[str, Tensor] = {}
    peft: dict[str, Tensor] = {}
    for path in (f"{attn}.to_q", f"{attn}.to_out.0"):
        name = f"lora_unet_{path.replace('.', '_')}"
        kohya |= {f"{name}.lora_down.weight": draw(2, 8), f"{name}.lora_up.weight": draw(8, 2).half()}
        kohya |= {f"{name}.alpha": torch.tensor(1.0)}
        dora |= {f"{name}.lora_down.weight": draw(2, 8), f"{name}.lora_up.weight": draw(8, 2)}
        dora |= {f"{name}.dora_scale": draw(8, 1)}
        peft |= {f"unet.{path}.lora_A.weight": draw(2, 8), f"unet.{path}.lora_B.weight": draw(8, 2)}
    name = f"lora_unet_{conv.replace('.', '_')}"
    kohya |= {f"{name}.lora_down.weight": draw(2, 8, 3, 3), f"{name}.lora_up.weight": draw(8, 2, 1, 1)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}
    state = {key: draw(*value.shape) for key, value in base().state_dict().items()}
    ours = {"ss_network_dim": "2", "minisd.format_version": "1", "minisd.recipe": "{}", "minisd.targets": '["to_q"]'}
    return [
        safetensors.torch.save(kohya, metadata=ours),
        safetensors.torch.save(dora),
        safetensors.torch.save(peft, metadata=metadata),
        safetensors.torch.save(state),
    ]


def mutant(number: int, originals: list[bytes]) -> bytes:
    """The mutant of that number."""
    generator = random.Random(number)
    data = generator.choice(originals)
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        change = generator.choice((_in_header, _in_header, _in_header, _in_bytes, _in_values))
        data = change(generator, data)
    return data


def _in_header(generator: random.Random, data: bytes) -> bytes:
    """Change what the header says, and keep its form; sometimes the bodies move with it."""
    length = int.from_bytes(data[:8], "little")
    try:
        header: dict[str, Any] = json.loads(data[8 : 8 + length])
        keys = [key for key in header if key != "__metadata__"]
        key = generator.choice(keys)
        entry = header[key]
        kind = generator.randrange(9)
        if kind == 0:
            del header[key]
        elif kind == 1:
            header[generator.choice((*_NAMES, key.rpartition(".lora")[0] + generator.choice(_SUFFIXES)))] = header.pop(
                key
            )
        elif kind == 2:
            entry["dtype"] = generator.choice(_DTYPES)
        elif kind == 3:
            place = generator.randrange(len(entry["shape"]) + 1)
            entry["shape"][place : place + generator.randrange(2)] = [generator.choice(_NUMBERS)]
        elif kind == 4:
            entry["data_offsets"][generator.randrange(2)] = generator.choice((*_NUMBERS, generator.randrange(2000)))
        elif kind == 5:
            header.setdefault("__metadata__", {})[generator.choice(_METADATA)] = generator.choice((*_TEXTS, *_NUMBERS))
        elif kind == 6:
            other = generator.choice(keys)
            header[key], header[other] = header[other], header[key]
        elif kind == 7:
            header[key] = generator.choice((*_NUMBERS, {}, {"shape": entry.get("shape")}))
        else:
            copied = json.dumps({key: entry})[1:-1].encode()
            return _file(data[8 : 8 + length].rstrip().removesuffix(b"}") + b"," + copied + b"}", data[8 + length :])
        return _file(json.dumps(header).encode(), data[8 + length :])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return _in_bytes(generator, data)  # an earlier change has left no header


def _in_bytes(generator: random.Random, data: bytes) -> bytes:
    """Change bytes anywhere, most of them near the front; cut, lengthen, or splice."""
    kind, place = generator.randrange(6), min(generator.randrange(1 + len(data)), generator.randrange(1 + len(data)))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data + generator.randbytes(generator.choice((1, 8, 100)))
    if kind == 2:
        return data[:place] + generator.randbytes(generator.randrange(1, 9)) + data[place:]
    if kind == 3:
        return generator.choice((0, 1, 7, 10**6, 10**15, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    if kind == 4:
        return generator.choice((b"<html>", b"PK\x03\x04", b"\x80\x04", b"version https://git-lfs", b"")) + data[place:]
    changed = bytearray(data or b"\0")
    for _ in range(generator.choice((1, 1, 8))):
        changed[min(place, len(changed) - 1)] ^= 1 << generator.randrange(8)
        place = generator.randrange(len(changed))
    return bytes(changed)


def _in_values(generator: random.Random, data: bytes) -> bytes:
    """Put numbers that are none, or too large, into the bodies."""
    length = min(int.from_bytes(data[:8], "little"), len(data))
    room = len(data) - 8 - length
    if room < 4:
        return _in_bytes(generator, data)
    place = 8 + length + generator.randrange(room // 4) * 4
    number = generator.choice(
        (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\xff\x7b\xff\x7b", b"\0\0\0\0")
    )
    return data[:place] + number + data[place + 4 :]


def _file(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def load_carefully(path: Path) -> None:
    """Read a file as a LoRA, and as base weights; what is accepted must be sound."""
    refused = None
    try:
        lora = load_lora(path, {"unet": UNET})
        for layer, weights in lora.parts["unet"].items():
            assert weights.shape == tuple(UNET.get_submodule(layer).get_parameter("weight").shape)
            assert torch.isfinite(weights.product(torch.float64)).all()
    except WeightsError as error:
        refused = error
    try:
        fill(BASE, [path], lambda key: key, torch.float32, "cpu", complaint="it does not fit")
        assert all(parameter.isfinite().all() for parameter in BASE.parameters())
    except WeightsError as error:
        if refused is not None:
            for refusal in (refused, error):
                assert one_line(str(refusal)).isprintable()
                assert len(str(refusal)) < 5_000
            raise


def load_naively(path: Path) -> None:
    """What a reader does that trusts the file."""
    state = safetensors.torch.load(path.read_bytes())
    names = {key.partition(".lora_")[0] for key in state if ".alpha" not in key}
    changes = [state[f"{name}.lora_up.weight"].float() @ state[f"{name}.lora_down.weight"].float() for name in names]
    if not all(change.isfinite().all() for change in changes):
        raise AssertionError


UNET, BASE = unet(), base()


def run(folder: Path, load: Load, first: int, count: int) -> dict[str, Any]:
    """Try `count` mutants from number `first`."""
    originals, outcomes, wrong = corpus(), Counter[str](), []
    for number in range(first, first + count):
        path = folder / f"{number % 8}.safetensors"
        path.write_bytes(mutant(number, originals))
        try:
            load(path)
            outcomes["loaded"] += 1
        except WeightsError:
            outcomes["refused"] += 1
        except Exception as error:
            wrong.append(f"mutant {number}: {type(error).__name__}: {str(error)[:200]}")
    # Not getrusage: its maximum is that of the process that started this one, if that was larger.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) // 1024
    return {**outcomes, "wrong": wrong[:20], "number of wrong": len(wrong), "peak MiB": peak}


if __name__ == "__main__":
    loads: dict[str, Load] = {"careful": load_carefully, "naive": load_naively}
    print(json.dumps(run(Path(sys.argv[1]), loads[sys.argv[2]], int(sys.argv[3]), int(sys.argv[4]))))
