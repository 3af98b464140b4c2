"""OUTPUT/report.html from what is known of a run."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from minisd import html_page
from minisd.errors import one_line
from minisd.report import facts, views
from minisd.report.commands import repeat_training
from minisd.report.evaluation import Evaluation
from minisd.report.pictures import Dataset, bucket_counts
from minisd.report.run_files import RunFiles

_HERE = Path(__file__).resolve().parent
_THUMBNAIL = 176


def render(run: RunFiles, evaluation: Evaluation | None) -> str:
    """The page. Reads the pictures of the run and of its dataset."""
    dataset = Dataset(run.config, list(run.buckets), run.held_out)
    script, style = (_HERE.joinpath(f"report.{kind}").read_text(encoding="ascii") for kind in ("js", "css"))
    state, state_kind = facts.state(run)
    return (
        html_page.environment(_HERE)
        .get_template("report.html.jinja")
        .render(
            policy=html_page.policy(script, style),
            script=script,
            style=style,
            title=one_line(run.name)[:120],
            state=state,
            state_kind=state_kind,
            error=run.error,
            sentence=facts.sentence(run.config),
            written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
            tiles=facts.tiles(run, len(dataset), dataset.held_out, None if evaluation is None else evaluation.pick),
            along=views.along_run(run),
            charts=facts.charts(run),
            evaluation=evaluation,
            checkpoints=None if evaluation is None else views.checkpoint_table(run, evaluation),
            sweep=None if evaluation is None else views.sweep_table(run, evaluation),
            likenesses=[] if evaluation is None else views.likenesses(run, evaluation, dataset),
            pictures=dataset.shown(_THUMBNAIL),
            all_pictures=len(dataset),
            held_out=dataset.held_out,
            problem=dataset.problem,
            captions=facts.captions_in_words(dataset.captions),
            buckets=bucket_counts(run.buckets),
            mean_crop=facts.mean_crop(run),
            options=facts.options(run.config),
            machine=facts.machine(run),
            again=repeat_training(run),
        )
    )
