"""Parquet files whose footers and page headers claim anything: written field by field, as no library would."""

import zlib

from kcdcache.files.atomic import sha256_bytes, sha256_file
from kcdcache.files.records import read_json, sealed_json
from kcdcache.store import log

I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12
PLAIN, RLE_DICTIONARY = 0, 8
DATA, DICTIONARY = 0, 2
INT64 = 2
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


def page(data, values, size=None, kind=DATA, encoding=PLAIN):
    """A page of `data` as it stands in the file, whose header claims `size` bytes once decompressed."""
    size = len(data) if size is None else size
    own = [(1, I32, values), (2, I32, encoding)]
    if kind == DATA:
        own += [(3, I32, 3), (4, I32, 3)]
    fields = [(1, I32, kind), (2, I32, size), (3, I32, len(data)), (4, I32, signed(zlib.crc32(data)))]
    return struct([*fields, ({DATA: 5, DICTIONARY: 7}[kind], STRUCT, own)]) + data


def signed(number):
    return number - 2**32 if number >= 2**31 else number


def column(start, size, rows, kind=INT64, codec=UNCOMPRESSED, dictionary=None):
    """A column chunk's entry in the footer."""
    meta = [
        (1, I32, kind), (2, LIST, (I32, [PLAIN])), (3, LIST, (BINARY, [b"index"])), (4, I32, codec), (5, I64, rows),
        (6, I64, size), (7, I64, size), (9, I64, start),
    ]  # fmt: skip
    if dictionary is not None:
        meta.append((11, I64, dictionary))
    return [(2, I64, 0), (3, STRUCT, meta)]


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


def resealed(root, key, data):
    """Replace a chunk file and everything that vouches for it, as an attacker who knows the format would."""
    (root / key).write_bytes(data)
    commit = read_json(log.commit_path(root, 0))
    for entry in commit["log"]:
        path = log.record_path(root, 0, entry[0])
        record = read_json(path)
        for file in record["files"]:
            if file["path"] == key:
                crc = int.from_bytes(data[-4:], "little")
                file.update(bytes=len(data), sha256=sha256_bytes(data), crc32c=crc)
        write_resealed(path, record)
        entry[1] = sha256_file(path)
    write_resealed(log.commit_path(root, 0), commit)


def write_resealed(path, document):
    path.write_bytes(sealed_json({key: value for key, value in document.items() if key != "digest"}))


def first_chunk(root):
    return sorted(path.relative_to(root).as_posix() for path in (root / "logits").glob("c.*"))[0]


TEXTS = {
    "deep": b"[" * 900 + b"]" * 900,
    "very deep": b"[" * 10**6,
    "60 MB of objects": b"[" + b"{}," * (20 * 2**20) + b"0]",
    "a number without end": b'{"count":' + b"9" * 5000 + b"}",
    "a number beyond floats": b'{"count":1e999}',
    "NaN": b'{"count":NaN}',
    "a key twice": b'{"count":1,"count":2}',
    "no UTF-8": b"\xff\xfe{\0}\0",
    "half a surrogate pair": b'{"\\ud800":"\\ud800"}',
    "a NUL": b'{"file":"a\\u0000b","sha256":"x"}',
    "null": b"null",
    "nothing": b"",
}


THOROUGH = ("deep", "NaN", "a key twice", "no UTF-8", "half a surrogate pair", "a NUL", "a number beyond floats")
