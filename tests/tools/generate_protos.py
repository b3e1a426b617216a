"""Generates proxy/backend/protos/*_pb2.py and *.pyi from the .proto files: `python -m tests.tools.generate_protos`.

The output of protoc is changed in two places: descriptors go into the package's own pool (its docstring says why),
and the modules import each other through the package.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "proxy/backend/protos"
PACKAGE = "proxy.backend.protos"
NAMES = ("model_config", "inference", "health")
NEWEST = (6, 30, 0)  # protobuf>=6.30 in pyproject.toml


def generate(target: Path) -> None:
    """Write the adapted modules for every .proto file into `target`. Needs grpcio-tools. Raises SystemExit."""
    with tempfile.TemporaryDirectory() as scratch:
        protos = [f"{name}.proto" for name in NAMES]
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{FOLDER}"]
        subprocess.run([*command, f"--python_out={scratch}", f"--pyi_out={scratch}", *protos], check=True)
        for name in NAMES:
            source = Path(scratch, f"{name}_pb2.py").read_text()
            _check_version(source)
            (target / f"{name}_pb2.py").write_text(_own_pool(_package_imports(source), name))
            (target / f"{name}_pb2.pyi").write_text(_package_imports(Path(scratch, f"{name}_pb2.pyi").read_text()))


def _check_version(source: str) -> None:
    found = re.search(r"^# Protobuf Python Version: (\d+)\.(\d+)\.(\d+)", source, re.MULTILINE)
    version = tuple(int(part) for part in found.groups()) if found else ()
    if version[:1] != NEWEST[:1] or version > NEWEST:
        raise SystemExit(
            f"protoc is of protobuf {version}, the modules must load with {NEWEST}; "
            "install grpcio-tools==1.72.* in a virtual environment of its own and run this there"
        )


def _package_imports(source: str) -> str:
    return re.sub(r"^import (\w+_pb2) as", rf"from {PACKAGE} import \1 as", source, flags=re.MULTILINE)


def _own_pool(source: str, name: str) -> str:
    old_import = "from google.protobuf import descriptor_pool as _descriptor_pool\n"
    changes = {
        old_import: f"from {PACKAGE} import POOL as _POOL\n",
        "_descriptor_pool.Default().AddSerializedFile": "_POOL.AddSerializedFile",
        f"'{name}_pb2', _globals": f"'{PACKAGE}.{name}_pb2', _globals",
    }
    for old, new in changes.items():
        if source.count(old) != 1:
            raise SystemExit(f"{name}_pb2.py: expected {old!r} once; this protoc writes another form of module")
        source = source.replace(old, new)
    return source


if __name__ == "__main__":
    generate(FOLDER)
