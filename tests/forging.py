"""Parquet files whose footers and page headers claim anything: written field by field, as no library would."""

import zlib

I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12
PLAIN, DELTA_BYTE_ARRAY, RLE_DICTIONARY = 0, 7, 8
DATA, DICTIONARY = 0, 2
INT64, BYTE_ARRAY = 2, 6
UNCOMPRESSED, ZSTD = 0, 6


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes(out) + bytes([number])


def value(kind, content):
    if kind in (I32, I64):
        return varint((content << 1) ^ (content >> 63))
    if kind == BINARY:
        return varint(len(content)) + content
    if kind == LIST:
        inner, items = content
        return bytes([0xF0 | inner]) + varint(len(items)) + b"".join(value(inner, item) for item in items)
    return struct(content)


def struct(fields):
    """The compact protocol's bytes of (field number, kind, content) triples, in any order, repeated or not."""
    out = b""
    for number, kind, content in fields:
        out += bytes([kind]) + varint(number << 1) + value(kind, content)
    return out + b"\0"


def page(data, values, size=None, kind=DATA, encoding=PLAIN, more=()):
    """A page of `data` as it stands in the file, whose header claims `size` bytes once decompressed."""
    size = len(data) if size is None else size
    own = [(1, I32, values), (2, I32, encoding)]
    if kind == DATA:
        own += [(3, I32, 3), (4, I32, 3)]
    fields = [(1, I32, kind), (2, I32, size), (3, I32, len(data)), (4, I32, signed(zlib.crc32(data)))]
    return struct([*fields, *more, ({DATA: 5, DICTIONARY: 7}[kind], STRUCT, own)]) + data


def signed(number):
    return number - 2**32 if number >= 2**31 else number


def column(start, size, rows, kind=INT64, codec=UNCOMPRESSED, dictionary=None, file=None):
    """A column chunk's entry in the footer."""
    meta = [
        (1, I32, kind), (2, LIST, (I32, [PLAIN])), (3, LIST, (BINARY, [b"index"])), (4, I32, codec), (5, I64, rows),
        (6, I64, size), (7, I64, size), (9, I64, start),
    ]  # fmt: skip
    if dictionary is not None:
        meta.append((11, I64, dictionary))
    own = [(2, I64, 0), (3, STRUCT, meta)]
    return [(1, BINARY, file), *own] if file else own


def footer(groups, rows, kind=INT64, names=(b"index",), metadata=()):
    """A footer; `groups` are (columns, rows) pairs."""
    root = [(4, BINARY, b"schema"), (5, I32, len(names))]
    leaves = [[(1, I32, kind), (3, I32, 0), (4, BINARY, name)] for name in names]
    listed = [[(1, LIST, (STRUCT, columns)), (2, I64, 0), (3, I64, count)] for columns, count in groups]
    pairs = [[(1, BINARY, key), (2, BINARY, text)] for key, text in metadata]
    told = [(1, I32, 2), (2, LIST, (STRUCT, [root, *leaves])), (3, I64, rows), (4, LIST, (STRUCT, listed))]
    return struct([*told, (5, LIST, (STRUCT, pairs))] if pairs else told)


def parquet(body, end):
    return b"PAR1" + body + end + len(end).to_bytes(4, "little") + b"PAR1"


def one_column(pages, rows, claimed=None, **more):
    """A file of one column `index` made of these pages, whose footer claims `claimed` rows (those there if None)."""
    body = b"".join(pages)
    claimed = rows if claimed is None else claimed
    kind = more.get("kind", INT64)
    return parquet(body, footer([([column(4, len(body), claimed, **more)], claimed)], claimed, kind))
