#include "torch/int8_cuda.h"
#include <vector>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace hf_spqr {
namespace {

namespace stable = torch::stable;

// scale and zero [..., 1] for the tokens of code [..., K].
void check_per_token(const char* op, const char* name, int device, const Tensor& t, ScalarType dtype,
                     const char* dtype_name, const std::vector<int64_t>& shape) {
    check_tensor(op, name, device, t, dtype, dtype_name);
    bool same = t.dim() == int64_t(shape.size());
    for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(int64_t(i)) == shape[i];
    STD_TORCH_CHECK(same, op, ": ", name, " must have the shape of code with 1 for its last dimension");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_cuda(const char* op, const Tensor& x, const OptionalTensor& perm,
                                                 int64_t bits, bool symmetric) {
    STD_TORCH_CHECK(bits >= 2 && bits <= 8, op, ": bits must be 2 to 8, got ", bits);
    const int device = device_of(op, "x", x);
    const stable::accelerator::DeviceGuard guard(device);
    const int64_t columns = x.size(-1);
    STD_TORCH_CHECK(columns > 0 && columns < kMostFeatures, op, ": x must have 1 .. 2^26 columns, got ", columns);
    const DType dtype = float_dtype(op, "x", x.scalar_type());
    const int32_t* order = permutation(op, device, perm, columns);
    const int64_t tokens = token_count(op, x.numel(), columns);
    const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    std::vector<int64_t> per_token = shape;
    per_token.back() = 1;
    Tensor code = stable::new_empty(x, shape, ScalarType::Char);
    Tensor scale = stable::new_empty(x, per_token, ScalarType::Float);
    Tensor zero = stable::new_empty(x, per_token, ScalarType::Int);
    if (tokens > 0) {
        const Tensor flat = stable::contiguous(x);
        const QuantizeArgs args{flat.const_data_ptr(),
                                dtype,
                                order,
                                int(tokens),
                                int(columns),
                                int(bits),
                                symmetric,
                                static_cast<int8_t*>(code.mutable_data_ptr()),
                                static_cast<float*>(scale.mutable_data_ptr()),
                                static_cast<int32_t*>(zero.mutable_data_ptr())};
        check_launch(op, "quantize", hf_spqr_cuda_quantize(&args, current_stream(device)));
    }
    return {code, scale, zero};
}

Tensor int8_linear_cuda(const char* op, const Tensor& any_code, const Tensor& any_scale, const Tensor& any_zero,
                        const Matrix& m, const OptionalTensor& bias, ScalarType dtype, int64_t act_bits) {
    STD_TORCH_CHECK(act_bits >= 2 && act_bits <= 8, op, ": act_bits must be 2 to 8, got ", act_bits);
    const int device = int(any_code.get_device_index());
    const stable::accelerator::DeviceGuard guard(device);
    const Tensor code = stable::contiguous(any_code), scale = stable::contiguous(any_scale),
                 zero = stable::contiguous(any_zero);
    check_tensor(op, "code", device, code, ScalarType::Char, "int8");
    std::vector<int64_t> shape(code.sizes().begin(), code.sizes().end());
    shape.back() = 1;
    check_per_token(op, "scale", device, scale, ScalarType::Float, "float32", shape);
    check_per_token(op, "zero", device, zero, ScalarType::Int, "int32", shape);
    shape.back() = m.rows;
    const DType kind = float_dtype(op, "dtype", dtype);
    const int64_t tokens = token_count(op, code.numel(), m.columns);
    Tensor y = stable::new_empty(code, shape, dtype);
    Int8Args args{m,
                  static_cast<const int8_t*>(code.const_data_ptr()),
                  m.columns,
                  static_cast<const float*>(scale.const_data_ptr()),
                  static_cast<const int32_t*>(zero.const_data_ptr()),
                  int(tokens),
                  bias_of(op, device, bias, m.rows, dtype, "that of the result"),
                  y.mutable_data_ptr(),
                  kind,
                  false};
    if (tokens > 0) {
        void* stream = current_stream(device);
        check_launch(op, "takes_half_bytes",
                     hf_spqr_cuda_takes_half_bytes(&m, args.tokens, int(act_bits), &args.half_bytes));
        OptionalTensor padded;
        if (args.half_bytes || needs_pad(m.columns) || reinterpret_cast<uintptr_t>(args.x) % 16 != 0) {
            const int64_t stride = args.half_bytes ? half_byte_stride(m.columns) : padded_stride(m.columns);
            padded = stable::new_empty(code, {tokens, stride});
            const PadArgs pad{args.x, args.tokens, m.columns, static_cast<int8_t*>(padded->mutable_data_ptr()),
                              stride};
            check_launch(op, "pad", (args.half_bytes ? hf_spqr_cuda_pack_half_bytes : hf_spqr_cuda_pad)(&pad, stream));
            args.x = pad.out;
            args.x_stride = stride;
        }
        check_launch(op, "int8_linear", hf_spqr_cuda_int8_linear(&args, stream));
    }
    return y;
}

}  // namespace hf_spqr
