// The whole native surface: every op's schema, and its CPU implementation. hf_spqr/ops/schema.py says the same in
// Python. Only torch's stable ABI is used, so one binary serves every torch from 2.10 on.
#include <Python.h>
#include <atomic>
#include <string>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include "cpu/kernels.h"
#include "torch/integer_cpu.h"
#include "torch/linear_cpu.h"

namespace hf_spqr {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_x(const char* op, const Tensor& x) {
    STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension");
    STD_TORCH_CHECK(x.is_cpu(), op, ": x must be on the CPU");
}

Tensor spqr_linear(const Tensor& x, const Tensor& packed, const Tensor& outlier_row, const Tensor& outlier,
                   const OptionalTensor& perm, const OptionalTensor& bias, int64_t out_features, int64_t bits,
                   int64_t group_size, int64_t stat_bits, int64_t second_group, bool int8_activations) {
    constexpr const char* kOp = "spqr_linear";
    check_x(kOp, x);
    const Matrix m = spqr_matrix(kOp, packed, outlier_row, outlier, x.size(-1),
                                 {out_features, bits, group_size, stat_bits, second_group});
    return linear_cpu(kOp, x, m, perm, bias, int8_activations);
}

Tensor spqr_dequantize(const Tensor& packed, const Tensor& outlier_row, const Tensor& outlier,
                       const OptionalTensor& perm, int64_t out_features, int64_t in_features, int64_t bits,
                       int64_t group_size, int64_t stat_bits, int64_t second_group, ScalarType dtype) {
    constexpr const char* kOp = "spqr_dequantize";
    const Matrix m = spqr_matrix(kOp, packed, outlier_row, outlier, in_features,
                                 {out_features, bits, group_size, stat_bits, second_group});
    return dequantize_cpu(kOp, packed, m, perm, dtype);
}

Tensor affine_linear(const Tensor& x, const Tensor& packed, const OptionalTensor& perm, const OptionalTensor& bias,
                     int64_t out_features, int64_t bits, int64_t group_size, bool symmetric, bool scale_bf16,
                     bool int8_activations) {
    constexpr const char* kOp = "affine_linear";
    check_x(kOp, x);
    const Matrix m = affine_matrix(kOp, packed, x.size(-1), {out_features, bits, group_size, symmetric, scale_bf16});
    return linear_cpu(kOp, x, m, perm, bias, int8_activations);
}

Tensor affine_dequantize(const Tensor& packed, const OptionalTensor& perm, int64_t out_features, int64_t in_features,
                         int64_t bits, int64_t group_size, bool symmetric, bool scale_bf16, ScalarType dtype) {
    constexpr const char* kOp = "affine_dequantize";
    const Matrix m = affine_matrix(kOp, packed, in_features, {out_features, bits, group_size, symmetric, scale_bf16});
    return dequantize_cpu(kOp, packed, m, perm, dtype);
}

// The instruction set in use.
std::string cpu_isa() {
    return isa_name(current_isa());
}

// Lowers the instruction set in use, for tests and measurements; returns the one that was in use before.
std::string set_cpu_isa(const std::string& name) {
    const std::string before = cpu_isa();
    for (int isa = 0; isa < kIsaCount; ++isa) {
        if (name == isa_name(Isa(isa))) {
            STD_TORCH_CHECK(lower_isa(Isa(isa)), "set_cpu_isa: this machine has only ", isa_name(best_isa()));
            return before;
        }
    }
    STD_TORCH_CHECK(false, "set_cpu_isa: unknown instruction set ", name);
    return before;
}

// Reads a tensor on all threads and returns a number that depends on all of it: the bandwidth that kernels are held
// against. Only whole 256-byte pieces of each thread's share are read.
int64_t read_memory(const Tensor& data) {
    STD_TORCH_CHECK(data.is_cpu() && data.is_contiguous() && data.scalar_type() == ScalarType::Int,
                    "read_memory: data must be int32, contiguous and on the CPU");
    const uint32_t* words = static_cast<const uint32_t*>(data.const_data_ptr());
    std::atomic<uint32_t> result{0};
    torch::stable::parallel_for(0, data.numel() / 64, 4096, [&](int64_t first, int64_t last) {
        result ^= kernels().read(words + 64 * first, 64 * (last - first));
    });
    return result.load();
}

}  // namespace

STABLE_TORCH_LIBRARY(hf_spqr, m) {
    m.def(
        "spqr_linear(Tensor x, Tensor packed, Tensor outlier_row, Tensor outlier, Tensor? perm, Tensor? bias, "
        "int out_features, int bits, int group_size, int stat_bits, int second_group, bool int8_activations=False) -> "
        "Tensor");
    m.def(
        "spqr_dequantize(Tensor packed, Tensor outlier_row, Tensor outlier, Tensor? perm, int out_features, "
        "int in_features, int bits, int group_size, int stat_bits, int second_group, ScalarType dtype) -> Tensor");
    m.def(
        "affine_linear(Tensor x, Tensor packed, Tensor? perm, Tensor? bias, int out_features, int bits, "
        "int group_size, bool symmetric, bool scale_bf16, bool int8_activations=False) -> Tensor");
    m.def(
        "affine_dequantize(Tensor packed, Tensor? perm, int out_features, int in_features, int bits, "
        "int group_size, bool symmetric, bool scale_bf16, ScalarType dtype) -> Tensor");
    m.def(
        "quantize_activation(Tensor x, Tensor? perm, int bits, bool symmetric) -> (Tensor code, Tensor scale, "
        "Tensor zero)");
    m.def(
        "w_int8_linear(Tensor code, Tensor scale, Tensor zero, Tensor packed, Tensor? bias, int out_features, "
        "int bits, int group_size, bool symmetric, bool scale_bf16, ScalarType dtype, int act_bits=8) -> Tensor");
    m.def("cpu_isa() -> str");
    m.def("set_cpu_isa(str name) -> str");
    m.def("read_memory(Tensor data) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(hf_spqr, CPU, m) {
    m.impl("spqr_linear", TORCH_BOX(&spqr_linear));
    m.impl("spqr_dequantize", TORCH_BOX(&spqr_dequantize));
    m.impl("affine_linear", TORCH_BOX(&affine_linear));
    m.impl("affine_dequantize", TORCH_BOX(&affine_dequantize));
    m.impl("quantize_activation", TORCH_BOX(&quantize_activation));
    m.impl("w_int8_linear", TORCH_BOX(&w_int8_linear));
    m.impl("read_memory", TORCH_BOX(&read_memory));
}

STABLE_TORCH_LIBRARY_IMPL(hf_spqr, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
    m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}

}  // namespace hf_spqr

PyMODINIT_FUNC PyInit__C(void) {  // this macro, because it also makes the symbol visible
    static PyModuleDef definition = {
        PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&definition);
}
