"""The wire format `robodual.v1`: message classes, built at import from the descriptor set that the install compiled.

A serialised descriptor set loads under every protobuf from 4.25 on, where generated code of one major version does not
load under another; so the same wheel serves Python 3.8 (protobuf 5) and current ones.
"""

from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

_DESCRIPTORS = Path(__file__).with_name("robodual_v1.binpb")

POOL = descriptor_pool.Default()


def _load() -> None:
    if not _DESCRIPTORS.is_file():
        raise ImportError(f"{_DESCRIPTORS} is missing: install robodual-client (`pip install -e clients`).")
    files = descriptor_pb2.FileDescriptorSet.FromString(_DESCRIPTORS.read_bytes())
    for file in files.file:
        POOL.AddSerializedFile(file.SerializeToString())
        for message in file.message_type:
            cls = message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"{file.package}.{message.name}"))
            globals()[message.name] = cls
        for enum in file.enum_type:
            globals()[enum.name] = EnumTypeWrapper(POOL.FindEnumTypeByName(f"{file.package}.{enum.name}"))
            for value in enum.value:
                globals()[value.name] = value.number


_load()
