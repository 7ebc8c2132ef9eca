"""Import pyarrow only when a Parquet file is read or written."""

from typing import Any


def need_parquet() -> Any:
    """Import the module pyarrow.parquet and return it.

    Raises:
        ModuleNotFoundError: pyarrow is not installed. The message explains how to install it.
    """
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Parquet files need pyarrow: python -m pip install pyarrow", name="pyarrow"
        ) from error
    return pyarrow.parquet
