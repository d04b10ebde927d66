// Activations in bf16 for several tokens, in the order in which the kernels of BF16 take them.
#pragma once
#include "cpu/kernels.h"
#include "cpu/planes.h"

namespace hf_spqr {
namespace {

constexpr int kPairs = kColumns / 2;
constexpr int kTiles = 8;  // most of a stretch
// Most tokens of a share, as many as registers hold the sums of: of two row blocks, or of twice as many vectors by
// rounded weights. The first share by rounded weights has one row block.
constexpr int kMostOfShare = 8, kMostOfPrompt = 6;
constexpr int kFewestOfFirst = 5;

// Whether there are so many tokens that they are multiplied by weights rounded to bf16. Fewer are multiplied by codes,
// and their sums by scales in fp32, which rounds nothing of the weights but takes time for each token and group:
// longer groups gain by rounding only where there is a prompt, and at few tokens the weights would take more time.
inline bool rounds_weights(const Matrix& m, int64_t tokens) {
    if (m.bits < 2 || m.bits > 4) return false;
    const bool short_groups = m.group == 8 || m.group == 16;
    return tokens > (!short_groups ? kMaxTokens : m.bits == 4 ? 24 : 8);
}

// Whether outliers are multiplied apart from the dense weights, exactly, rather than added to the rounded ones.
inline bool outliers_apart(const Matrix& m, int64_t tokens) {
    return m.outlier_row && (tokens <= kMaxTokens || !rounds_weights(m, tokens));
}

// Tiles of a stretch: what is unpacked at a time. A panel is whole stretches, unless the matrix ends in one.
inline int stretch_tiles(const Matrix& m, int64_t tokens) {
    const bool short_panels = m.format == Format::spqr && m.group == 8;
    return rounds_weights(m, tokens) && !short_panels ? kTiles : kTiles / 2;
}

// The tokens in shares that are multiplied together: the first one, and the others, as equal as can be, since four and
// four are faster than six and two.
struct Shares {
    int64_t tokens, first, count;

    Shares(int64_t token_count, int64_t of_first, int most)
        : tokens(token_count), first(of_first), count(1 + ceil_div(token_count - of_first, most)) {}
    int64_t begin(int64_t share) const {
        return share == 0 ? 0 : share == count ? tokens : first + (tokens - first) * (share - 1) / (count - 1);
    }
    int64_t of(int64_t token) const {
        if (token < first) return 0;
        int64_t share = 1 + (token - first) * (count - 1) / (tokens - first);
        while (begin(share + 1) <= token) ++share;
        return share;
    }
};

// The first share by rounded weights is multiplied while these come about, unless they wait for outliers.
inline Shares shares_of(const Matrix& m, int64_t tokens) {
    if (!rounds_weights(m, tokens)) return {tokens, tokens / ceil_div(tokens, kMostOfShare), kMostOfShare};
    if (m.outlier_row && !outliers_apart(m, tokens)) return {tokens, 0, kMostOfPrompt};
    static_assert(2 * kFewestOfFirst <= 9 + 1);
    const int64_t half = ceil_div(tokens, 2);
    return {tokens, half < kMostOfShare ? half : kMostOfShare, kMostOfPrompt};
}

// Where the parts lie:
// - [stretch][share][tile][token]: 32 columns, two neighbours to a word, zero padded;
// - [block][token]: minus the sum of a block of columns in fp32 (a group, at most 128 columns), unless rounds_weights;
// - [column][token], tokens padded to 16, 32 or a multiple of 64, and a column of zeros, only where outliers are
// apart.
struct Halves {
    int64_t tiles, stretch, blocks, tokens, padded_tokens;
    Shares shares;
    char* memory;

    Halves(const Matrix& m, int64_t token_count, char* start)
        : stretch(stretch_tiles(m, token_count)),
          tokens(token_count),
          padded_tokens(outliers_apart(m, token_count) ? padded(token_count) : 0),
          shares(shares_of(m, token_count)),
          memory(start) {
        tiles = ceil_div(m.columns, 128) * 4;
        blocks = rounds_weights(m, token_count) ? 0 : tiles * kColumns / plane_block(m);
    }

    static int64_t padded(int64_t tokens) { return tokens <= 16 ? 16 : tokens <= 32 ? 32 : ceil_div(tokens, 64) * 64; }

    int64_t bytes() const {
        return tiles * tokens * kPairs * 4 + blocks * tokens * 4 + (zero_column() + 1) * padded_tokens * 2;
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
    int64_t zero_column() const { return tiles * kColumns; }
    uint16_t* column(int64_t i) const { return reinterpret_cast<uint16_t*>(minus_sum(blocks)) + i * padded_tokens; }
};

}  // namespace
}  // namespace hf_spqr
