"""Compiles csrc/cuda for the host (csrc/emu) and runs its kernels on packed matrices."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_spqr.formats import affine, spqr
from hf_spqr.ops import reference

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
# Unoptimized: the unrolled kernels then compile three times as fast, and the cases are small.
FLAGS = ["-std=c++17", "-O0", "-g1", "-DHF_SPQR_EMU", f"-I{CSRC}", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=undefined"]  # fmt: skip
Output = tuple[torch.dtype, Sequence[int]]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compiler() -> str | None:
    return shutil.which("g++")


def build(folder: Path) -> Path:
    """The emulator in ``folder``, each source compiled again only if what the preprocessor makes of it has changed."""
    folder.mkdir(parents=True, exist_ok=True)
    program = compiler() or "g++"

    def compile_one(source: Path) -> Path:
        command = [program, *FLAGS, "-x", "c++", "-E", str(source)]
        text = subprocess.run(command, check=True, capture_output=True).stdout
        made = folder / f"{source.name}-{_key(text, *map(str.encode, FLAGS))}.o"
        if not made.exists():
            with _replacing(made) as target:
                command = [program, *FLAGS, "-x", "c++-cpp-output", "-c", "-", "-o", str(target)]
                subprocess.run(command, check=True, input=text)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted([*CSRC.glob("cuda/*.cu"), *CSRC.glob("emu/*.cpp")])))
    linked = folder / f"emu-{_key(*(made.name.encode() for made in objects))}"
    if not linked.exists():
        with _replacing(linked) as target:
            subprocess.run([program, *FLAGS, *map(str, objects), "-o", str(target)], check=True)
    return linked


def _key(*texts: bytes) -> str:
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to; the file becomes ``path`` when it is whole, whoever else may be writing it."""
    target = path.with_name(f"{os.getpid()}-{path.name}")
    yield target
    target.rename(path)


SMALLEST_DEVICE = (3, 99 << 10)
"""Multiprocessors (few, so that each takes several row blocks) and bytes of shared memory a block may have."""


@dataclass
class Case:
    """One call of a kernel: a linear if ``x`` is given, otherwise a dequantize of rows [first_row, + part_rows)."""

    weight: spqr.SpQRWeight | affine.AffineWeight
    x: Tensor | None = None
    bias: Tensor | None = None
    dtype: torch.dtype = torch.float32
    first_row: int = 0
    part_rows: int | None = None
    seed: int = 1
    device: tuple[int, int] = SMALLEST_DEVICE

    @property
    def rows(self) -> int:
        return self.weight.layout.out_features - self.first_row if self.part_rows is None else self.part_rows

    @property
    def out_dtype(self) -> torch.dtype:
        return self.dtype if self.x is None else self.x.dtype

    @property
    def shape(self) -> tuple[int, int]:
        lay = self.weight.layout
        return (self.rows, lay.in_features) if self.x is None else (self.x.shape[0], lay.out_features)

    @property
    def outputs(self) -> list[Output]:
        return [(self.out_dtype, self.shape)]

    def encode(self) -> bytes:
        lay = self.weight.layout
        if isinstance(self.weight, spqr.SpQRWeight):
            packed = spqr.pack(self.weight)
            kind = (lay.stat_bits, lay.groups_per_second, 0, 0)
            wide = int(packed["outlier"].dtype == torch.int64)
        else:
            packed = affine.pack(self.weight)
            kind = (0, 0, int(lay.symmetric), int(lay.scale_dtype == torch.bfloat16))
            wide = 0
        tokens = 0 if self.x is None else self.x.shape[0]
        header = struct.pack(
            "18q", self.x is None, isinstance(self.weight, affine.AffineWeight), lay.bits, lay.group_size,
            lay.out_features, lay.in_features, *kind, tokens, DTYPES[self.out_dtype], self.first_row, self.rows, wide,
            self.seed, *self.device,
        )  # fmt: skip
        tensors = [packed["packed"], packed.get("outlier_row"), packed.get("outlier"), packed.get("perm")]
        if self.x is not None:
            tensors += [self.bias, self.x]
        return header + b"".join(_bytes(tensor) for tensor in tensors)


@dataclass
class Finish:
    """Scale, bias and dtype of a dense product, written into ``y``.

    ``product`` is [tokens, rows] of rows from ``first_row`` on, or [parts, tokens, at least all rows].
    """

    product: Tensor
    token_scale: Tensor | None
    bias: Tensor | None
    y: Tensor
    first_row: int = 0

    @property
    def outputs(self) -> list[Output]:
        return [(self.y.dtype, self.y.shape)]

    def encode(self) -> bytes:
        (tokens, rows), stride = self.y.shape, self.product.shape[-1]
        parts, part_rows = (len(self.product), rows) if self.product.dim() == 3 else (1, stride)
        header = struct.pack(
            "18q", 2, 0, parts, 0, rows, stride, 0, 0, 0, 0, tokens, DTYPES[self.y.dtype], self.first_row, part_rows,
            DTYPES[self.product.dtype], 1, *SMALLEST_DEVICE,
        )  # fmt: skip
        return header + b"".join(_bytes(tensor) for tensor in (self.product, self.token_scale, self.bias, self.y))


@dataclass
class Quantize:
    """``quantize_activation`` of ``x`` [tokens, columns], which lies ``offset`` bytes from a 16-byte boundary."""

    x: Tensor
    perm: Tensor | None
    bits: int
    symmetric: bool
    offset: int = 0

    def encode(self) -> bytes:
        tokens, columns = self.x.shape
        header = struct.pack(
            "18q", 3, 0, self.bits, 0, 0, columns, 0, 0, self.symmetric, 0, tokens, DTYPES[self.x.dtype], 0, 0,
            self.offset, 1, *SMALLEST_DEVICE,
        )  # fmt: skip
        return header + _bytes(self.x) + _bytes(self.perm)

    @property
    def outputs(self) -> list[Output]:
        tokens = self.x.shape[0]
        return [(torch.int8, self.x.shape), (torch.float32, (tokens, 1)), (torch.int32, (tokens, 1))]


@dataclass
class Int8Linear:
    """``w_int8_linear`` of codes [tokens, columns] with scale and zero [tokens, 1]."""

    weight: affine.AffineWeight
    code: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    seed: int = 1
    device: tuple[int, int] = SMALLEST_DEVICE
    act_bits: int = 8

    def encode(self) -> bytes:
        lay, tokens = self.weight.layout, self.code.shape[0]
        header = struct.pack(
            "18q", 4, 1, lay.bits, lay.group_size, lay.out_features, lay.in_features, 0, 0, lay.symmetric,
            lay.scale_dtype == torch.bfloat16, tokens, DTYPES[self.dtype], 0, lay.out_features, self.act_bits,
            self.seed, *self.device,
        )  # fmt: skip
        tensors = [affine.pack(self.weight)["packed"], None, None, self.bias, self.code, self.scale, self.zero]
        return header + b"".join(_bytes(tensor) for tensor in tensors)

    @property
    def outputs(self) -> list[Output]:
        return [(self.dtype, (self.code.shape[0], self.weight.layout.out_features))]

    def expected(self) -> Tensor:
        """What the reference gives."""
        lay = self.weight.layout
        return reference.w_int8_linear(
            self.code, self.scale, self.zero, affine.pack(self.weight)["packed"], self.bias, lay.out_features,
            lay.bits, lay.group_size, lay.symmetric, lay.scale_dtype == torch.bfloat16, self.dtype,
        )  # fmt: skip


@dataclass
class Stretch:
    """How many rows of fp16 weights are made and multiplied at a time."""

    rows: int
    columns: int
    tokens: int
    multiprocessors: int

    def encode(self) -> bytes:
        shape = (0, 0, self.rows, self.columns, 0, 0, 0, 0, self.tokens, 0, 0, 0, 0, 1, self.multiprocessors, 0)
        return struct.pack("18q", 5, 0, *shape)

    @property
    def outputs(self) -> list[Output]:
        return [(torch.int64, (1,))]


@dataclass
class Parts(Stretch):
    """In how many parts the columns of SpQR's layout of 3 bits are cut for the tiled kernel."""

    shared_bytes: int = 227 << 10
    group: int = 16

    def encode(self) -> bytes:
        shape = (3, self.group, self.rows, self.columns, 3, 1, 0, 0, self.tokens, 0, 0, 0, 0, 1)
        return struct.pack("18q", 6, 0, *shape, self.multiprocessors, self.shared_bytes)


@dataclass
class Refused(Parts):
    """Whether affine weights of 4 bits and one scale per row go another way than through the kernel for few tokens."""

    def encode(self) -> bytes:
        shape = (4, -1, self.rows, self.columns, 0, 0, 0, 0, self.tokens, 0, 0, 0, 0, 1)
        return struct.pack("18q", 7, 1, *shape, self.multiprocessors, self.shared_bytes)


def _bytes(tensor: Tensor | None) -> bytes:
    raw = b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return struct.pack("q", len(raw)) + raw


def run(
    program: Path,
    cases: Sequence[Case | Finish | Quantize | Int8Linear | Stretch],
    folder: Path,
    through: Sequence[str] = (),
) -> list[Any]:
    """Of each case the result, or a tuple of them; raises with the sanitizer's report if a kernel misbehaves.

    ``through`` is a command that runs programs, an emulator for instance.
    """
    (folder / "in").write_bytes(b"".join(case.encode() for case in cases))
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    command = [*through, str(program), str(folder / "in"), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    raw, at = (folder / "out").read_bytes(), 0
    results = []
    for case in cases:
        tensors = []
        for dtype, shape in case.outputs:
            (size,) = struct.unpack_from("q", raw, at)
            tensors.append(torch.frombuffer(bytearray(raw[at + 8 : at + 8 + size]), dtype=dtype).view(*shape))
            at += 8 + size
        results.append(tensors[0] if len(tensors) == 1 else tuple(tensors))
    return results
