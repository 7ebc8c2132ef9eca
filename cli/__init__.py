"""The command line `dinov2`. Each module of this package defines a group of commands.

A command imports the packages that it needs only when it runs. Therefore `dinov2 serve` works without torch, and
`dinov2 --help` is fast.
"""

import typer

from cli import collection, engines, evaluate, export, search, serving, training

app = typer.Typer(
    name="dinov2",
    rich_markup_mode=None,  # rich would read [train] as markup
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="DINOv2 image features: train, export and serve models, embed images, and search for similar images.",
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
    """Run the command line. The console script `dinov2` calls this function."""
    app()
