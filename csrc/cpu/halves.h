// Activations in bf16 for several tokens, in the order in which the kernels of BF16 take them.
#pragma once
#include "cpu/kernels.h"
#include "cpu/planes.h"

namespace hf_spqr {
namespace {

constexpr int kPairs = kColumns / 2;
constexpr int kTiles = 8;         // most of a stretch
constexpr int kTokensAtOnce = 6;  // most of a share

// Whether the tokens are so many, a prompt, that they are multiplied by weights rounded to bf16. Fewer are multiplied by
// codes, and their sums by scales in fp32, which rounds nothing of the weights.
inline bool rounds_weights(const Matrix& m, int64_t tokens) {
    return tokens > kMaxTokens && m.bits >= 2 && m.bits <= 4;
}

// Tiles of a stretch: what is unpacked at a time. A panel is whole stretches, unless the matrix ends in one.
inline int stretch_tiles(const Matrix& m, int64_t tokens) {
    const bool short_panels = m.format == Format::spqr && m.group == 8;
    return rounds_weights(m, tokens) && !short_panels ? kTiles : kTiles / 2;
}

// The tokens in as equal shares as can be, which are multiplied together: four and four are faster than six and two.
struct Shares {
    int64_t tokens, count;

    explicit Shares(int64_t token_count) : tokens(token_count), count(ceil_div(token_count, kTokensAtOnce)) {}
    int64_t begin(int64_t share) const { return tokens * share / count; }
    int64_t of(int64_t token) const {
        int64_t share = token * count / tokens;
        while (begin(share + 1) <= token) ++share;
        return share;
    }
};

// Where the parts lie:
// - [stretch][share][tile][token]: 32 columns, two neighbours to a word, zero padded;
// and unless rounds_weights
// - [block][token]: minus the sum of a block of columns in fp32 (a group, at most 128 columns);
// - [column][token], tokens padded to 16, 32 or a multiple of 64, only where the matrix has outliers.
struct Halves {
    int64_t tiles, stretch, blocks, tokens, padded_tokens;
    char* memory;

    Halves(const Matrix& m, int64_t token_count, char* start)
        : stretch(stretch_tiles(m, token_count)),
          tokens(token_count),
          padded_tokens(m.outlier_row && !rounds_weights(m, token_count) ? padded(token_count) : 0),
          memory(start) {
        tiles = ceil_div(m.columns, 128) * 4;
        blocks = rounds_weights(m, token_count) ? 0 : tiles * kColumns / plane_block(m);
    }

    static int64_t padded(int64_t tokens) { return tokens <= 16 ? 16 : tokens <= 32 ? 32 : ceil_div(tokens, 64) * 64; }

    int64_t bytes() const {
        return tiles * tokens * kPairs * 4 + blocks * tokens * 4 + tiles * kColumns * padded_tokens * 2;
    }
    // Of a whole stretch, the first tile of which is i.
    uint32_t* share(int64_t i, int64_t first_token) const {
        const int64_t here = tiles - i < stretch ? tiles - i : stretch;
        return reinterpret_cast<uint32_t*>(memory) + (i * tokens + here * first_token) * kPairs;
    }
    // One token, `first` and `count` being those of its share.
    uint32_t* tile(int64_t i, int64_t token, int64_t first, int64_t count) const {
        return share(i / stretch * stretch, first) + (i % stretch * count + token - first) * kPairs;
    }
    float* minus_sum(int64_t block) const { return reinterpret_cast<float*>(share(tiles, 0)) + block * tokens; }
    uint16_t* column(int64_t i) const { return reinterpret_cast<uint16_t*>(minus_sum(blocks)) + i * padded_tokens; }
};

}  // namespace
}  // namespace hf_spqr
