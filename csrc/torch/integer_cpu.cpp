#include "torch/integer_cpu.h"
#include <vector>
#include "cpu/kernels.h"
#include "torch/split_cpu.h"

namespace hf_spqr {
namespace {

namespace stable = torch::stable;

// scale and zero [..., 1] for the tokens of code [..., K].
void check_grid(const char* name, const Tensor& t, ScalarType dtype, const char* dtype_name, const Tensor& code) {
    constexpr const char* kOp = "w_int8_linear";
    STD_TORCH_CHECK(t.is_cpu(), kOp, ": ", name, " must be on the CPU");
    STD_TORCH_CHECK(t.scalar_type() == dtype, kOp, ": ", name, " must have dtype ", dtype_name);
    bool same = t.dim() == code.dim() && t.size(-1) == 1;
    for (int64_t i = 0; same && i + 1 < code.dim(); ++i) same = t.size(i) == code.size(i);
    STD_TORCH_CHECK(same, kOp, ": ", name, " must have the shape of code with 1 for its last dimension");
}

int64_t tokens_per_task(int64_t columns) {
    return std::max<int64_t>(1, kElementsPerTask / columns);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_activation(const Tensor& x, const std::optional<Tensor>& perm,
                                                       int64_t bits, bool symmetric) {
    constexpr const char* kOp = "quantize_activation";
    STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x must have at least one dimension");
    STD_TORCH_CHECK(x.is_cpu(), kOp, ": x must be on the CPU");
    STD_TORCH_CHECK(bits >= 2 && bits <= 8, kOp, ": bits must be 2 to 8, got ", bits);
    const int64_t columns = x.size(-1);
    STD_TORCH_CHECK(columns > 0, kOp, ": x has no columns");
    const DType dtype = float_dtype(kOp, "x", x.scalar_type());
    const int32_t* order = permutation(kOp, perm, columns);
    const Tensor rows = stable::contiguous(x);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    Tensor code = stable::new_empty(x, shape, ScalarType::Char);
    shape.back() = 1;
    Tensor scale = stable::new_empty(x, shape, ScalarType::Float), zero = stable::new_empty(x, shape, ScalarType::Int);
    const QuantizeArgs args{rows.const_data_ptr(),
                            dtype,
                            order,
                            columns,
                            int(bits),
                            symmetric,
                            static_cast<int8_t*>(code.mutable_data_ptr()),
                            static_cast<float*>(scale.mutable_data_ptr()),
                            static_cast<int32_t*>(zero.mutable_data_ptr())};
    const IntegerKernels& k = kernels().integers;
    stable::parallel_for(0, scale.numel(), tokens_per_task(columns),
                         [&](int64_t first, int64_t last) { k.quantize(args, first, last); });
    return {code, scale, zero};
}

Tensor w_int8_linear(const Tensor& code, const Tensor& scale, const Tensor& zero, const Tensor& packed,
                     const std::optional<Tensor>& bias, int64_t out_features, int64_t bits, int64_t group_size,
                     bool symmetric, bool scale_bf16, ScalarType dtype, int64_t act_bits) {
    constexpr const char* kOp = "w_int8_linear";
    STD_TORCH_CHECK(code.dim() >= 1, kOp, ": code must have at least one dimension");
    STD_TORCH_CHECK(code.is_cpu(), kOp, ": code must be on the CPU");
    STD_TORCH_CHECK(code.scalar_type() == ScalarType::Char, kOp, ": code must have dtype int8");
    STD_TORCH_CHECK(act_bits >= 2 && act_bits <= 8, kOp, ": act_bits must be 2 to 8, got ", act_bits);
    const DType out_dtype = float_dtype(kOp, "dtype", dtype);
    const int64_t columns = code.size(-1);
    const Matrix m = affine_matrix(kOp, packed, columns, {out_features, bits, group_size, symmetric, scale_bf16});
    const void* bias_data = bias_pointer(kOp, bias, m.rows, dtype, "the dtype of the result");
    const int64_t tokens = code.numel() / columns;
    check_grid("scale", scale, ScalarType::Float, "float32", code);
    check_grid("zero", zero, ScalarType::Int, "int32", code);
    std::vector<int64_t> shape(code.sizes().begin(), code.sizes().end());
    shape.back() = m.rows;
    Tensor y = stable::new_empty(code, shape, dtype);
    if (tokens == 0) return y;

    const IntegerKernels& k = kernels().integers;
    const Tensor codes = stable::contiguous(code), scales = stable::contiguous(scale),
                 zeros = stable::contiguous(zero);
    Tensor prepared = stable::new_empty(code, {k.prepared_bytes(m, tokens)}, ScalarType::Byte);
    const IntegerArgs args{m,
                           static_cast<const int8_t*>(codes.const_data_ptr()),
                           static_cast<const float*>(scales.const_data_ptr()),
                           static_cast<const int32_t*>(zeros.const_data_ptr()),
                           tokens,
                           static_cast<char*>(prepared.mutable_data_ptr()),
                           bias_data,
                           y.mutable_data_ptr(),
                           out_dtype};
    stable::parallel_for(0, tokens, tokens_per_task(columns),
                         [&](int64_t first, int64_t last) { k.prepare(args, first, last); });
    over_row_blocks(m, [&](int64_t first, int64_t last) { k.linear(args, first, last); });
    return y;
}

}  // namespace hf_spqr
