// The engine of integer_linear.h for AMX: a tile of weights is sixteen steps of VNNI's unpacked codes as they lie.
#include "cpu/amx.h"
#include "cpu/integer_bytes.h"
#include "cpu/product_amx.h"

namespace hf_spqr {
namespace {

struct TileBytes : Bytes {
    static constexpr bool kTokenTiles = true;
    static constexpr int kFew = 0, kFewBlocks = 0;

    // Steps beyond the last whole tile meet zeros among the activations. Sums of padding tokens are never read.
    template <int R>
    static void multiply(const char* w, int steps, const int8_t* x, int64_t x_block, int tokens, int32_t* sum,
                         const char* const* ahead, int bits) {
        constexpr int kStride = R * kRows * 4;
        TileProduct p{nullptr, x_block, nullptr, 64, R * 64, 16 * R * 64, (steps + 15) / 16, nullptr, kStride, true};
        const int lines = steps < 16 ? bits * steps / 8 : 2 * bits;  // of codes, of a tile
        for (int r = 0; r < R; r += 2) {
            const bool two_blocks = r + 1 < R;
            for (int t = 0; t < tokens; t += 2 * kTokenTile) {
                p.x = reinterpret_cast<const char*>(x) + t / kTokenTile * x_block;
                p.w = w + r * 64;
                p.sums = reinterpret_cast<char*>(sum) + t * kStride + r * 64;
                // the first tokens fetch for the first row block, the next ones for the second
                const int fetch = t / (2 * kTokenTile);
                p.ahead = ahead[two_blocks && fetch == 1 ? r + 1 : r];
                p.ahead_lines = fetch < (two_blocks ? 2 : 1) ? lines : 0;
                multiply_tiles<true>(p, tokens - t > kTokenTile, two_blocks);
            }
        }
    }
};

// Words of a token that are multiplied at once.
int words_of(const Matrix& m) {
    return m.group == 32 ? 8 : 16;
}

}  // namespace

bool has_integer_amx(const Matrix& m, int64_t tokens) {
    return tokens >= kFewestAmx && (m.group == kPerChannel || m.group >= 32);
}

int64_t prepared_bytes_amx(const Matrix& m, int64_t tokens) {
    return prepared_bytes<TileBytes>(m, tokens);
}

void prepare_integer_amx(const IntegerArgs& a, int64_t first, int64_t last) {
    prepare_integers<TileBytes>(a, first, last);
}

void integer_linear_amx(const IntegerArgs& a, int64_t first, int64_t last) {
    const Tiles tiles(words_of(a.weight));
    integer_linear<TileBytes>(a, first, last);
}

}  // namespace hf_spqr
