"""Checks that the process may open enough files: each connection needs a file descriptor, and so do the files of the
collections, the cache, and the connections to other servers. A process without free descriptors could neither accept
connections nor store anything."""

import resource
from typing import Final

FOR_FILES: Final = 512
"""The number of descriptors that are left for everything other than clients' connections."""


def check_descriptors(connections: int) -> None:
    """Raise the limit of open files of this process, if it is too low for this number of connections.

    Raises:
        ValueError: the operating system does not allow so many.
    """
    needed = connections + FOR_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"max_connections={connections} needs {needed} open files, and this process may open {hard}: raise the "
            f"limit (ulimit -n, LimitNOFILE or ulimits: nofile), or set DINOV2_MAX_CONNECTIONS to at most "
            f"{max(1, hard - FOR_FILES)}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
