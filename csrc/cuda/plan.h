// What csrc/torch and the tests must decide alike: how x goes into the kernels, and how dense weights are cut.
#pragma once
#include "cuda/kernels.h"

namespace hf_spqr {

// fp16 in stored order with rows of whole 16-byte pieces goes in as it is.
inline bool needs_prepare(DType dtype, bool permuted, int64_t columns) {
    return dtype != DType::f16 || permuted || columns % 8 != 0;
}

inline int64_t prepared_stride(int64_t columns) {
    return (columns + 7) / 8 * 8;
}

// The integer kernels take int8 in stored order with rows of whole 16-byte pieces as it is.
inline bool needs_pad(int64_t columns) {
    return columns % 16 != 0;
}

inline int64_t padded_stride(int64_t columns) {
    return (columns + 15) / 16 * 16;
}

// Bytes of a token's codes as half bytes: whole tiles of the weights.
inline int64_t half_byte_stride(int64_t columns) {
    return (columns + 31) / 32 * 16;
}

// fp32 x becomes fp16 in the tiled kernel. From 65 tokens on, where dense weights take not much longer, it stays.
inline int most_tiled_tokens(DType dtype) {
    return dtype == DType::f32 ? 64 : kTiledTokens;
}

constexpr int64_t kScratchBytes = 96 << 20;  // of dense weights at a time
constexpr int64_t kProductBlock = 128;       // rows and tokens of a block of a matrix product, about

// Rows of dense weights that are made and multiplied at a time, a multiple of 16. A product whose last wave of blocks
// leaves multiprocessors idle costs as much as a full one, so of all numbers of stretches whose weights fit the
// scratch the one with the fewest waves is taken, and of equals the least.
inline int64_t stretch_rows(int64_t rows, int64_t row_bytes, int64_t tokens, int64_t multiprocessors) {
    const auto ceil_of = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t most = kScratchBytes / row_bytes / 16 * 16;
    if (most < kProductBlock) return most > 16 ? most : 16;
    if (rows <= kProductBlock) return ceil_of(rows, 16) * 16;
    int64_t best = 0, fewest = 0;
    const int64_t least = ceil_of(rows, most);
    for (int64_t parts = least; parts <= 2 * least + 1; ++parts) {
        const int64_t part = ceil_of(ceil_of(rows, parts), kProductBlock) * kProductBlock;
        if (part > most) continue;
        const int64_t blocks = ceil_of(tokens, kProductBlock) * (part / kProductBlock);
        const int64_t waves = ceil_of(rows, part) * ceil_of(blocks, multiprocessors);
        if (best == 0 || waves < fewest) {
            best = part;
            fewest = waves;
        }
    }
    return best > 0 ? best : most;
}

}  // namespace hf_spqr
