"""The embedded backend as a child process: started, watched and started again by the gate.

It is an upstream like any other, behind a unix socket in a folder that only this user can enter. The child ends
when its standard input does, so that it never outlives a gate that was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sys
import tempfile
from pathlib import Path

from proxy.config.model import Address, Backend
from proxy.spawn import spawn

_log = logging.getLogger("tensorgate")

_FIRST_BACKOFF = 0.2
_LAST_BACKOFF = 10.0
_STABLE_SECONDS = 30.0
_STOP_SECONDS = 5.0


class EmbeddedBackend:
    """`address` is where it listens, from `start` on."""

    def __init__(self, repository: Path, settings: Backend, log_level: str) -> None:
        self._repository = repository
        self._settings = settings
        self._log_level = log_level
        self._folder = Path(tempfile.mkdtemp(prefix="tensorgate-"))  # mode 0700
        self.address = Address(path=str(self._folder / "backend.sock"))
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process; what becomes of it is seen by who connects to `address`."""
        await self._launch()
        self._watch = spawn(self._keep_running(), "embedded backend")

    async def stop(self, hurry: bool) -> None:
        """End it: it is asked to, and killed if it doesn't in time, or at once in a hurry."""
        if self._watch is not None:
            self._watch.cancel()
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 0 if hurry else _STOP_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _launch(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # a folder named `proxy` where the gate was started must not be taken for this package
            "-m",
            "proxy",
            "backend",
            str(self._repository),
            "--listen",
            str(self.address),
            "--exit-on-stdin-eof",
            "--log-level",
            self._log_level,
            *_flags(self._settings),
            stdin=asyncio.subprocess.PIPE,
            # Ctrl-C and a service manager's signal go to the whole group: the gate drains first and then ends it.
            start_new_session=True,
        )

    async def _keep_running(self) -> None:
        """Start it again whenever it ends, with backoff while it doesn't stay up."""
        loop = asyncio.get_running_loop()
        backoff = _FIRST_BACKOFF
        while True:
            assert self._process is not None
            started = loop.time()
            code = await self._process.wait()
            if loop.time() - started > _STABLE_SECONDS:
                backoff = _FIRST_BACKOFF
            _log.error("the embedded backend ended (%s); starting it again in %.1f s", _exit(code), backoff)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, _LAST_BACKOFF)
            try:
                await self._launch()
            except OSError as error:  # no memory, no file descriptor: perhaps later
                _log.error("the embedded backend can't be started: %s", error)


def _flags(settings: Backend) -> list[str]:
    """The settings as flags of `tensorgate backend`."""
    flags = [
        f"--model-control-mode={settings.model_control_mode}",
        f"--repository-poll-secs={settings.repository_poll!r}",
        # In one word each: a name may begin with a dash.
        *(f"--load-model={name}" for name in settings.load_models),
    ]
    if settings.metrics is not None:
        flags.append(f"--metrics={settings.metrics}")
        if not settings.metrics.is_loopback:
            # Opens nothing else: the other address is a unix socket in a folder of this user's.
            flags.append("--insecure-any-address")
    if settings.memory_limit_bytes is not None:
        flags.append(f"--memory-limit-bytes={settings.memory_limit_bytes}")
    return flags


def _exit(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
