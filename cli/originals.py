"""The command `dinov2 originals erase`, which erases stored images."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli.shared import DATA, DataDirOption, StoreOption, fail, run_with

if TYPE_CHECKING:
    from service.erasure import Erased, Unreferenced
    from service.search.store import VectorStore
    from service.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Erase stored images.")


@app.callback()
def originals() -> None:
    """Keep `erase` a subcommand. A group with only one command would otherwise become that command."""


@app.command()
def erase(
    digest: Annotated[
        str | None, typer.Argument(metavar="[SHA256]", help="The sha256 of the image, as items show it in `digest`.")
    ] = None,
    unreferenced: Annotated[
        bool,
        typer.Option(
            "--unreferenced",
            help="Erase all images to which no item of any collection refers, except those that were stored within "
            "the last 24 hours.",
        ),
    ] = False,
    items: Annotated[
        Literal["refuse", "keep", "delete"],
        typer.Option(
            help="What to do if items refer to the image: refuse to erase it, keep the items without it, or delete "
            "them too."
        ),
    ] = "refuse",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --unreferenced: only count the images, and erase nothing.")
    ] = False,
    data_dir: DataDirOption = DATA,
    store: StoreOption = None,
) -> None:
    """Erase one stored image, or all images that no item needs. The service may keep running. The patch
    features of an image are erased too, but snapshots, backups and cached vectors are not."""
    if (digest is None) != unreferenced:
        raise fail("give either the sha256 of an image or --unreferenced")
    if dry_run and not unreferenced:
        raise fail("--dry-run needs --unreferenced")
    if digest is None:
        _erase_unreferenced(data_dir, store, dry_run)
        return

    async def work(vectors: "VectorStore", settings: "Settings") -> "Erased":
        from service.erasure import erase_image
        from service.features.patch_store import patch_store_of
        from service.originals import Originals

        with closing(patch_store_of(settings)) as patches:
            return await erase_image(vectors, Originals(settings.originals_place), patches, digest.lower(), items)

    erased = run_with(store, data_dir, work)
    for reference in erased.items:
        what = "deleted" if items == "delete" else "has no image now"
        typer.echo(f"{reference.collection}: {reference.id} {what}")
    typer.echo(f"erased the image {erased.digest}, {erased.bytes} bytes")


def _erase_unreferenced(data_dir: Path, store: str | None, dry_run: bool) -> None:
    async def work(vectors: "VectorStore", settings: "Settings") -> "Unreferenced":
        from service.erasure import erase_unreferenced
        from service.features.patch_store import patch_store_of
        from service.originals import Originals

        with closing(patch_store_of(settings)) as patches:
            return await erase_unreferenced(vectors, Originals(settings.originals_place), patches, only_count=dry_run)

    found = run_with(store, data_dir, work)
    said = "would be erased" if dry_run else "erased"
    typer.echo(f"{found.images} {'image' if found.images == 1 else 'images'} {said}, {found.bytes} bytes")
