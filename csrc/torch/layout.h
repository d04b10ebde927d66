// What the arguments of an op say of a packed matrix: checked alike on the CPU and on GPUs. For after cpu/matrix.h or
// cuda/matrix.h, whose Matrix this fills in.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace hf_spqr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct SpqrLayout {
    int64_t out_features, bits, group_size, stat_bits, second_group;
};

struct AffineLayout {
    int64_t out_features, bits, group_size;
    bool symmetric, scale_bf16;
};

// Throws unless there is such a matrix. `op` begins every message.
template <class Layout>
void check_layout(const char* op, int64_t in_features, const Layout& layout, int64_t least_bits) {
    const int64_t bits = layout.bits, group = layout.group_size;
    STD_TORCH_CHECK(layout.out_features > 0, op, ": out_features must be positive, got ", layout.out_features);
    STD_TORCH_CHECK(in_features > 0, op, ": in_features must be positive, got ", in_features);
    STD_TORCH_CHECK(bits >= least_bits && bits <= 8, op, ": bits must be ", least_bits, " to 8, got ", bits);
    STD_TORCH_CHECK(group == kPerChannel || group == 8 || group == 16 || group == 32 || group == 64 || group == 128,
                    op, ": group_size must be 8, 16, 32, 64, 128 or -1 (one group per row), got ", group);
}

inline void check_layout(const char* op, int64_t in_features, const SpqrLayout& layout) {
    check_layout(op, in_features, layout, 2);
    STD_TORCH_CHECK(layout.stat_bits >= 2 && layout.stat_bits <= 8, op, ": stat_bits must be 2 to 8, got ",
                    layout.stat_bits);
    STD_TORCH_CHECK(layout.second_group == 16 || layout.second_group == 32, op,
                    ": second_group must be 16 or 32, got ", layout.second_group);
}

inline void check_layout(const char* op, int64_t in_features, const AffineLayout& layout) {
    check_layout(op, in_features, layout, 1);
}

// The matrix of a layout that has been checked, without its bytes.
template <class Layout>
Matrix matrix_of(Format format, int64_t in_features, const Layout& layout) {
    Matrix m{};
    m.format = format;
    m.bits = int(layout.bits);
    m.group = int(layout.group_size);
    m.rows = decltype(m.rows)(layout.out_features);
    m.columns = decltype(m.columns)(in_features);
    return m;
}

inline Matrix matrix_of(int64_t in_features, const SpqrLayout& layout) {
    Matrix m = matrix_of(Format::spqr, in_features, layout);
    m.stat_bits = int(layout.stat_bits);
    m.groups_per_second = int(layout.second_group / 16);
    return m;
}

inline Matrix matrix_of(int64_t in_features, const AffineLayout& layout) {
    Matrix m = matrix_of(Format::affine, in_features, layout);
    m.symmetric = layout.symmetric;
    m.scale_bf16 = layout.scale_bf16;
    return m;
}

// The entries of `outlier` for a matrix of so many columns; the rest of it has been checked.
inline void set_outliers(Matrix& m, const Tensor& outlier_row, const Tensor& outlier) {
    if (outlier.size(0) == 0) return;
    const bool wide = outlier.scalar_type() == ScalarType::Long;
    m.outlier_row = static_cast<const int32_t*>(outlier_row.const_data_ptr());
    m.outlier = wide ? nullptr : static_cast<const uint32_t*>(outlier.const_data_ptr());
    m.outlier_wide = wide ? static_cast<const uint64_t*>(outlier.const_data_ptr()) : nullptr;
}

// Throws unless dtype is float32, bfloat16 or float16.
inline DType float_dtype(const char* op, const char* argument, ScalarType dtype) {
    if (dtype == ScalarType::Float) return DType::f32;
    if (dtype == ScalarType::BFloat16) return DType::bf16;
    STD_TORCH_CHECK(dtype == ScalarType::Half, op, ": ", argument, " must be float32, bfloat16 or float16");
    return DType::f16;
}

}  // namespace hf_spqr
