"""The command line `dinov2`. Each module of this package defines a group of commands.

A command imports the packages that it needs only when it runs. Therefore `dinov2 serve` works without torch, and
`dinov2 --help` is fast.
"""

import os
import sys

import typer

from cli import (
    backup,
    classify,
    collection,
    curate,
    engines,
    evaluate,
    export,
    find_region,
    heads,
    jobs,
    keys,
    models,
    originals,
    retrain,
    search,
    serving,
    train_head,
    training,
    verify,
    worker,
)
from cli.shared import fail
from cli.vision import Commands

app = typer.Typer(
    name="dinov2",
    cls=Commands,
    rich_markup_mode=None,  # rich would read [train] as markup
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback(
    help="DINOv2 image features: train, export and serve models, embed images, and search for similar images."
)
def check_environment() -> None:
    """Refuse unknown environment variables named DINOV2_* before any command runs, so that a typo is not ignored."""
    if any(name.upper().startswith("DINOV2_") for name in os.environ) and "--help" not in sys.argv:
        from service.settings import check_names

        try:
            check_names()
        except ValueError as error:
            raise fail(error) from error


for command in (
    serving.serve,
    serving.embed,
    search.index,
    search.search,
    classify.classify,
    find_region.find_region,
    backup.backup,
    backup.restore,
    curate.curate,
    training.train,
    training.compare,
    training.average,
    training.report,
    export.export,
    models.reindex,
    retrain.retrain,
    verify.verify,
    train_head.train_head,
    worker.worker,
):
    app.command()(command)
app.add_typer(collection.app, name="collections")
app.add_typer(curate.app, name="curation")
app.add_typer(heads.app, name="heads")
app.add_typer(keys.app, name="keys")
app.add_typer(models.app, name="models")
app.add_typer(originals.app, name="originals")
app.add_typer(jobs.app, name="jobs")
app.command("eval")(evaluate.evaluate)
app.command("build-engine")(engines.build_engine)


def main() -> None:
    """Run the command line. The console script `dinov2` calls this function."""
    app()
