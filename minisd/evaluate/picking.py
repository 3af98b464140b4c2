"""Which checkpoint, or which strength, is the best of several: a rule, and a sentence that says how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minisd.evaluate.judging import Figures

# Who has come this far from the base's style to the nearest that was reached is near enough.
NEAR_ENOUGH = 0.9


@dataclass(frozen=True)
class Choice:
    """The place of the pick among the candidates, and the reason as a sentence with the figures."""

    index: int
    why: str


def choose(
    base: Figures, candidates: Sequence[Figures], labels: Sequence[str], *, tolerance: float, number: str
) -> Choice:
    """Pick one of several, which stand in the order in which they depart from the base.

    The rule: (1) those whose pictures agree with their prompts, in the style's domain and outside it, as the base's do
    or at most `tolerance` less, and of which no more are copies of training pictures than of the base's; (2) of these
    the ones near enough to the style: NEAR_ENOUGH of the way from the base to the nearest of them; (3) of these the one
    with the lowest loss on held-out pictures, or without these the first. If none passes (1), the one with the fewest
    copies, then with the least loss of agreement.

    Args:
        base: figures of the model without adapter, under the names of judging.figure_kinds.
        candidates: at least one.
        labels: what each is called, such as "step 500".
        tolerance: as of a Judge.
        number: format of an agreement.
    """
    order = range(len(candidates))
    sound = [i for i in order if _lost(base, candidates[i]) <= tolerance and _copies(candidates[i]) <= _copies(base)]
    if not sound:
        index = min(order, key=lambda i: (_copies(candidates[i]), _lost(base, candidates[i])))
        kept = _kept(base, candidates[index], number)
        copies = f"{_copies(candidates[index]):.0%} copies"
        more = format(tolerance, number)
        each = f"all copy training pictures, or agree less with their prompts than the base does by more than {more}"
        return Choice(index, f"{each}; {labels[index]} is the least of these evils: {copies}, {kept}.")
    start, best = _style(base), max(_style(candidates[i]) for i in sound)
    enough = best - (1 - NEAR_ENOUGH) * max(0.0, best - start)
    near = [i for i in sound if _style(candidates[i]) >= enough]
    ratios = [candidates[i].get("held_out_ratio") for i in near]
    known = [ratio for ratio in ratios if ratio is not None]
    index = near[ratios.index(min(known))] if len(known) == len(near) else near[0]
    reasons = [
        f"nearness to the style {_style(candidates[index]):.3f}, where the base has {start:.3f} and the most of "
        f"those that follow their prompts {best:.3f}",
        _kept(base, candidates[index], number),
        "no copies" if _copies(candidates[index]) == 0 else f"{_copies(candidates[index]):.0%} copies as of the base",
    ]
    if len(near) > 1 and len(known) == len(near):
        reasons.append(f"of {len(near)} like it the lowest loss on held-out pictures, {min(known):.3f} of the base's")
    elif len(near) > 1:
        reasons.append(f"of {len(near)} like it the first")
    if best <= start:
        reasons.append("but none is nearer to the style than the base is")
    return Choice(index, f"{labels[index]}: {'; '.join(reasons)}.")


def _lost(base: Figures, figures: Figures) -> float:
    """How much less agreement there is than the base has, where it lost most; below 0 if it gained."""
    pairs = [(base[name], figures[name]) for name in ("agreement", "outside_agreement")]
    lost = [round(before - after, 6) for before, after in pairs if before is not None and after is not None]
    return max(lost, default=0.0)


def _kept(base: Figures, figures: Figures, number: str) -> str:
    """The agreement in words."""
    said = [
        f"{where} {format(after, number)}, the base {format(before, number)}"
        for name, where in (("agreement", "in the domain"), ("outside_agreement", "outside it"))
        if (before := base[name]) is not None and (after := figures[name]) is not None
    ]
    return f"agreement with prompts {'; '.join(said)}" if said else "agreement with prompts not measured"


def _style(figures: Figures) -> float:
    return figures["style"] or 0.0


def _copies(figures: Figures) -> float:
    return figures["copies"] or 0.0
