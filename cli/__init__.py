"""The command line `dinov2`. Each module has one group of commands.

A command imports the packages that it needs when it runs. So `dinov2 serve` works without torch, and `dinov2 --help` is
fast.
"""

import typer

from cli import collection, engines, evaluate, export, search, serving, training

app = typer.Typer(
    name="dinov2",
    rich_markup_mode=None,  # rich would read [train] as markup
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="DINOv2 image features: train a checkpoint, export it, serve it, embed folders with it, search.",
)
for command in (
    serving.serve,
    serving.embed,
    search.index,
    search.search,
    training.train,
    training.compare,
    training.average,
    training.report,
    export.export,
    serving.models,
):
    app.command()(command)
app.add_typer(collection.app, name="collections")
app.command("eval")(evaluate.evaluate)
app.command("build-engine")(engines.build_engine)


def main() -> None:
    """Entry point of the console script."""
    app()
