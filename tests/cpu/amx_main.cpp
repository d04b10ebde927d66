// Runs cases written by tests/cpu/emulated.py through the AMX kernels, each as two threads would in turn: amx IN OUT
// (see emu/cases.h).
#include <cstring>
#include "cpu/amx.h"
#include "cpu/panels.h"
#include "emu/amx.h"
#include "weight_case.h"

namespace hf_spqr {
namespace {

enum class Job : int64_t { linear = 0, int8_linear = 4 };

// Both halves of [0, count), the first a multiple of `step`.
template <class Work>
void in_two_parts(int64_t count, int64_t step, const Work& work) {
    const int64_t middle = count / 2 / step * step;
    if (middle > 0) work(0, middle);
    work(middle, count);
    expect(!emu::tiles().configured, "tiles were not released");
}

void run_linear(const Header& h, const Matrix& m, FILE* in, const Bytes& y) {
    const auto perm = read_tensor(in), bias = read_tensor(in), x = read_tensor(in);
    expect(has_prompt_amx(m, h.tokens), "no kernel for this matrix");
    const Bytes tiles(tokens_bytes_amx(m, h.tokens));
    memset(tiles.data, 0xEE, size_t(tiles.size));
    PrepareArgs prepare{};
    prepare.x = x->data;
    prepare.x_stride = prepare.columns = m.columns;
    prepare.dtype = DType::bf16;
    prepare.perm = perm->as<int32_t>();
    prepare.weight = &m;
    prepare.tokens = h.tokens;
    prepare.planes = tiles.as<char>();
    in_two_parts(h.tokens, kPrepareTokens,
                 [&](int64_t first, int64_t last) { prepare_prompt_amx(prepare, first, last); });
    LinearArgs a{};
    a.weight = m;
    a.planes = tiles.as<char>();
    a.tokens = int(h.tokens);
    a.bias = bias->data;
    a.y = y.data;
    a.y_stride = m.rows;
    a.dtype = DType::bf16;
    in_two_parts(ceil_div(m.rows, kRows), 1, [&](int64_t first, int64_t last) { prompt_amx(a, first, last); });
}

void run_int8_linear(const Header& h, const Matrix& m, FILE* in, const Bytes& y) {
    const auto bias = read_tensor(in), code = read_tensor(in), scale = read_tensor(in), zero = read_tensor(in);
    expect(has_integer_amx(m, h.tokens), "no kernel for this matrix");
    const Bytes prepared(prepared_bytes_amx(m, h.tokens));
    memset(prepared.data, 0xEE, size_t(prepared.size));
    const IntegerArgs a{
        m,      code->as<int8_t>(), scale->as<float>(), zero->as<int32_t>(), h.tokens, prepared.as<char>(), bias->data,
        y.data, DType(h.dtype)};
    in_two_parts(h.tokens, 1, [&](int64_t first, int64_t last) { prepare_integer_amx(a, first, last); });
    in_two_parts(ceil_div(m.rows, kRows), 1, [&](int64_t first, int64_t last) { integer_linear_amx(a, first, last); });
}

void run_case(const Header& h, FILE* in, FILE* out) {
    const Weight weight(h, in);
    const Matrix& m = weight.m;
    const Bytes y(h.tokens * h.rows * (DType(h.dtype) == DType::f32 ? 4 : 2));
    memset(y.data, 0xEE, size_t(y.size));
    if (Job(h.job) == Job::linear) {
        run_linear(h, m, in, y);
    } else {
        run_int8_linear(h, m, in, y);
    }
    write_result(y, out);
}

}  // namespace
}  // namespace hf_spqr

int main(int argc, char** argv) {
    return hf_spqr::run_cases(argc, argv, hf_spqr::run_case);
}
