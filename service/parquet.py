"""pyarrow, which only Parquet files need: imported when one is read or written."""

from typing import Any


def need_parquet() -> Any:
    """The module pyarrow.parquet.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what to install.
    """
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Parquet files need pyarrow: python -m pip install pyarrow", name="pyarrow"
        ) from error
    return pyarrow.parquet
