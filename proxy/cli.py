"""The command `tensorgate`: reads the command line, calls what it asks for, and turns the outcome into an exit code.

0: clean; 1: failed while running; 2: wrong command line; 78: wrong settings (all faults are listed, nothing starts).
What a command needs is imported when it runs, so that `check` and `certs` work without the extras.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from proxy import __version__

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

OK, FAILED, USAGE, CONFIG = 0, 1, 2, 78

_BACKEND_PACKAGES = ("numpy", "onnxruntime", "google.protobuf")
_PACKAGES = {"backend": _BACKEND_PACKAGES, "demo": (*_BACKEND_PACKAGES, "grpc", "tritonclient")}
_LEVELS = ("debug", "info", "warning", "error")
_EPILOG = """exit codes: 0 clean, 1 runtime failure, 2 usage, 78 configuration
try it:     tensorgate demo"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` is without the program's name (default: the process's own)."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `tensorgate check … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _say(lines: Sequence[str]) -> None:
    print("\n".join(lines), flush=True)


def _complain(lines: Sequence[str]) -> None:
    print("\n".join(lines), file=sys.stderr, flush=True)


# serve and check


def _serve(arguments: argparse.Namespace) -> int:
    from proxy.config.apart import CheckFailed, load_apart
    from proxy.config.model import ConfigError
    from proxy.config.ports import port_faults

    overrides = {
        "grpc_port": arguments.grpc_port,
        "host": arguments.host,
        "admin.address": arguments.admin_address,
        "log.level": arguments.log_level,
    }
    try:
        checked = load_apart(arguments.config, overrides)
        faults = port_faults(checked.settings)
    except ConfigError as error:
        faults = error.faults
    except CheckFailed as failure:
        _complain([f"tensorgate: {failure}; nothing was started"])
        return FAILED
    if faults:
        return _refuse(arguments.config, faults, "nothing was started")
    if checked.settings.model_repository_path is not None and _lacks_extra("backend", "model_repository_path"):
        return FAILED
    from proxy.app import serve

    return serve(checked)


def _check(arguments: argparse.Namespace) -> int:
    from proxy.config.check import warnings
    from proxy.config.load import resolve
    from proxy.config.model import ConfigError
    from proxy.config.report import lines

    try:
        loaded = resolve(arguments.config)
    except ConfigError as error:
        return _refuse(arguments.config, error.faults, "it would not start")
    _say(lines(arguments.config, loaded, warnings(loaded.settings)))
    return OK


def _refuse(path: Path, faults: list[str], consequence: str) -> int:
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    _complain([f"tensorgate: {count} in the settings ({path}); {consequence}", *(f"  {fault}" for fault in faults)])
    return CONFIG


# backend and demo


def _backend(arguments: argparse.Namespace) -> int:
    from proxy.config.model import Address

    addresses: dict[str, Address | None] = {}
    for name in ("listen", "http", "metrics"):
        text = getattr(arguments, name)
        try:
            addresses[name] = found = None if text is None else Address.parse(text)
        except ValueError as fault:
            return _usage(f"--{name} {text!r} {fault}")
        if found is not None and not found.is_loopback and not arguments.insecure_any_address:
            return _usage(
                f"--{name} {found}: the backend speaks plaintext to anybody who reaches it, and other machines can "
                "reach this address; listen on 127.0.0.1 or unix:/PATH, or add --insecure-any-address"
            )
    given = [address for address in addresses.values() if address is not None]
    taken = [str(address) for address in given if address.is_unix or address.port]
    if twice := [address for address in taken if taken.count(address) > 1]:
        return _usage(f"{twice[0]} is given twice; give --listen, --http and --metrics an address each")
    if arguments.load_model and arguments.model_control_mode != "explicit":
        return _usage("--load-model is for --model-control-mode explicit; in other modes all models are loaded")
    if not arguments.repository.is_dir():
        return _usage(f"{arguments.repository}: is not a folder; give a folder with one folder per model")
    if _lacks_extra("backend", "tensorgate backend"):
        return FAILED
    from proxy.backend.control import Control
    from proxy.backend.server import Options, run

    assert addresses["listen"] is not None
    return run(
        Options(
            arguments.repository,
            addresses["listen"],
            addresses["http"],
            addresses["metrics"],
            Control(arguments.model_control_mode, arguments.repository_poll_secs, arguments.load_model),
            arguments.memory_limit_bytes,
            arguments.exit_on_stdin_eof,
            arguments.log_level,
        )
    )


def _demo(arguments: argparse.Namespace) -> int:
    if _lacks_extra("demo", "tensorgate demo"):
        return FAILED
    from proxy.demo import run

    return run(folder=arguments.dir, port=arguments.port, once=arguments.once)


def _lacks_extra(extra: str, what: str) -> bool:
    """True, with one line on stderr, when a package of an extra is not installed."""
    # Looked for and not imported: the gate's own process must stay free of them.
    lacking = [package for package in _PACKAGES[extra] if not _is_installed(package)]
    if lacking:
        names = ", ".join(lacking)
        _complain([f"tensorgate: {what} needs packages that are not here ({names}): pip install 'tensorgate[{extra}]'"])
    return bool(lacking)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # raised for "google.protobuf" when there is no "google" either
        return False


def _usage(message: str) -> int:
    _complain([f"tensorgate: {message}"])
    return USAGE


# certs


def _certs_init(arguments: argparse.Namespace) -> int:
    from proxy.tls import pki

    def make() -> list[str]:
        files = pki.init(arguments.folder, arguments.days, arguments.force)
        return [
            *pki.describe(files.cert_file),
            f"made {files.cert_file} (give this to who must trust it) and {files.key_file} (keep this secret)",
        ]

    return _with_pki(make)


def _certs_issue(arguments: argparse.Namespace) -> int:
    from proxy.tls import pki

    def make() -> list[str]:
        usage: pki.Usage = "server" if arguments.server else "client"
        folder, name, sans = arguments.folder, arguments.name, arguments.san
        files = pki.issue(folder, name, usage, sans, arguments.days, arguments.force)
        return [*pki.describe(files.cert_file), f"made {files.cert_file} and {files.key_file} (keep the key secret)"]

    return _with_pki(make)


def _certs_show(arguments: argparse.Namespace) -> int:
    from proxy.tls import pki

    return _with_pki(lambda: pki.describe(arguments.file))


def _with_pki(make: Callable[[], list[str]]) -> int:
    from proxy.tls.pki import PkiError

    try:
        _say(make())
    except PkiError as fault:
        _complain([f"tensorgate: {fault}"])
        return FAILED
    return OK


# the command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tensorgate",
        description="A TLS and mutual-TLS front door for gRPC inference servers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tensorgate {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_check(commands)
    _add_certs(commands)
    _add_backend(commands)
    _add_demo(commands)
    return parser


def _add(commands: _Commands, name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)


def _add_serve(commands: _Commands) -> None:
    parser = _add(commands, "serve", "run the gate with a settings file")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    parser.add_argument("--grpc-port", metavar="N", help="instead of grpc_port; 0: any free one")
    parser.add_argument("--host", metavar="H", help="instead of host")
    parser.add_argument("--admin-address", metavar="A", help="instead of admin.address")
    parser.add_argument("--log-level", metavar="L", help=f"instead of log.level: {', '.join(_LEVELS)}")
    parser.set_defaults(command=_serve)


def _add_check(commands: _Commands) -> None:
    parser = _add(commands, "check", "say what a settings file means, or what is wrong with it")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    parser.set_defaults(command=_check)


def _add_certs(commands: _Commands) -> None:
    parser = _add(commands, "certs", "make a development CA and certificates, or show a certificate")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")

    init = _add(actions, "init", "make a CA in a folder: ca.pem and ca.key")
    init.add_argument("folder", type=Path, metavar="DIR")
    init.add_argument("--days", type=int, default=3650, metavar="N", help="how long it is valid (default 3650)")
    init.add_argument("--force", action="store_true", help="replace a CA that is there")
    init.set_defaults(command=_certs_init)

    issue = _add(actions, "issue", "issue a certificate from the CA in a folder: NAME.pem and NAME.key")
    issue.add_argument("folder", type=Path, metavar="DIR")
    issue.add_argument("name", metavar="NAME", help="common name, and name of the files")
    usage = issue.add_mutually_exclusive_group(required=True)
    usage.add_argument("--server", action="store_true", help="for a server (the gate)")
    usage.add_argument("--client", action="store_true", help="for a client")
    issue.add_argument(
        "--san",
        action="append",
        default=[],
        metavar="KIND:VALUE",
        help="dns:NAME, ip:ADDRESS or uri:URI; may be repeated "
        "(default for a server: localhost, 127.0.0.1, ::1, this host's name, and NAME if it is a host)",
    )
    issue.add_argument("--days", type=int, default=365, metavar="N", help="how long it is valid (default 365)")
    issue.add_argument("--force", action="store_true", help="replace a certificate and key that are there")
    issue.set_defaults(command=_certs_issue)

    show = _add(actions, "show", "say what is in a certificate file")
    show.add_argument("file", type=Path, metavar="FILE", help="PEM, one certificate or several")
    show.set_defaults(command=_certs_show)


def _add_backend(commands: _Commands) -> None:
    parser = _add(commands, "backend", "run the embedded inference backend alone, in plaintext")
    parser.add_argument("repository", type=Path, metavar="REPO", help="folder of models in Triton's layout")
    parser.add_argument("--listen", required=True, metavar="ADDR", help="HOST:PORT, [IPV6]:PORT or unix:/PATH")
    parser.add_argument("--http", metavar="ADDR", help="also serve REST there")
    parser.add_argument("--metrics", metavar="HOST:PORT", help="also serve metrics for Prometheus there")
    parser.add_argument(
        "--model-control-mode",
        choices=("none", "poll", "explicit"),
        default="none",
        help="which models are loaded: all at the start, as the folder changes, or as clients ask (default none)",
    )
    parser.add_argument(
        "--repository-poll-secs", type=_seconds, default=15.0, metavar="S", help="between two looks (default 15)"
    )
    parser.add_argument(
        "--load-model",
        action="append",
        default=[],
        metavar="NAME",
        help="load it at the start, in mode explicit; may be repeated; * for all",
    )
    parser.add_argument(
        "--memory-limit-bytes", type=_bytes, metavar="N", help="of messages held at a time (default: 1/4 of memory)"
    )
    parser.add_argument("--insecure-any-address", action="store_true", help="listen where other machines can reach it")
    parser.add_argument("--exit-on-stdin-eof", action="store_true", help="end when standard input does (as a child)")
    parser.add_argument("--log-level", choices=_LEVELS, default="info", help="least level written (default info)")
    parser.set_defaults(command=_backend)


def _add_demo(commands: _Commands) -> None:
    parser = _add(commands, "demo", "try it: certificates, a backend, the gate with mutual TLS, and clients")
    parser.add_argument("--once", action="store_true", help="end after the show, with 0 only if all of it held")
    parser.add_argument("--port", type=_port, default=8001, metavar="N", help="public port (default 8001)")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where it keeps its files")
    parser.set_defaults(command=_demo)


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and 0 <= int(text) <= 65_535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port; give a whole number from 0 to 65535")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if 0.1 <= seconds <= 86_400:
        return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; give one from 0.1 to 86400")


def _bytes(text: str) -> int:
    if text.isascii() and text.isdigit() and 2**20 <= int(text) < 2**63:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes; give a whole one from {2**20}")
