// Runs cases written by tests/cuda/emulator.py through the CUDA kernels: emu IN OUT (see emu/cases.h).
#include <cstdio>
#include <cstring>
#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "emu/cases.h"
#include "emu/emu.h"

namespace hf_spqr {
namespace {

enum class Job : int64_t {
    linear = 0,
    dequantize = 1,
    finish = 2,
    quantize = 3,
    int8_linear = 4,
    stretch = 5,
    parts = 6,
    refused = 7
};

void run_tiled(const LinearArgs& a) {
    const Matrix& m = a.weight;
    int parts = 0;
    expect(hf_spqr_cuda_tiled_parts(&m, a.tokens, &parts) == 0 && parts > 0, "no kernel for this matrix");
    const int64_t stride = ceil_div(m.rows, 16) * 16;
    const Bytes sums(parts * a.tokens * stride * 4);
    memset(sums.data, 0xFF, size_t(sums.size));
    const TiledArgs t{m, a.x, a.x_stride, a.token_scale, a.tokens, parts, sums.as<float>()};
    expect(hf_spqr_cuda_linear_tiled(&t, nullptr) == 0, "tiled linear failed");
    const FinishArgs f{t.sums, DType::f32, parts, stride, m.rows, 0, m.rows, a.tokens, nullptr, a.bias, a.y, a.dtype};
    expect(hf_spqr_cuda_finish(&f, nullptr) == 0, "finish failed");
}

void run_linear(const Header& h, const Matrix& m, FILE* in, const Bytes& y) {
    const auto perm = read_tensor(in), bias = read_tensor(in), x = read_tensor(in);
    const DType dtype = DType(h.dtype);
    const ResidentArgs resident{m, x->data, perm->as<int32_t>(), bias->data, y.data, dtype, int(h.tokens), {}};
    const int status = hf_spqr_cuda_linear_resident(&resident, nullptr);
    if (status != kNoKernel) return expect(status == 0, "resident linear failed");
    LinearArgs a{m, x->as<uint16_t>(), h.columns, nullptr, int(h.tokens), bias->data, y.data, dtype, nullptr};
    Bytes half(h.tokens * prepared_stride(h.columns) * 2), scale(h.tokens * 4);
    if (needs_prepare(dtype, perm->data != nullptr, h.columns)) {
        a.x = half.as<uint16_t>();
        a.x_stride = prepared_stride(h.columns);
        a.token_scale = dtype == DType::f16 ? nullptr : scale.as<float>();
        const PrepareArgs p{x->data,
                            dtype,
                            perm->as<int32_t>(),
                            int(h.tokens),
                            int(h.columns),
                            half.as<uint16_t>(),
                            a.x_stride,
                            scale.as<float>()};
        expect(hf_spqr_cuda_prepare(&p, nullptr) == 0, "prepare failed");
    }
    if (a.tokens > kLinearTokens) return run_tiled(a);
    const Bytes columns(m.columns * kLinearTokens * 2);
    if (m.outlier) {
        const TransposeArgs t{a.x, a.x_stride, a.tokens, m.columns, columns.as<uint16_t>()};
        expect(hf_spqr_cuda_transpose(&t, nullptr) == 0, "transpose failed");
        a.x_columns = columns.as<uint16_t>();
    }
    expect(hf_spqr_cuda_can_fuse(&m, a.tokens), "no kernel for this matrix");
    expect(hf_spqr_cuda_linear(&a, nullptr) == 0, "linear failed");
}

// rows, tokens, first_row, part_rows, dtype; bits = parts, columns = their stride, wide = the product's dtype.
void run_finish(const Header& h, FILE* in, FILE* out) {
    const auto product = read_tensor(in), scale = read_tensor(in), bias = read_tensor(in), y = read_tensor(in);
    const FinishArgs a{product->data,      DType(h.wide),    int(h.bits), h.columns,
                       int(h.part_rows),   int(h.first_row), int(h.rows), int(h.tokens),
                       scale->as<float>(), bias->data,       y->data,     DType(h.dtype)};
    expect(hf_spqr_cuda_finish(&a, nullptr) == 0, "finish failed");
    write_result(*y, out);
}

// Codes, scales and zero points of x; `wide` = how far x lies from a 16-byte boundary.
void run_quantize(const Header& h, FILE* in, FILE* out) {
    const auto x = read_tensor(in), perm = read_tensor(in);
    const Bytes shifted(x->size + 16), code(h.tokens * h.columns), scale(h.tokens * 4), zero(h.tokens * 4);
    char* at = shifted.as<char>() + h.wide;
    memcpy(at, x->data, size_t(x->size));
    const QuantizeArgs a{at,          DType(h.dtype),   perm->as<int32_t>(), int(h.tokens),     int(h.columns),
                         int(h.bits), h.symmetric != 0, code.as<int8_t>(),   scale.as<float>(), zero.as<int32_t>()};
    expect(hf_spqr_cuda_quantize(&a, nullptr) == 0, "quantize failed");
    write_result(code, out);
    write_result(scale, out);
    write_result(zero, out);
}

// `wide` = bits of the activations.
void run_int8_linear(const Header& h, const Matrix& m, FILE* in, const Bytes& y) {
    const auto bias = read_tensor(in), code = read_tensor(in), scale = read_tensor(in), zero = read_tensor(in);
    Int8Args a{
        m,      code->as<int8_t>(), h.columns, scale->as<float>(), zero->as<int32_t>(), int(h.tokens), bias->data,
        y.data, DType(h.dtype),     false};
    expect(hf_spqr_cuda_takes_half_bytes(&m, a.tokens, int(h.wide), &a.half_bytes) == 0, "takes_half_bytes failed");
    const Bytes padded(h.tokens * padded_stride(h.columns));
    if (a.half_bytes) {
        const PadArgs p{a.x, a.tokens, m.columns, padded.as<int8_t>(), half_byte_stride(h.columns)};
        expect(hf_spqr_cuda_pack_half_bytes(&p, nullptr) == 0, "pack_half_bytes failed");
        a.x = p.out;
        a.x_stride = p.stride;
    } else if (needs_pad(h.columns)) {
        const PadArgs p{a.x, a.tokens, m.columns, padded.as<int8_t>(), padded_stride(h.columns)};
        expect(hf_spqr_cuda_pad(&p, nullptr) == 0, "pad failed");
        a.x = p.out;
        a.x_stride = p.stride;
    }
    expect(hf_spqr_cuda_int8_linear(&a, nullptr) == 0, "int8_linear failed");
}

// rows, columns, tokens, multiprocessors -> rows of a stretch of fp16 weights.
void run_stretch(const Header& h, FILE* out) {
    const Bytes result(sizeof(int64_t));
    *result.as<int64_t>() = stretch_rows(h.rows, 2 * h.columns, h.tokens, h.multiprocessors);
    write_result(result, out);
}

// A matrix without its bytes, tokens, multiprocessors -> parts of the columns.
void run_parts(const Header& h, FILE* out) {
    Matrix m{};
    m.format = Format(h.format);
    m.bits = int(h.bits);
    m.group = int(h.group);
    m.rows = int(h.rows);
    m.columns = int(h.columns);
    m.stat_bits = int(h.stat_bits);
    m.groups_per_second = int(h.groups_per_second);
    m.panels = panels_of(m);
    const Bytes result(sizeof(int64_t));
    int parts = 0;
    expect(hf_spqr_cuda_tiled_parts(&m, int(h.tokens), &parts) == 0, "tiled_parts failed");
    *result.as<int64_t>() = parts;
    write_result(result, out);
}

// Whether the kernel for few tokens is not to be had for an affine matrix. There are no bytes for it to run on.
void run_refused(const Header& h, FILE* out) {
    ResidentArgs a{};
    a.weight.format = Format::affine;
    a.weight.bits = int(h.bits);
    a.weight.group = kPerChannel;
    a.weight.rows = int(h.rows);
    a.weight.columns = int(h.columns);
    a.weight.panels = panels_of(a.weight);
    a.dtype = DType::f16;
    a.tokens = int(h.tokens);
    const Bytes result(sizeof(int64_t));
    *result.as<int64_t>() = hf_spqr_cuda_linear_resident(&a, nullptr) == kNoKernel;
    write_result(result, out);
}

void run_case(const Header& h, FILE* in, FILE* out) {
    emu::seed() = unsigned(h.seed);
    emu::limits() = {int(h.multiprocessors), int(h.shared_bytes)};
    const Job job = Job(h.job);
    if (job == Job::finish) return run_finish(h, in, out);
    if (job == Job::quantize) return run_quantize(h, in, out);
    if (job == Job::stretch) return run_stretch(h, out);
    if (job == Job::parts) return run_parts(h, out);
    if (job == Job::refused) return run_refused(h, out);
    const DType dtype = DType(h.dtype);
    const int64_t element = dtype == DType::f32 ? 4 : 2;
    const auto packed = read_tensor(in), outlier_row = read_tensor(in), outlier = read_tensor(in);
    Matrix m{};
    m.format = Format(h.format);
    m.bits = int(h.bits);
    m.group = int(h.group);
    m.rows = int(h.rows);
    m.columns = int(h.columns);
    m.packed = packed->as<uint32_t>();
    m.stat_bits = int(h.stat_bits);
    m.groups_per_second = int(h.groups_per_second);
    m.outlier_row = outlier_row->as<int32_t>();
    m.outlier = h.wide ? nullptr : outlier->as<uint32_t>();
    m.outlier_wide = h.wide ? outlier->as<uint64_t>() : nullptr;
    m.symmetric = h.symmetric;
    m.scale_bf16 = h.scale_bf16;
    m.panels = panels_of(m);
    expect(packed->size == int64_t(ceil_div(m.rows, 16)) * m.panels.words * 4,
           "packed has another size than the layout");
    const int64_t count = job == Job::dequantize ? h.part_rows * h.columns : h.tokens * h.rows;
    const Bytes result(count * element);
    memset(result.data, 0xEE, size_t(result.size));
    if (job == Job::linear) {
        run_linear(h, m, in, result);
    } else if (job == Job::int8_linear) {
        run_int8_linear(h, m, in, result);
    } else {
        const auto perm = read_tensor(in);
        const DequantizeArgs a{
            m, perm->as<int32_t>(), int(h.first_row), int(h.part_rows), result.data, h.columns, dtype, 0};
        expect(hf_spqr_cuda_dequantize(&a, nullptr) == 0, "dequantize failed");
    }
    write_result(result, out);
}

}  // namespace
}  // namespace hf_spqr

int main(int argc, char** argv) {
    return hf_spqr::run_cases(argc, argv, hf_spqr::run_case);
}
