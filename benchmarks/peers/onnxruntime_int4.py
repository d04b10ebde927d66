"""onnxruntime's MatMulNBits, 4 bit, groups of 128, with int8 activations (accuracy level 4)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_spqr.bench.timing import Call, Candidate

from . import rounded

GROUP = 128


def candidates(weight: Tensor, threads: int) -> list[Candidate]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weight.shape
    codes, scale, zero = rounded(weight, 4, GROUP)
    pairs = codes.reshape(rows, columns // GROUP, GROUP // 2, 2)
    packed = (pairs[..., 0] | pairs[..., 1] << 4).numpy()
    zeros = zero.to(torch.uint8)
    if zeros.shape[1] % 2:
        zeros = torch.nn.functional.pad(zeros, (0, 1))
    zeros = (zeros[:, ::2] | zeros[:, 1::2] << 4).numpy()
    tensors = {"packed": packed, "scales": scale.numpy(), "zeros": zeros}
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", K=columns, N=rows, bits=4, block_size=GROUP,
        accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", rows])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    def copy() -> Call:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"x": x})[0]

    def prepare(x: Tensor) -> np.ndarray:
        return x.float().numpy()

    nbytes = sum(array.nbytes for array in tensors.values())
    return [Candidate("onnxruntime int4 g128", nbytes, copy, prepare, "onnxruntime")]
