"""What the page of a run says in words and numbers: state, recipe, data, machine, curves."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from minisd.config import TrainConfig
from minisd.lora_info import public_name
from minisd.report.curves import Chart, Line, make_chart
from minisd.report.run_files import Points, RunFiles

# Options that are about this machine, or about where the result goes, and not about the run.
_NOT_SHOWN = {"output", "cache_dir", "debug", "preflight", "resume_from_checkpoint", "allow_change", "report",
              "report_to", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_license"}  # fmt: skip
_TARGETS = {"attn": "attention projections", "attn+ff": "attention projections and feed-forward layers",
            "all": "attention projections, feed-forward layers and convolutions"}  # fmt: skip
_STATES = {
    "complete": ("complete", "good"),
    "running": ("running", "live"),
    "stopped": ("stopped; the same command goes on", "warn"),
    "ended": ("killed; the same command goes on", "warn"),
    "failed": ("failed", "bad"),
    "unknown": ("not complete", "warn"),
}


@dataclass(frozen=True)
class Tile:
    """A number to see first. `kind`: "", "good" or "warn"."""

    label: str
    value: str
    more: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Option:
    """An option of the run, as it would be typed, and its default if that is another."""

    name: str
    value: str
    default: str
    is_changed: bool


def state(run: RunFiles) -> tuple[str, str]:
    """How the run stands, and the kind of the mark."""
    words, kind = _STATES[run.state]
    if run.state == "complete":
        return f"complete after {run.step:,} steps", kind
    of = "" if run.total_steps is None else f" of {run.total_steps:,}"
    return f"{words} (step {run.step:,}{of})", kind


def sentence(config: TrainConfig) -> str:
    """What was trained, in a sentence."""
    scale = f"alpha / rank {config.scale_alpha / config.rank:g}"
    trigger = "" if config.trigger is None else f", called up by \u201c{config.trigger}\u201d"
    return f"A LoRA of rank {config.rank} ({scale}) in the {_TARGETS[config.lora_targets]} of " + (
        f"{public_name(config.model)}{trigger}."
    )


def tiles(run: RunFiles, pictures: int, held_out: int, pick: int | None) -> list[Tile]:
    """The numbers to see first."""
    found = [Tile("steps", f"{run.step:,}", "" if run.total_steps in (None, run.step) else f"of {run.total_steps:,}")]
    if points := run.metrics.get("loss_average"):
        found.append(Tile("loss, averaged", f"{points[-1][1]:.4f}"))
    ratios = {probe: points[-1][1] for probe, bands in run.validation.items() if (points := bands.get("ratio"))}
    if "held_out" in ratios:
        ratio = ratios["held_out"]
        more = f"trained {ratios['train']:.3f}" if "train" in ratios else ""
        found.append(Tile("held-out loss, relative to the base", f"{ratio:.3f}", more,
                          "good" if ratio < 1 else "warn"))  # fmt: skip
    found.append(Tile("training pictures", f"{pictures - held_out:,}", f"+ {held_out} held out" if held_out else ""))
    if pick is not None:
        found.append(Tile("checkpoint picked", f"{pick:,}", "steps", "good"))
    if points := run.metrics.get("seconds"):
        found.append(Tile("time in steps", duration(sum(value for _, value in points))))
    return found


def charts(run: RunFiles) -> list[Chart]:
    """The curves, those with points."""
    end = run.step if run.state == "complete" or run.total_steps is None else run.total_steps
    metrics, validation = run.metrics, run.validation

    def probes(name: str) -> list[Line]:
        both = (("training pictures", "train", "train"), ("held-out pictures", "held-out", "held_out"))
        return [Line(title, kind, validation[probe].get(name, [])) for title, kind, probe in both]

    wanted = [
        make_chart("Loss", _loss(metrics.get("loss", []), metrics.get("loss_average", [])), end),
        make_chart("Loss relative to the base", probes("ratio"), end, level=1.0,
                   note="below 1 it has learnt; a widening gap is memorising"),
        *(
            make_chart(title, probes(str(band)), end, level=1.0, note=note, is_minor=True)
            for band, (title, note) in enumerate(_bands(run))
        ),
        make_chart("Learning rate", [Line("learning rate", "plain", metrics.get("lr", []))], end),
        make_chart("Gradient norm", [Line("gradient norm", "plain", metrics.get("grad_norm", []))], end,
                   note="before clipping"),
    ]  # fmt: skip
    return [chart for chart in wanted if chart is not None]


def _loss(raw: Points, average: Points) -> list[Line]:
    return [Line("each step", "raw", raw), Line("average", "average", average)]


def _bands(run: RunFiles) -> list[tuple[str, str]]:
    """Title and note of the chart of each band of timesteps, from little noise to most."""
    ends = run.probe.get("bands")
    names = ("Little noise", "Some noise", "Much noise", "Most noise")
    if not isinstance(ends, list) or len(ends) != len(names):
        return [(name, "") for name in names]
    notes = [f"timesteps {one[0]}\u2013{one[1]}" if isinstance(one, list) and len(one) == 2 else "" for one in ends]
    return list(zip(names, notes, strict=True))


def options(config: TrainConfig) -> list[Option]:
    """The options of a run in the order of their definition, paths without their folders."""
    found = []
    for field in fields(config):
        if field.name not in _NOT_SHOWN:
            value, default = getattr(config, field.name), field.default
            known = "" if default is MISSING or default in (None, ()) else _text(default)
            name = f"--{field.name.replace('_', '-')}"
            found.append(Option(name, _text(value), known, default is MISSING or value != default))
    return found


def machine(run: RunFiles) -> list[tuple[str, str]]:
    """Where the run was computed and how fast, as far as it has noted that: name and value."""
    progress, metrics = run.progress, run.metrics
    facts: list[tuple[str, str]] = []
    for key, name in {"device_name": "device", "device": "device", "world_size": "processes", "threads": "CPU threads",
                      "torch": "torch"}.items():  # fmt: skip
        if key in progress and name not in dict(facts):
            facts.append((name, str(progress[key])[:80]))
    if points := metrics.get("images_per_second"):
        facts.append(("speed", f"{statistics.median(value for _, value in points):.3g} pictures a second"))
    if points := metrics.get("seconds"):
        seconds = [value for _, value in points]
        facts.append(("a step takes", f"{statistics.median(seconds):.3g} s"))
        facts.append(("all steps", duration(sum(seconds))))
    if points := metrics.get("images_seen"):
        facts.append(("pictures seen", f"{points[-1][1]:,.0f}"))
    if points := metrics.get("memory_gb"):
        facts.append(("most memory", f"{max(value for _, value in points):.2f} GB"))
    if (points := metrics.get("skipped")) and points[-1][1]:
        facts.append(("steps skipped", f"{points[-1][1]:.0f} (float16 overflow)"))
    return facts


def captions_in_words(captions: Sequence[str]) -> str:
    """How long the captions are, and how many are empty or said twice."""
    if not captions:
        return ""
    lengths = [len(caption.split()) for caption in captions]
    words = f"{min(lengths)} to {max(lengths)} words, median {statistics.median(lengths):g}"
    empty = sum(not length for length in lengths)
    twice = sum(count for count in Counter(captions).values() if count > 1)
    more = [f"{empty} empty" if empty else "", f"{twice} share theirs with another" if twice else ""]
    return "; ".join([words, *filter(None, more)])


def mean_crop(run: RunFiles) -> str:
    """How much of a picture is cut away on average; "" if it is not known."""
    shares = []
    for row in run.buckets.values():
        try:
            shares.append(float(row.get("cropped_share", "")))
        except ValueError:
            continue
    return f"{statistics.fmean(shares):.1%}" if shares else ""


def duration(seconds: float) -> str:
    """A time in words, two units of it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s"


def _text(value: Any) -> str:
    """An option's value as it would be typed; of a path that is not relative, the last part."""
    if value is None or value == ():
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "\n".join(map(str, value))
    if isinstance(value, float):
        return str(value)
    path = Path(str(value))
    if path.is_absolute() or str(value).startswith("~") or ".." in path.parts:
        return path.name
    return str(value)
