"""Damage to files, drawn from a seed: values, structure and bytes of every format that is read."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

CANARY = "canary"
"""A file that only code out of an input would make."""

_DEEP = "\0deep\0"
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 255, 1 << 16, 100_000, (1 << 31) - 1, 1 << 31, 1 << 40,
    (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, -(10**30), 10**4200, 0.0, -0.0, 0.5, 1.5, 1e-320,
    1e300, -1e300, float("nan"), float("inf"), float("-inf"), "", " ", "0", "1", "-1", "nan",
    "1e999",
    "true", "null", "x" * 5000, "\ud800", "\udcff", "\x00", "\r\n=cmd|' /C calc'!A0", "\u202e",
    "../../../../etc/passwd", "/etc/passwd", "/dev/zero", ".", "hf-hub:owner/name", "F32", "F64",
    "float16", "gelu", "LORA", "weight", "(a|a)*b", "(", "*", "%s", "{}", [], [[]], [None], ["a"],
    [0], [-1], [1 << 62, 1 << 62], [3, 3], [1e300] * 3, [1] * 1000, ["a"] * 40, {}, {"a": 1},
    {"height": 100_000, "width": 100_000}, {"0": "a"}, {"a": "b", "b": "a"}, {"": None}, _DEEP,
)  # fmt: skip

# ---- bytes


def bytes_of(random: Random, data: bytes) -> bytes:
    """Flip, cut, fill, double, insert or take out bytes."""
    kinds: tuple[Callable[[Random, bytes], bytes], ...] = (_flip, _flip, _cut, _fill, _double)
    return random.choice((*kinds, _insert, _take))(random, data)


def _span(random: Random, data: bytes) -> tuple[int, int]:
    begin = random.randrange(len(data) + 1)
    # Most formats say what they are in their first bytes.
    begin = min(begin, random.randrange(64)) if random.random() < 0.4 else begin
    return begin, min(len(data), begin + random.choice((1, 1, 2, 4, 8, 64, 4096)))


def _flip(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8)) if data else 0):
        begin, _ = _span(random, data)
        changed[min(begin, len(data) - 1)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(random: Random, data: bytes) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _fill(random: Random, data: bytes) -> bytes:
    begin, end = _span(random, data)
    return data[:begin] + random.choice((b"\0", b"\xff", b"\x7f")) * (end - begin) + data[end:]


def _double(random: Random, data: bytes) -> bytes:
    begin, end = _span(random, data)
    return data[:end] + data[begin:]


def _insert(random: Random, data: bytes) -> bytes:
    begin, _ = _span(random, data)
    more = random.choice(
        (b"\0" * 8, b"\xff" * 8, b"\xed\xa0\x80", b"[" * 5000, b"\r\n", b'"', b"{")
    )
    return data[:begin] + more + data[begin:]


def _take(random: Random, data: bytes) -> bytes:
    begin, end = _span(random, data)
    return data[:begin] + data[end:]


# ---- JSON


def json_of(random: Random, data: bytes) -> bytes:
    """Change values, keys and nesting of a JSON text."""
    try:
        value = json.loads(data)
    except ValueError:
        return bytes_of(random, data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = changed(random, value)
    return dumped(random, value)


def dumped(random: Random, value: Any) -> bytes:
    """Write JSON that JSON does not allow too: NaN, names twice, halves of pairs, depth."""
    try:
        text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    except (ValueError, RecursionError):  # a number longer than Python writes
        text = '{"a": ' + "9" * 5000 + "}"
    depth = random.choice((50, 900, 1100, 100_000))
    text = text.replace(json.dumps(_DEEP), random.choice(("[", '{"a":')) * depth)
    if random.random() < 0.05 and text.startswith("{") and len(text) > 4:
        text = "{" + text[1:-1] + ", " + text[1:]
    return text.encode("utf-8", "surrogatepass")


def changed(random: Random, value: Any) -> Any:
    """Return a value with one place in it changed."""
    places = list(_places(value))
    if not places:
        return random.choice(ODD)
    holder, key = random.choice(places)
    what = random.randrange(10)
    if what < 6:
        holder[key] = _other(random, holder[key])
    elif what == 6:
        del holder[key]
    elif what == 7 and isinstance(holder, dict):
        name = random.choice(
            ("", "x" * 5000, "\ud800", "__metadata__", "__class__", "a\r\n=b", ".")
        )
        holder[name] = holder.pop(key)
    elif what == 8:
        other, name = random.choice(places)
        holder[key], other[name] = other.get(name) if isinstance(other, dict) else 0, holder[key]
    else:
        holder[key] = random.choice(([holder[key]], {"a": holder[key]}, str(holder[key])))
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        one = todo.pop()
        keys = (
            list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        )
        found += [(one, key) for key in keys]
        todo += [one[key] for key in keys]
        if len(found) > 2000:
            break
    return found


def _other(random: Random, value: Any) -> Any:
    if isinstance(value, str) and value[:1] in "{[" and random.random() < 0.9:
        try:  # JSON within JSON, as in the metadata of tuned files
            return dumped(random, changed(random, json.loads(value))).decode(errors="replace")
        except ValueError:
            pass
    alike = random.random() < 0.6
    if alike and isinstance(value, bool):
        return not value
    if alike and isinstance(value, int):
        near = (value + 1, value - 1, -value, value * 2, value // 2, value * 1000, value * 10**6)
        return random.choice((*near, *(one for one in ODD if type(one) is int)))
    if alike and isinstance(value, float):
        return random.choice((value * 2, -value, *(one for one in ODD if type(one) is float)))
    if alike and isinstance(value, str):
        added = value + random.choice(("x", "\n", " ", ".0", "/..", "\ud800"))
        return random.choice((added, value[1:], *(one for one in ODD if type(one) is str)))
    if alike and isinstance(value, list):
        return random.choice((value[:-1], value + value, value[::-1], value[:1]))
    return random.choice(ODD)


# ---- safetensors


def safetensors_of(random: Random, data: bytes) -> bytes:
    """Change the header, its length, or the numbers."""
    size = int.from_bytes(data[:8], "little")
    raw, body = data[8 : 8 + size], data[8 + size :]
    kind = random.randrange(8)
    if kind < 4:
        raw = json_of(random, raw)
    elif kind == 4:
        return (
            random.choice((0, 1, size - 1, size + 1, 1 << 31, 1 << 62, (1 << 64) - 1)).to_bytes(
                8, "little"
            )
            + data[8:]
        )
    elif kind == 5:
        body = _numbers(random, body)
    elif kind == 6:
        return _repacked(random, raw, body)
    else:
        return bytes_of(random, data)
    return len(raw).to_bytes(8, "little") + raw + body


def _numbers(random: Random, body: bytes) -> bytes:
    value = struct.pack("<f", random.choice((float("nan"), float("inf"), 3e38, 1e-45, 0.0, -1.0)))
    begin = random.randrange(max(1, len(body) // 4)) * 4
    count = random.choice((1, 8, 100_000))
    return (body[:begin] + value * count)[: len(body)] + body[begin + 4 * count :]


def _repacked(random: Random, raw: bytes, body: bytes) -> bytes:
    """Write a sound file of tensors that are fewer, other, renamed or of another shape."""
    header = json.loads(raw)
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: (one["dtype"], one["shape"], body[slice(*one["data_offsets"])])
        for name, one in header.items()
    }
    for _ in range(random.choice((1, 2, len(tensors)))):
        if tensors:
            name = random.choice(sorted(tensors))
            tensors |= _other_tensor(random, name, *tensors.pop(name))
    fields, parts, end = {"__metadata__": metadata}, [], 0
    for name, (dtype, shape, part) in tensors.items():
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(part)]}
        parts.append(part)
        end += len(part)
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def _other_tensor(
    random: Random, name: str, dtype: str, shape: list[int], part: bytes
) -> dict[str, tuple[str, list[int], bytes]]:
    names = ("x" * 5000, "a\r\n=b", "q.S", "", "\u202e", name + ".S")
    width, code = random.choice(((8, "F64"), (4, "I32"), (1, "F8_E4M3"), (1, "BOOL")))
    flat = [len(part) // 4] if dtype == "F32" else shape
    return random.choice((
        {},
        {random.choice(names): (dtype, shape, part)},
        {name: (dtype, shape[::-1], part)},
        {name: (dtype, flat, part)},
        {name: (code, [len(part) // width], part[: len(part) // width * width])},
        {name: (dtype, random.choice(([0], [0, 5], [5, 0, 1 << 40])), b"")},
        {name: (dtype, [1] * random.choice((1, 30, 70)) + shape, part)},
    ))  # fmt: skip


# ---- pickles


class _Call:
    """A pickle that calls something when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def hostile(random: Random) -> bytes:
    """Return a pickle that would make the canary, or is odd."""
    call = random.choice((
        _Call(os.system, f"touch {CANARY}"), _Call(open, CANARY, "w"),
        _Call(eval, f"open('{CANARY}', 'w')"), _Call(os.mkdir, CANARY),
    ))  # fmt: skip
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    value = random.choice((call, {"w": call}, {"state_dict": {"w": call}}, deep, 5, None, {}, [],
        {"w": {"w": {}}}, {"state_dict": 3}, {1: 2}, {"a": "\ud800"}, {"w": 10**3000},
    ))  # fmt: skip
    return pickle.dumps(value, protocol=random.choice((2, 4)))


def odd_checkpoint(random: Random) -> bytes:
    """Return a checkpoint as torch can save it, with what few checkpoints hold."""
    import numpy as np
    import torch

    w = torch.randn(4, 6)
    odd: tuple[Callable[[], Any], ...] = (
        lambda: w.to_sparse(), lambda: w.to_sparse_csr(), lambda: w.to(torch.complex64),
        lambda: torch.quantize_per_tensor(w, 0.1, 3, torch.qint8), lambda: torch.tensor(1.0),
        lambda: torch.zeros(1).expand(22_000, 22_000), lambda: torch.zeros(1).expand(1 << 40),
        lambda: w.to(torch.float8_e4m3fn), lambda: torch.empty(0, 4), lambda: torch.nn.Parameter(w),
        lambda: w.T[1:, ::2], lambda: w.numpy(), lambda: np.float32(3), lambda: [w, [w, {"x": w}]],
        lambda: w.double() * 1e300, lambda: w * float("nan"), lambda: {"w": w}, lambda: None,
        lambda: torch.empty(4, 4, device="meta"), lambda: w.to(torch.int64), lambda: w.bool(),
        lambda: "text", lambda: Path("x"), lambda: range(3), lambda: {1, 2}, lambda: torch.float32,
        lambda: torch.Size([3]), lambda: torch.randn([1] * 40),
        lambda: w.conj().to(torch.complex128),
    )  # fmt: skip
    names = ("conv.weight", "fc.weight", "fc", "a.b.c", "q", "q.S", "x" * 3000, "", "\n", "\u202e")
    found: dict[Any, Any] = {random.choice(names): random.choice(odd)() for _ in range(3)}
    found |= {"mix.weight": w} if random.random() < 0.7 else {random.choice((1, None, (1, 2))): w}
    for key in random.choice(((), (), ("state_dict",), ("model",), ("model", "state_dict"))):
        found = {key: found, "epoch": 1}
    target = io.BytesIO()
    torch.save(found, target, _use_new_zipfile_serialization=random.random() < 0.8)
    return target.getvalue()


def pickle_of(random: Random, data: bytes) -> bytes:
    """Damage a pickle of torch, or put another in its place."""
    kind = random.random()
    if kind < 0.15:
        return hostile(random)
    if kind < 0.4:
        return odd_checkpoint(random)
    return zip_of(random, data) if data.startswith(b"PK") else bytes_of(random, data)


def zip_of(random: Random, data: bytes) -> bytes:
    """Damage an archive's entries: bytes, names, compression, number."""
    if random.random() < 0.25:
        return bytes_of(random, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(one.filename, archive.read(one)) for one in archive.infolist()]
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(len(entries))
        if random.random() < 0.5:
            at = next((i for i, one in enumerate(entries) if one[0].endswith("data.pkl")), at)
        name, part = entries[at % len(entries)]
        kind = random.randrange(6)
        if kind < 3:
            part = (
                hostile(random) if kind == 0 and name.endswith(".pkl") else bytes_of(random, part)
            )
            entries[at] = name, part
        elif kind == 3:
            entries[at] = random.choice(("../x", name + "x", "/x", "x" * 300)), part
        elif kind == 4 and len(entries) > 1:
            del entries[at]
        else:
            entries.append((name, b"\0" * random.choice((0, 1, 1 << 20))))
    target = io.BytesIO()
    packed = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(target, "w", packed) as archive:
        for name, part in entries:
            archive.writestr(zipfile.ZipInfo(name), part, packed)
    return target.getvalue()


# ---- text


_WORDS = (
    "\0", "\ufeff", "\r", "\r\n", '"', "'", ",", ",,,", "x" * 5000, "\ud800", "../" * 9,
    "/etc/passwd", "-1", "1e999", "nan", "9" * 5000, "[" * 2000, "[[", "]]", "{", "=", "true",
    "\u2028", "\x1b[2J", "#", '"*"', "[]", "[1]", "{}", "{a = 1}", "inf", "-inf", "1979-05-27",
    '"x"', "9" * 400, "a.b", "[" * 90,
)  # fmt: skip


def text_of(random: Random, data: bytes) -> bytes:
    """Change lines and words of a text."""
    if random.random() < 0.2:
        return bytes_of(random, data)
    lines = data.decode(errors="replace").split("\n")
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(len(lines))
        words = lines[at].split(" ")
        kind = random.randrange(6)
        if kind == 0:
            lines[at] = random.choice(_WORDS)
        elif kind == 1:
            words[random.randrange(len(words))] = random.choice(_WORDS)
            lines[at] = " ".join(words)
        elif kind == 2:
            lines.insert(at, random.choice(lines))
        elif kind == 3 and len(lines) > 1:
            del lines[at]
        elif kind == 4:
            lines[at] = lines[at] * random.choice((2, 500))
        else:
            cut = random.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + random.choice(_WORDS) + lines[at][cut:]
    encoding = random.choice(("utf-8", "utf-8", "utf-8", "utf-8", "utf-16"))
    return "\n".join(lines).encode(encoding, "surrogatepass")


def jsonl_of(random: Random, data: bytes) -> bytes:
    """Change a line's JSON, or the lines."""
    if random.random() < 0.4:
        return text_of(random, data)
    lines = data.splitlines()
    at = random.randrange(len(lines))
    lines[at] = json_of(random, lines[at])
    return b"\n".join(lines)


# ---- pictures


def image_of(random: Random, data: bytes) -> bytes:
    """Damage a picture, store it in another way, or announce an enormous one."""
    kind = random.randrange(6)
    if kind < 2:
        return bytes_of(random, data)
    if kind == 2:
        return _announced(random)
    from PIL import Image

    modes = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB", "HSV")
    formats = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000", "PCX")
    for _ in range(20):
        mode, name = random.choice(modes), random.choice(formats)
        target = io.BytesIO()
        try:
            picture = Image.open(io.BytesIO(data)).convert("L" if mode in ("I;16", "F") else "RGB")
            if random.random() < 0.3:
                picture = picture.resize((random.choice((1, 2, 3000)), random.choice((1, 2, 9))))
            picture.convert("I" if mode == "I;16" else mode).save(target, name)
        except (ValueError, OSError, KeyError):
            continue
        return target.getvalue()
    return b""


def _announced(random: Random) -> bytes:
    """Return a PNG whose header announces more pixels than it has."""
    size = random.choice(((100_000, 100_000), (1 << 31, 1), (0, 0), (20_000, 9_000), (60_000, 3)))
    head = struct.pack(
        ">IIBBBBB", *size, random.choice((1, 8, 16)), random.choice((0, 2, 3, 6)), 0, 0, 0
    )
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, part in ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")):
        check = zlib.crc32(name + part)
        parts.append(struct.pack(">I", len(part)) + name + part + struct.pack(">I", check))
    return b"".join(parts)


BY_SUFFIX: dict[str, Callable[[Random, bytes], bytes]] = {
    ".json": json_of, ".safetensors": safetensors_of, ".pt": pickle_of, ".pth": pickle_of,
    ".bin": pickle_of, ".pkl": pickle_of, ".jsonl": jsonl_of, ".png": image_of, ".jpg": image_of,
}  # fmt: skip


def damage(random: Random, path: Path, others: list[Path]) -> None:
    """Damage one file as its suffix asks for, now and then as a file of another kind."""
    kind = random.random()
    data = path.read_bytes()
    if kind < 0.03:
        _replace(random, path)
        return
    if kind < 0.06 and others:
        other = random.choice(others).read_bytes()
        cut = random.randrange(len(data) + 1)
        path.write_bytes(random.choice((other, data[:cut] + other[cut:], data + other)))
        return
    path.write_bytes(BY_SUFFIX.get(path.suffix, text_of)(random, data))


def _replace(random: Random, path: Path) -> None:
    """Put something in a file's place that is no file, or nothing."""
    path.unlink()
    kind = random.randrange(5)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("nowhere")
    elif kind == 3:
        path.touch()
    elif kind == 4:
        path.symlink_to(path.name)
