"""Limit the threads of numpy's matrix products.

OpenBLAS, the library behind these products, divides each product among one thread per CPU. These threads wait for each
other, so the product takes as long as its slowest thread, and while the engine uses the CPUs, this thread waits, too
(docs/decisions/0031-blas-threads.md). Vision tasks run in several threads anyway.
"""

from threadpoolctl import ThreadpoolController


def use_one_blas_thread() -> None:
    """Let each matrix product of numpy use one thread. faiss has its own BLAS library, which keeps its threads."""
    for library in ThreadpoolController().lib_controllers:
        if library.user_api == "blas" and "faiss" not in library.filepath:
            library.set_num_threads(1)
