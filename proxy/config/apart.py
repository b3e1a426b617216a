"""The settings, gathered and checked in a process of its own, which takes with it what only the checks need.

pydantic, PyYAML and cryptography hold some 20 MB; the gate would have them as long as it runs and never use them again.
A fork, because nothing about the program has to be found and read once more; while it has one thread and few modules.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from proxy.config.model import ConfigError, Settings


@dataclass(frozen=True, slots=True)
class Checked:
    """Settings that are right, lines about what is probably not meant, and when each certificate in use expires:
    {"server" or "ca": seconds since 1970}."""

    settings: Settings
    warnings: list[str]
    expiries: Mapping[str, float]


class CheckFailed(Exception):
    """The check itself came to no end: it has said why on stderr, or was killed."""


def load_apart(path: Path, overrides: Mapping[str, object]) -> Checked:
    """As `load`, in a child that is gone afterwards. Raises ConfigError as that does, and CheckFailed."""
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError:  # no process to be had: then here, at the cost of memory
        os.close(reader)
        os.close(writer)
        return _check(path, overrides)
    if child == 0:
        os.close(reader)
        _answer(writer, path, overrides)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise CheckFailed(f"the check of the settings ended with {os.waitstatus_to_exitcode(status)}")
    found = pickle.loads(answer)  # noqa: S301  (from our own child)
    if isinstance(found, Checked):
        return found
    raise ConfigError(found)


def _answer(writer: int, path: Path, overrides: Mapping[str, object]) -> None:
    """The child's part: ends the process, without anything that its parent will do at its own end."""
    status = 1
    try:
        try:
            found: Checked | list[str] = _check(path, overrides)
        except ConfigError as error:
            found = error.faults
        with open(writer, "wb") as pipe:
            pipe.write(pickle.dumps(found))
        status = 0
    except (KeyboardInterrupt, BrokenPipeError):
        pass  # whoever interrupts the parent as well, or has ended it, needs no trace
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(status)


def _check(path: Path, overrides: Mapping[str, object]) -> Checked:
    from proxy.config.check import expiries, warnings
    from proxy.config.load import load

    settings = load(path, overrides=overrides)
    return Checked(settings, warnings(settings), expiries(settings))
