"""llama.cpp's matrix products: ggml of the llama-cpp-python package, one product per graph, through ctypes.

Weights go where llama.cpp would put them: into the first of ggml's special buffers (AMX, repacked for AVX) that takes
the type on this processor, else into an ordinary one.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_spqr.bench.timing import Call, Candidate

from . import SAMPLE_ROWS

F32 = 0
TYPES = {"Q4_0": 2, "Q4_K": 12, "Q3_K": 11, "Q2_K": 10, "IQ4_XS": 23}
SMALL = 1 << 20
"""Bytes for the descriptions of a graph and its tensors."""


class InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


SIGNATURES: dict[str, tuple[Any, tuple]] = {
    "ggml_init": (c_void_p, (InitParams,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_get_type_traits": (c_void_p, (c_int,)),
    "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_get_default_buffer_type": (c_void_p, (c_void_p,)),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_buft_alloc_buffer": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buft_get_alloc_size": (c_size_t, (c_void_p, c_void_p)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_buffer_get_base": (c_void_p, (c_void_p,)),
    "ggml_backend_tensor_alloc": (c_int, (c_void_p, c_void_p, c_void_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
}


class Library:
    """ggml's functions by name, its CPU backend and its kinds of memory, the special ones first."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ImportError("No module named 'llama_cpp'")
        folder = Path(spec.origin).parent / "lib"
        names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
        parts = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in names]
        for name, (result, arguments) in SIGNATURES.items():
            function = next((getattr(part, name) for part in parts if hasattr(part, name)), None)
            if function is None:
                raise ImportError(f"this llama-cpp-python has no {name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.backend = self.backend_cpu_init()
        registry = self.backend_cpu_reg()
        self.device = self.backend_reg_dev_get(registry, 0)
        self.memories = [self.backend_get_default_buffer_type(self.backend)]
        special = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if special:
            listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(special)(self.device)
            at = 0
            while listed[at]:
                self.memories.insert(at, listed[at])
                at += 1

    def context(self) -> int:
        return self.init(InitParams(SMALL, None, True))

    def matrix(self, kind: int, rows: int, columns: int, data: Tensor) -> tuple[int, str]:
        """A tensor with the quantized ``data`` in the first memory that can be multiplied with; and its name."""
        for memory in self.memories:
            context = self.context()
            tensor = self.new_tensor_2d(context, kind, columns, rows)
            buffer = self.backend_buft_alloc_buffer(memory, self.backend_buft_get_alloc_size(memory, tensor))
            self.backend_tensor_alloc(buffer, tensor, self.backend_buffer_get_base(buffer))
            x = self.new_tensor_2d(context, F32, columns, 1)
            if memory == self.memories[-1] or self.backend_dev_supports_op(
                self.device, self.mul_mat(context, tensor, x)
            ):
                self.backend_tensor_set(tensor, data.data_ptr(), 0, data.nbytes)
                return tensor, self.backend_buft_name(memory).decode()
        raise AssertionError("the ordinary memory takes every type")


_libraries: list[Library] = []


def library() -> Library:
    if not _libraries:
        _libraries.append(Library())
    return _libraries[0]


def quantized(lib: Library, kind: int, weight: Tensor) -> Tensor:
    """The bytes of ``weight`` in ggml's type."""
    rows, columns = weight.shape
    sample = weight[:SAMPLE_ROWS].contiguous()
    data = torch.empty(len(sample), lib.row_size(kind, columns), dtype=torch.uint8)
    lib.quantize_chunk(kind, sample.data_ptr(), data.data_ptr(), 0, len(sample), columns, None)
    return data.repeat(-(-rows // len(sample)), 1)[:rows].contiguous()


class Product:
    """Calls with one matrix; the graph for a number of tokens is built when it is first needed."""

    def __init__(self, lib: Library, matrix: int, rows: int, threads: int) -> None:
        self.lib, self.matrix, self.rows, self.threads = lib, matrix, rows, threads
        self.graphs: dict[int, tuple[int, int, int]] = {}

    def graph(self, tokens: int, columns: int) -> tuple[int, int, int]:
        lib, context = self.lib, self.lib.context()
        x = lib.new_tensor_2d(context, F32, columns, tokens)
        y = lib.mul_mat(context, self.matrix, x)
        graph = lib.new_graph(context)
        lib.build_forward_expand(graph, y)
        lib.backend_alloc_ctx_tensors_from_buft(context, lib.memories[-1])
        return graph, x, y

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) not in self.graphs:
            self.graphs[len(x)] = self.graph(*x.shape)
        graph, given, result = self.graphs[len(x)]
        y = torch.empty(len(x), self.rows)
        self.lib.backend_cpu_set_n_threads(self.lib.backend, self.threads)
        self.lib.backend_tensor_set(given, x.data_ptr(), 0, x.nbytes)
        if self.lib.backend_graph_compute(self.lib.backend, graph):
            raise RuntimeError("ggml could not compute the graph")
        self.lib.backend_tensor_get(result, y.data_ptr(), 0, y.nbytes)
        return y


def candidates(weight: Tensor, threads: int) -> list[Candidate]:
    lib = library()
    rows, columns = weight.shape
    found = []
    for name, kind in TYPES.items():
        data = quantized(lib, kind, weight)
        where = lib.matrix(kind, rows, columns, data)[1]
        special = "" if where == "CPU" else f" {where.removeprefix('CPU_').lower()}"

        def copy(kind: int = kind, data: Tensor = data) -> Call:
            return Product(lib, lib.matrix(kind, rows, columns, data)[0], rows, threads)

        found.append(Candidate(f"llama.cpp {name}{special}", data.nbytes, copy, lambda x: x.float()))
    return found
