// The CUDA implementations of the ops; their schemas are in ops_cpu.cpp. Only torch's stable ABI and the C interface
// of csrc/cuda are used, so this compiles and links against a CPU build of torch too. It is imported only where torch
// has CUDA.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include "cuda/kernels.h"
#include "torch/int8_cuda.h"
#include "torch/linear_cuda.h"

namespace hf_spqr {
namespace {

Tensor spqr_linear(const Tensor& x, const Tensor& packed, const Tensor& outlier_row, const Tensor& outlier,
                   const OptionalTensor& perm, const OptionalTensor& bias, int64_t out_features, int64_t bits,
                   int64_t group_size, int64_t stat_bits, int64_t second_group, bool /*int8_activations*/) {
    constexpr const char* kOp = "spqr_linear";
    STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x must have at least one dimension");
    const Matrix m = spqr_matrix(kOp, device_of(kOp, "x", x), packed, outlier_row, outlier, x.size(-1),
                                 {out_features, bits, group_size, stat_bits, second_group});
    return linear_cuda(kOp, x, m, perm, bias);
}

Tensor spqr_dequantize(const Tensor& packed, const Tensor& outlier_row, const Tensor& outlier,
                       const OptionalTensor& perm, int64_t out_features, int64_t in_features, int64_t bits,
                       int64_t group_size, int64_t stat_bits, int64_t second_group, ScalarType dtype) {
    constexpr const char* kOp = "spqr_dequantize";
    const Matrix m = spqr_matrix(kOp, device_of(kOp, "packed", packed), packed, outlier_row, outlier, in_features,
                                 {out_features, bits, group_size, stat_bits, second_group});
    return dequantize_cuda(kOp, packed, m, perm, dtype);
}

Tensor affine_linear(const Tensor& x, const Tensor& packed, const OptionalTensor& perm, const OptionalTensor& bias,
                     int64_t out_features, int64_t bits, int64_t group_size, bool symmetric, bool scale_bf16,
                     bool /*int8_activations*/) {
    constexpr const char* kOp = "affine_linear";
    STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x must have at least one dimension");
    const Matrix m = affine_matrix(kOp, device_of(kOp, "x", x), packed, x.size(-1),
                                   {out_features, bits, group_size, symmetric, scale_bf16});
    return linear_cuda(kOp, x, m, perm, bias);
}

Tensor affine_dequantize(const Tensor& packed, const OptionalTensor& perm, int64_t out_features, int64_t in_features,
                         int64_t bits, int64_t group_size, bool symmetric, bool scale_bf16, ScalarType dtype) {
    constexpr const char* kOp = "affine_dequantize";
    const Matrix m = affine_matrix(kOp, device_of(kOp, "packed", packed), packed, in_features,
                                   {out_features, bits, group_size, symmetric, scale_bf16});
    return dequantize_cuda(kOp, packed, m, perm, dtype);
}

std::tuple<Tensor, Tensor, Tensor> quantize_activation(const Tensor& x, const OptionalTensor& perm, int64_t bits,
                                                       bool symmetric) {
    constexpr const char* kOp = "quantize_activation";
    STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x must have at least one dimension");
    return quantize_cuda(kOp, x, perm, bits, symmetric);
}

Tensor w_int8_linear(const Tensor& code, const Tensor& scale, const Tensor& zero, const Tensor& packed,
                     const OptionalTensor& bias, int64_t out_features, int64_t bits, int64_t group_size,
                     bool symmetric, bool scale_bf16, ScalarType dtype, int64_t act_bits) {
    constexpr const char* kOp = "w_int8_linear";
    STD_TORCH_CHECK(code.dim() >= 1, kOp, ": code must have at least one dimension");
    const Matrix m = affine_matrix(kOp, device_of(kOp, "code", code), packed, code.size(-1),
                                   {out_features, bits, group_size, symmetric, scale_bf16});
    return int8_linear_cuda(kOp, code, scale, zero, m, bias, dtype, act_bits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_spqr, CUDA, m) {
    m.impl("spqr_linear", TORCH_BOX(&spqr_linear));
    m.impl("spqr_dequantize", TORCH_BOX(&spqr_dequantize));
    m.impl("affine_linear", TORCH_BOX(&affine_linear));
    m.impl("affine_dequantize", TORCH_BOX(&affine_dequantize));
    m.impl("quantize_activation", TORCH_BOX(&quantize_activation));
    m.impl("w_int8_linear", TORCH_BOX(&w_int8_linear));
}

}  // namespace hf_spqr

PyMODINIT_FUNC PyInit__C_cuda(void) {
    static PyModuleDef definition = {
        PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels of hf_spqr", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    if (const int driver = hf_spqr::hf_spqr_cuda_old_driver()) {
        PyErr_Format(
            PyExc_ImportError,
            "the driver knows CUDA %d.%d only, older than the toolkit that hf_spqr was compiled with: update the "
            "driver, or reinstall with an older toolkit (CUDA_HOME)",
            driver / 1000, driver % 1000 / 10);
        return nullptr;
    }
    return PyModule_Create(&definition);
}
