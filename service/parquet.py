"""Import pyarrow, only when a Parquet file is read or written."""

from typing import Any


def need_parquet() -> Any:
    """Import and return the module pyarrow.parquet.

    Raises:
        ModuleNotFoundError: pyarrow is not installed. The message says how to install it.
    """
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Parquet files need pyarrow: python -m pip install pyarrow", name="pyarrow"
        ) from error
    return pyarrow.parquet
