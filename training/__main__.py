"""Train a model from the command line: `python -m training --data FOLDER --recipe NAME --out DIR key=value ...`"""

import argparse
import sys
from pathlib import Path

from training.ending import STOPPED_STATUS, Interrupted, RunStopped
from training.recipe import check_recipe, load_config, recipe_names, with_hours
from training.train import dry_run, train


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training", description="Train DINOv2 on a folder of images.")
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        help="folder of images, tar shards (also as a URL) or Hugging Face dataset; repeat it for several sources",
    )
    parser.add_argument("--recipe", help=f"a TOML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints and logs; a run in this folder is resumed"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the recipe")
    parser.add_argument(
        "--hours",
        type=float,
        help="approximate time for the run; the epochs follow from a trial",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the estimated time, memory and disk space only")
    arguments = parser.parse_intermixed_args()
    try:
        overrides = with_hours(arguments.overrides, arguments.hours)
        config = load_config(check_recipe(arguments.recipe), arguments.data, arguments.out, overrides)
        (dry_run if arguments.dry_run else train)(config)
    except (ValueError, OSError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return STOPPED_STATUS if isinstance(error, RunStopped) else 2
    except KeyboardInterrupt:
        print("stopped at once by a second Ctrl-C; steps since the last saved state are lost", file=sys.stderr)
        return 130
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return interrupted.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
