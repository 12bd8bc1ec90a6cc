"""Packed weight formats: 16 rows interleaved, one 32-bit lane a row, so that no sum runs across lanes.

A *sub-block* is 32 columns of 16 rows; a *block* is one sub-block (or eight, for the K-quants, whose scales
are shared by 256 columns). Within a sub-block, *quad* k is columns 4k .. 4k+3: byte 4r+i of its 64-byte
vector belongs to row r, column 4k+i. `docs/packed-format.md` draws every layout.

This module says how large the fields are, `unpack.py` how they become registers; `storage/pack.py` writes them.
"""

from dataclasses import dataclass

ROWS = 16  # rows of a group
COLUMNS = 32  # columns of a sub-block
QUADS = 8  # quads of a sub-block


@dataclass(frozen=True)
class Format:
    """A packed format. Bytes are for one group of 16 rows.

    Integer formats give unsigned quads; the true weight is `scale * (q - 2**offset_bits) + minimum`
    (`offset_bits` 0: nothing to take off). Float formats give columns instead of quads.
    """

    name: str
    header: int  # bytes before the first sub-block of a block
    sub: int  # bytes of a sub-block
    subs: int = 1  # sub-blocks in a block
    offset_bits: int = 0
    has_minimum: bool = False
    split_scales: bool = False  # each half sub-block (16 columns) has an int8 scale of its own
    is_float: bool = False

    @property
    def block(self) -> int:
        """Bytes of a block."""
        return self.header + self.sub * self.subs

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return COLUMNS * self.subs

    @property
    def narrow(self) -> bool:
        """Unsigned weights stay below 128."""
        return self.name != "Q8_0"

    def group_bytes(self, columns: int) -> int:
        """Bytes of one 16-row group with `columns` columns (a multiple of `self.columns`)."""
        return columns // self.columns * self.block


FORMATS = {
    f.name: f
    for f in (
        Format("Q4_0", header=0, sub=32 + 256, offset_bits=3),
        Format("Q4_1", header=0, sub=64 + 256, has_minimum=True),
        Format("Q5_0", header=0, sub=32 + 256 + 64, offset_bits=4),
        Format("Q8_0", header=0, sub=32 + 512, offset_bits=7),
        Format("Q4_K", header=64, sub=32 + 256, subs=8, has_minimum=True),
        Format("Q5_K", header=64, sub=32 + 256 + 64, subs=8, has_minimum=True),
        Format("Q6_K", header=32, sub=32 + 256 + 128, subs=8, offset_bits=5, split_scales=True),
        Format("F16", header=0, sub=1024, is_float=True),
        Format("BF16", header=0, sub=1024, is_float=True),
        Format("F32", header=0, sub=2048, is_float=True),
    )
}
