"""What a zstd frame claims to unpack to, read from its headers before anything is decoded.

Decoders allocate what a frame claims before they look further, and read one frame after the other, so a few bytes could
ask for any memory.

Source: RFC 8878, section 3.1.1.
"""

MAGIC = bytes.fromhex("28b52ffd")
_RLE, _RESERVED = 1, 3


def content_bytes(data: bytes) -> int | None:
    """Return the decoded size that one whole zstd frame claims, or None if the data is anything else or does not tell.

    The decoder itself refuses a frame whose blocks do not come to that size.
    """
    if data[:4] != MAGIC or len(data) < 6:
        return None
    descriptor = data[4]
    size_flag, single_segment, dictionary_flag = descriptor >> 6, descriptor >> 5 & 1, descriptor & 3
    at = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[dictionary_flag]
    width = (1 if single_segment else 0, 2, 4, 8)[size_flag]
    end = _blocks_end(data, at + width)
    if not width or end is None or end + (4 if descriptor >> 2 & 1 else 0) != len(data):
        return None
    return int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)


def _blocks_end(data: bytes, at: int) -> int | None:
    """Return where the blocks that begin at a place end, or None if they do not end within the data."""
    while at + 3 <= len(data):
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        if kind == _RESERVED:
            return None
        at += 3 + (1 if kind == _RLE else size)
        if last:
            return at
    return None
