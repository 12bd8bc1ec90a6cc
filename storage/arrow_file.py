"""Arrow files that anybody may have written: uncompressed, one table, nothing in them taken on trust."""

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def encode_table(table: "pa.Table") -> "pa.Buffer":
    """A table as an Arrow file, uncompressed, in one batch."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def decode_table(data: bytes) -> "pa.Table":
    """Read such a file. Compressed ones are refused: a small one could be endless. ValueError says what is wrong, as
    "is no Arrow table: ..."."""
    import pyarrow as pa

    stream = pa.py_buffer(data[8:])  # after the file's magic comes a stream
    try:
        messages = pa.ipc.MessageReader.open_stream(pa.BufferReader(stream))
        if not any(map(_is_compressed, messages)):
            table = pa.ipc.open_stream(pa.BufferReader(stream)).read_all()
            table.validate(full=True)
            return table
    except (pa.ArrowException, OSError, ValueError, struct.error, MemoryError) as error:
        raise ValueError("is no Arrow table: " + " ".join(str(error).split())[:100]) from None
    raise ValueError("is compressed, which ours never are")


def _is_compressed(message: "pa.Message") -> bool:
    """Whether a message's flatbuffer (Arrow's Message.fbs) has a batch with a compression."""
    data = message.metadata.to_pybytes()
    header = _field(data, _target(data, 0), 2)
    if message.type == "dictionary" and header:
        header = _field(data, _target(data, header), 1)
    return message.type != "schema" and (not header or _field(data, _target(data, header), 3) != 0)


def _target(data: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: bytes, table: int, number: int) -> int:
    """Where a flatbuffer table's field lies, 0 where it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    place = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
    return table + place if place else 0
