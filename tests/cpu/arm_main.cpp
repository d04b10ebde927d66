// Runs cases written by tests/cpu/arm.py through the kernels that this processor gets: PROGRAM IN OUT (see
// emu/cases.h). Without files it says which these are. A linear is run `seed` times, so that its instructions can be
// counted.
#include <cstring>
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "weight_case.h"

namespace hf_spqr {
namespace {

enum class Job : int64_t { linear = 0, dequantize = 1, quantize = 3, int8_linear = 4 };

int64_t size_of(int64_t dtype) {
    return DType(dtype) == DType::f32 ? 4 : 2;
}

// Memory that holds nothing in particular.
struct Scratch : Bytes {
    explicit Scratch(int64_t n) : Bytes(n) {
        if (n > 0) memset(data, 0xEE, size_t(n));
    }
};

// Both halves of [0, count), the first a multiple of `step`, as two threads would.
template <class Work>
void in_two_parts(int64_t count, int64_t step, const Work& work) {
    const int64_t middle = count / 2 / step * step;
    if (middle > 0) work(0, middle);
    work(middle, count);
}

void run_linear(const Header& h, FILE* in, FILE* out) {
    const Weight weight(h, in);
    const Matrix& m = weight.m;
    const auto perm = read_tensor(in), bias = read_tensor(in), x = read_tensor(in);
    const Kernels& k = kernels();
    const DType dtype = DType(h.dtype);
    expect(h.tokens <= kMaxTokens, "so many tokens are not multiplied by a kernel");
    const int64_t padded = ceil_div(m.columns, kColumns) * kColumns;
    const Scratch prepared(h.tokens * padded * 4), planes(k.planes_bytes ? k.planes_bytes(m, dtype, h.tokens) : 0);
    const PrepareArgs prepare{
        x->data, m.columns, dtype,    perm->as<int32_t>(), m.columns, padded, prepared.as<float>(),
        padded,  &m,        h.tokens, planes.as<char>()};
    in_two_parts(h.tokens, kPrepareTokens, [&](int64_t first, int64_t last) { k.prepare(prepare, first, last); });
    const Scratch y(h.tokens * h.rows * size_of(h.dtype));
    const LinearArgs a{
        m, prepared.as<float>(), padded, planes.as<char>(), int(h.tokens), bias->data, y.data, m.rows, dtype};
    for (int64_t i = 0; i < h.seed; ++i) {
        in_two_parts(ceil_div(m.rows, kRows), 1, [&](int64_t first, int64_t last) { k.linear(a, first, last); });
    }
    write_result(y, out);
}

void run_dequantize(const Header& h, FILE* in, FILE* out) {
    const Weight weight(h, in);
    const Matrix& m = weight.m;
    const auto perm = read_tensor(in);
    const int64_t row_bytes = m.columns * size_of(h.dtype);
    const Scratch y(m.rows * row_bytes);
    for (int64_t i = 0; i < h.seed; ++i) {
        in_two_parts(ceil_div(m.rows, kRows), 1, [&](int64_t first, int64_t last) {
            const DequantizeArgs a{m, perm->as<int32_t>(), y.as<char>() + first * kRows * row_bytes, m.columns,
                                   DType(h.dtype)};
            kernels().dequantize(a, first, last);
        });
    }
    write_result(y, out);
}

void run_quantize(const Header& h, FILE* in, FILE* out) {
    const auto x = read_tensor(in), perm = read_tensor(in);
    const Scratch code(h.tokens * h.columns), scale(h.tokens * 4), zero(h.tokens * 4);
    const QuantizeArgs a{x->data,           DType(h.dtype),    perm->as<int32_t>(), h.columns,         int(h.bits),
                         bool(h.symmetric), code.as<int8_t>(), scale.as<float>(),   zero.as<int32_t>()};
    in_two_parts(h.tokens, 1, [&](int64_t first, int64_t last) { kernels().integers.quantize(a, first, last); });
    write_result(code, out);
    write_result(scale, out);
    write_result(zero, out);
}

void run_int8_linear(const Header& h, FILE* in, FILE* out) {
    const Weight weight(h, in);
    const Matrix& m = weight.m;
    const auto bias = read_tensor(in), code = read_tensor(in), scale = read_tensor(in), zero = read_tensor(in);
    const IntegerKernels& k = kernels().integers;
    const Scratch prepared(k.prepared_bytes(m, h.tokens)), y(h.tokens * h.rows * size_of(h.dtype));
    const IntegerArgs a{
        m,      code->as<int8_t>(), scale->as<float>(), zero->as<int32_t>(), h.tokens, prepared.as<char>(), bias->data,
        y.data, DType(h.dtype)};
    in_two_parts(h.tokens, 1, [&](int64_t first, int64_t last) { k.prepare(a, first, last); });
    for (int64_t i = 0; i < h.seed; ++i) {
        in_two_parts(ceil_div(m.rows, kRows), 1, [&](int64_t first, int64_t last) { k.linear(a, first, last); });
    }
    write_result(y, out);
}

void run_case(const Header& h, FILE* in, FILE* out) {
    switch (Job(h.job)) {
        case Job::linear:
            return run_linear(h, in, out);
        case Job::dequantize:
            return run_dequantize(h, in, out);
        case Job::quantize:
            return run_quantize(h, in, out);
        default:
            return run_int8_linear(h, in, out);
    }
}

}  // namespace
}  // namespace hf_spqr

int main(int argc, char** argv) {
    if (argc == 1) return puts(hf_spqr::isa_name(hf_spqr::current_isa())) < 0;
    return hf_spqr::run_cases(argc, argv, hf_spqr::run_case);
}
