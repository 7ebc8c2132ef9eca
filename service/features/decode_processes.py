"""Decode images in processes that can be killed.

A decoder written in C can hold the interpreter's lock for as long as it works, crash, or never end. The formats in
`ISOLATED` are therefore decoded by `service/features/decode_child.py`, in processes with limits on memory and processor
time (docs/decisions/0044-decoding-hostile-images.md). A process that dies costs only its image, which gets one more try
in a new process.

Processes start when they are needed, so a service that gets no such images has none. At most as many run as threads
decode. They end when they have nothing to do, and with the service.
"""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import Pipe
from pathlib import Path
from typing import Final

import numpy as np

from model.decode import Broken, DecodeError, DecodeLimits, OnMemory, OnSize, Pixels, TooLarge
from service.features.decode_child import CPU_S, error_from

log = logging.getLogger(__name__)
ISOLATED: Final = frozenset({"AVIF", "HEIC", "TIFF"})
"""Formats that are decoded in processes. The decision page says why."""
WALL_S: Final = 60.0
"""Time for one image, in seconds. It is only reached if the machine is busy, or if the decoder sleeps."""
_COMMAND: Final = (sys.executable, "-m", "service.features.decode_child")
_ROOT: Final = Path(__file__).resolve().parents[2]
_PASSED_ON: Final = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME")  # no setting, so no secret
_OWN: Final = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER": "20",  # JPEG data in a TIFF; its own limit of 100 scans takes 5 s
}


class _Died(Exception):
    """The error for a process that ended. `reason` is "crash", "time" (it was ended for the time that it took), or
    "idle" (it ended by itself, just when it got an image)."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"the process that decoded the image ended with status {status}")
        self.reason = reason


class _Process:
    """A process that decodes one image at a time."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        self._file = _open_file()
        self._is_late = False  # whether it was ended because an image took too long
        command = [*_COMMAND, str(theirs.fileno()), str(self._file)]
        environment = {name: value for name, value in os.environ.items() if name in _PASSED_ON}
        try:
            self._process = subprocess.Popen(  # noqa: S603  a constant command
                command,
                env={**environment, **_OWN, "PYTHONPATH": str(_ROOT)},
                pass_fds=(theirs.fileno(), self._file),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libtiff writes what files make it write
                start_new_session=True,  # Ctrl+C ends the service, which then ends this process
            )
        except BaseException:
            os.close(self._file)
            raise
        theirs.close()
        threading.Thread(target=self._process.wait, name="decode-process", daemon=True).start()  # or it stays a zombie

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def decode(self, data: bytes, limits: DecodeLimits, on_size: OnSize | None, on_memory: OnMemory | None) -> Pixels:
        """Decode an image as `model.decode.decode` does.

        Raises:
            _Died: the process ended.
        """
        hooks = {"size": on_size, "memory": on_memory}
        stopped: BaseException | None = None
        timer = threading.Timer(WALL_S, self._end_late)
        timer.start()
        try:
            self._connection.send_bytes(json.dumps(asdict(limits)).encode())
            self._connection.send_bytes(data)
            while "ask" in (answer := json.loads(self._connection.recv_bytes())):
                stopped = stopped or _raised_by(hooks[answer["ask"]], answer["value"])
                self._connection.send_bytes(b"stop" if stopped else b"go")
        except (EOFError, OSError) as error:
            status = self._process.wait(WALL_S)
            reason = "time" if self._is_late else {0: "idle", -signal.SIGXCPU: "time"}.get(status, "crash")
            raise _Died(status, reason) from error
        finally:
            timer.cancel()
        if stopped is not None:
            raise stopped
        if "error" in answer:
            raise error_from(answer)
        try:
            return self._pixels(answer["shape"], limits)
        finally:
            os.ftruncate(self._file, 0)

    def _end_late(self) -> None:
        self._is_late = True
        self._process.kill()

    def _pixels(self, shape: tuple[int, int, int], limits: DecodeLimits) -> Pixels:
        if not 0 < math.prod(shape) <= 3 * limits.max_pixels:
            raise Broken("the process that decoded the image stated a wrong size")
        pixels = np.empty(shape, np.uint8)
        view, done = pixels.data.cast("B"), 0
        while done < len(view):
            n_read = os.preadv(self._file, [view[done:]], done)
            if not n_read:
                raise Broken("the process that decoded the image wrote too few pixels")
            done += n_read
        return pixels

    def end(self) -> None:
        """End the process, whatever it does."""
        self._connection.close()
        self._process.kill()
        self._process.wait()
        os.close(self._file)


def _raised_by(hook: Callable[..., None] | None, values: list[int]) -> BaseException | None:
    """Call a hook, and return the error that it raised."""
    try:
        if hook is not None:
            hook(*values)
    except DecodeError as error:
        return error
    return None


def _open_file() -> int:
    """Open a file in memory that has no name, and return its number."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("decoded pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class DecodeProcesses:
    """Processes that decode images. Any thread may use them. `on_death` is called with the reason when one of them ends
    while it decodes: "crash" or "time"."""

    def __init__(self, on_death: Callable[[str], None] = lambda reason: None) -> None:
        self._on_death = on_death
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._is_closed = False

    @property
    def pids(self) -> list[int]:
        """The ids of the processes."""
        with self._lock:
            return [process.pid for process in (*self._idle, *self._busy)]

    def decode(
        self,
        data: bytes,
        limits: DecodeLimits,
        *,
        on_size: OnSize | None = None,
        on_memory: OnMemory | None = None,
    ) -> Pixels:
        """Decode an image as `model.decode.decode` does. If the process dies, try once more; then the hooks are called
        again.

        Raises:
            TooLarge, Unsupported, Broken: as `model.decode.decode`. TooLarge also if decoding takes too long, and
                Broken if the process dies twice.
        """
        for _ in range(2):
            process = self._take()
            try:
                pixels = process.decode(data, limits, on_size, on_memory)
            except _Died as died:
                self._drop(process)
                if died.reason != "idle":
                    self._on_death(died.reason)
                    log.warning("%s (%s)", died, died.reason)
                if died.reason == "time":
                    raise TooLarge(f"decoding the image takes more than {CPU_S} seconds of processor time") from died
            except DecodeError:
                self._put_back(process)
                raise
            except BaseException:
                self._drop(process)
                raise
            else:
                self._put_back(process)
                return pixels
        raise Broken("the image is damaged: the decoder crashed twice")

    def close(self) -> None:
        """End all processes. Images that are being decoded fail."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for process in self._busy:
                os.kill(process.pid, signal.SIGKILL)  # the thread that waits for it cleans up
        for process in idle:
            process.end()

    def _take(self) -> _Process:
        while True:
            with self._lock:
                if self._is_closed:
                    raise Broken("the service is stopping")
                process = self._idle.pop() if self._idle else None
            if process is None or process.is_alive:
                break
            process.end()  # it ended because it was idle
        process = process or _Process()
        with self._lock:
            self._busy.add(process)
        return process

    def _put_back(self, process: _Process) -> None:
        with self._lock:
            self._busy.discard(process)
            if not self._is_closed:
                self._idle.append(process)
                return
        process.end()

    def _drop(self, process: _Process) -> None:
        with self._lock:
            self._busy.discard(process)
        process.end()
