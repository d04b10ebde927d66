// One scale per row and more columns than int32 sums hold: a thread per output, in int64. Slow, and hardly ever
// needed.
#pragma once
#include "cuda/int8_product.cuh"

namespace hf_spqr {

constexpr int kWideTokens = 16;

// Grid: x = row blocks, y = stretches of 16 tokens.
static HF_KERNEL(kRows* kWideTokens, 1) int8_wide_kernel(const Int8Args a) {
    const Matrix& m = a.weight;
    const int in_block = dev::thread() % kRows;
    const int64_t row = dev::block_x() * kRows + in_block,
                  token = dev::block_y() * kWideTokens + dev::thread() / kRows;
    if (row >= m.rows || token >= a.tokens) return;
    const uint32_t* stream = m.packed + dev::block_x() * m.panels.words;
    const ScaleZero s = StatReader<Format::affine>(m, stream).read(0, in_block);
    const int8_t* x = a.x + token * a.x_stride;
    const int x_zero = a.zero[token], w_zero = int(s.zero);
    int64_t sum = 0;
    for (int column = 0; column < m.columns; ++column) {
        const uint32_t pair =
            code_pair(m.bits, column % kColumns >> 1, stream + tile_offset(m, column / kColumns), in_block);
        sum += int64_t(x[column] - x_zero) * (int(column & 1 ? pair >> 16 : pair & 0xffffu) - w_zero);
    }
    write_output(a, token, row, dev::mul(float(sum), dev::mul(a.scale[token], s.scale)));
}

}  // namespace hf_spqr
