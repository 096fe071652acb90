"""Builds the wire format's descriptor set and type stubs from protos/ with this environment's grpcio-tools."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
PROTOS = HERE.parent / "protos"
WIRE = HERE / "robodual_client" / "wire"


def compile_protos() -> None:
    from grpc_tools import protoc

    sources = [path.relative_to(PROTOS).as_posix() for path in sorted(PROTOS.glob("robodual/v1/*.proto"))]
    arguments = ["protoc", f"-I{PROTOS}", "--include_imports", f"--descriptor_set_out={WIRE / 'robodual_v1.binpb'}"]
    stubs = WIRE / "stubs"
    stubs.mkdir(exist_ok=True)
    if protoc.main([*arguments, f"--pyi_out={stubs}", *sources]) != 0:
        raise SystemExit(f"protoc failed on {PROTOS}")
    # Generated names follow the .proto path, robodual/v1, which belongs to the services' package: keep the stubs here.
    for path in stubs.glob("robodual/v1/*.pyi"):
        text = re.sub(r"^from robodual\.v1 import", "from . import", path.read_text(), flags=re.MULTILINE)
        (WIRE / path.name).write_text(text)
        path.unlink()
    for folder in (stubs / "robodual" / "v1", stubs / "robodual", stubs):
        folder.rmdir()


if PROTOS.is_dir():  # an sdist carries the built files instead
    compile_protos()
setup()
