// Few tokens by ARM's integer dot product: codes as they are times the digits of activations, and each group's sums
// by its scale. Everything else is left to the kernels of NEON.
#include "cpu/digits.h"
#include "cpu/generic.h"

namespace hf_spqr {
namespace {

constexpr int kStretch = 8;  // tiles whose digits stay in the first-level cache while four passes take four rows each

// Whether groups are such that words of codes lie within them, and so many tokens are not better off with dense tiles,
// which are dequantized once for all tokens: short groups cost time for each token.
bool takes(const Matrix& m, int64_t tokens) {
    if (m.group != kPerChannel && (m.group < 16 || m.group < columns_together(m.bits))) return false;
    return tokens <= (m.group == 16 ? 8 : kMaxTokens);
}

// y[token][row] += what 4L rows and T tokens make of one block, of which these are the sums of products.
template <int L, int T>
__attribute__((always_inline)) inline void add_block(const int32x4_t (*sums)[kDigits * T], const BlockOfToken* block,
                                                     const float* scale, const float* shift, float32x4_t (*y)[T]) {
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) {
        const float32x4_t s = vld1q_f32(scale + 4 * l), z = vld1q_f32(shift + 4 * l);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            const int32x4_t* d = sums[l] + kDigits * t;
            const float32x4_t high = vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(d[0], 8), d[1]));
            const float32x4_t sum = vfmaq_n_f32(vcvtq_f32_s32(d[2]), high, 256.f);
            y[l][t] = vfmaq_n_f32(y[l][t], z, block[t].sum);
            y[l][t] = vfmaq_f32(y[l][t], s, vmulq_n_f32(sum, block[t].scale));
        }
    }
}

// Tiles [tile, tile + tiles) of a panel, whole blocks unless the matrix ends: sum[token][row] += their products with T
// tokens. Statistics and activations are those of the first of them; from block to block statistics go on by
// `group_step`. Short: groups of 16, two to a tile.
template <int B, int T, bool Short>
void add_stretch(const uint32_t* codes, int tiles, int block_tiles, int group_step, const int8_t* x,
                 const BlockOfToken* blocks, const float* scale, const float* shift, float* sum) {
    constexpr int L = T == 1 ? 4 : T == 2 ? 2 : 1;
    for (int lane = 0; lane < kRows; lane += 4 * L) {
        float32x4_t y[L][T] = {};
        const uint32_t* tile = codes;
        const int8_t* digit = x;
        const BlockOfToken* block = blocks;
        int group = lane;
        for (int left = tiles; left > 0;) {
            int32x4_t s[L][kDigits * T] = {};
            for (int end = left > block_tiles ? left - block_tiles : 0; left > end; --left) {
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    int8x16_t v[kDigits * T];
#pragma GCC unroll 12
                    for (int n = 0; n < kDigits * T; ++n) v[n] = vld1q_s8(digit + n * kColumns + 16 * half);
                    add_products<B, L, kDigits * T, B == 3>(tile, lane, 4 * half, v, s);
                    if (Short) {
                        add_block<L, T>(s, block, scale + group, shift + group, y);
                        block += T, group += kRows;
                        memset(s, 0, sizeof s);
                    }
                }
                tile += B * kRows, digit += kDigits * T * kColumns;
            }
            if (Short) continue;
            add_block<L, T>(s, block, scale + group, shift + group, y);
            block += T, group += group_step;
        }
        for (int l = 0; l < L; ++l) {
            for (int t = 0; t < T; ++t) {
                float* to = sum + t * kRows + lane + 4 * l;
                vst1q_f32(to, vaddq_f32(vld1q_f32(to), y[l][t]));
            }
        }
    }
}

using AddStretch = decltype(&add_stretch<8, 1, true>);

template <int B>
AddStretch stretch_of(int tokens, bool short_groups) {
    constexpr AddStretch kLong[kMostTogether] = {add_stretch<B, 1, false>, add_stretch<B, 2, false>,
                                                 add_stretch<B, 3, false>, add_stretch<B, 4, false>};
    constexpr AddStretch kShort[kMostTogether] = {add_stretch<B, 1, true>, add_stretch<B, 2, true>,
                                                  add_stretch<B, 3, true>, add_stretch<B, 4, true>};
    return short_groups ? kShort[tokens - 1] : kLong[tokens - 1];
}

AddStretch stretch_of(const Matrix& m, int tokens) {
    constexpr decltype(&stretch_of<8>) kTable[8] = {stretch_of<1>, stretch_of<2>, stretch_of<3>, stretch_of<4>,
                                                    stretch_of<5>, stretch_of<6>, stretch_of<7>, stretch_of<8>};
    return kTable[m.bits - 1](tokens, m.group == 16);
}

void add_panel(const Matrix& m, const Panel& panel, const Statistics& statistics, const Digits& digits, float* sum) {
    const int64_t columns = block_columns(m);
    const int block_tiles = columns < kColumns ? 1 : int(columns / kColumns);
    const int group_step = m.group == columns ? kRows : 0;  // a longer group has several blocks
    for (int64_t tile = 0; tile < panel.count; tile += kStretch) {
        const int tiles = int(panel.count - tile < kStretch ? panel.count - tile : kStretch);
        const int group = group_of_tile(m, tile) * kRows;
        const int64_t first = panel.first_tile + tile, block = first * kColumns / columns;
        for (int64_t share = 0; share < digits.shares; ++share) {
            stretch_of(m, digits.count(share))(panel.tiles + tile * m.bits * kRows, tiles, block_tiles, group_step,
                                               digits.tile(share, first), digits.block(share, block),
                                               statistics.scale + group, statistics.shift + group,
                                               sum + digits.begin(share) * kRows);
        }
    }
}

void linear_dotprod(const LinearArgs& a, int64_t first_block, int64_t last_block) {
    const Matrix& m = a.weight;
    if (!takes(m, a.tokens)) return linear_generic(a, first_block, last_block);
    alignas(64) float sum[kMaxTokens * kRows];
    Statistics statistics;
    const Digits digits(m, a.tokens, a.planes);
    const DecodeStatistics decode =
        m.format == Format::spqr ? decode_statistics_of<2>(m.stat_bits) : decode_statistics_of<1>(m.bits);
    for (int64_t block = first_block; block < last_block; ++block) {
        memset(sum, 0, sizeof(float) * a.tokens * kRows);
        for (PanelWalk walk(m, block); walk.next();) {
            statistics.decode(m, walk.panel, decode);
            if (code_offset(m.bits)) {
                for (int i = 0; i < walk.panel.groups * kRows; ++i) {
                    statistics.shift[i] += float(code_offset(m.bits)) * statistics.scale[i];
                }
            }
            add_panel(m, walk.panel, statistics, digits, sum);
        }
        finish_rows(a, block, sum);
    }
}

int64_t planes_bytes(const Matrix& m, DType, int64_t tokens) {
    return takes(m, tokens) ? Digits(m, tokens, nullptr).bytes() : 0;
}

void prepare_dotprod(const PrepareArgs& a, int64_t first, int64_t last) {
    const Matrix& m = *a.weight;
    prepare_generic(a, first, last);
    if (!takes(m, a.tokens)) return;
    const Digits digits(m, a.tokens, a.planes);
    const Arrangement order(m.bits);
    for (int64_t share = 0; share < digits.shares; ++share) {
        for (int64_t t = digits.begin(share); t < digits.begin(share + 1); ++t) {
            if (first <= t && t < last)
                split_token(m, order, a.out + t * a.out_stride, digits, share, t - digits.begin(share));
        }
    }
}

}  // namespace

extern const Kernels kDotprodKernels = {planes_bytes,    nullptr,         nullptr,
                                        prepare_dotprod, linear_dotprod,  dequantize_generic,
                                        read_generic,    kDotprodIntegers};

}  // namespace hf_spqr
