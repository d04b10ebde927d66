// Codes out of tiles, and statistics out of panels, as fp32. Internal linkage (see vec.h).
#pragma once
#include "cpu/panels.h"
#include "cpu/three_bits.h"
#include "cpu/vec.h"

namespace hf_spqr {
namespace {

// Codes of column 2 * pair + parity of a tile, rows lane .. lane + kLanes.
template <int B>
inline VecU codes(const uint32_t* tile, int pair, int parity, int lane) {
    const int side = 16 * parity;
    if constexpr (B == 3) {
        if (pair == 15) {
            const VecU a = load(tile + lane), b = load(tile + kRows + lane), c = load(tile + 2 * kRows + lane);
            return (a >> (15 + side) & 1) | (b >> (14 + side) & 2) | (c >> (13 + side) & 4);
        }
        return load(tile + kVector3[pair] * kRows + lane) >> (kShift3[pair] + side) & 7;
    } else if constexpr (B == 5 || B == 6 || B == 7) {
        return codes<4>(tile, pair, parity, lane) | codes<B - 4>(tile + 4 * kRows, pair, parity, lane) << 4;
    } else {
        constexpr int kPerHalf = 16 / B;
        return load(tile + pair / kPerHalf * kRows + lane) >> (B * (pair % kPerHalf) + side) & ((1u << B) - 1);
    }
}

// out[column][row] = scale * code + shift. Statistics of the tile's first group at scale and shift, [group][row].
template <int B>
void decode_tile(const uint32_t* tile, const float* scale, const float* shift, int group_shift, float* out) {
    for (int lane = 0; lane < kRows; lane += kLanes) {
#pragma GCC unroll 4
        for (int first = 0; first < kColumns; first += 8) {  // eight columns never cross a group
            const int group = first >> group_shift;
            const VecF s = load(scale + group * kRows + lane), t = load(shift + group * kRows + lane);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                const VecU q = codes<B>(tile, (first + i) / 2, i & 1, lane);
                store(out + (first + i) * kRows + lane, to_float(q) * s + t);
            }
        }
    }
}

// sum[row] += (scale * code + shift) * x[column] over a tile, without the way through memory. Four sums, because one
// alone would wait for itself.
template <int B>
void dot_tile(const uint32_t* tile, const float* scale, const float* shift, int group_shift, const float* x,
              float* sum) {
    for (int lane = 0; lane < kRows; lane += kLanes) {
        VecF y[4] = {};
#pragma GCC unroll 4
        for (int first = 0; first < kColumns; first += 8) {
            const int group = first >> group_shift;
            const VecF s = load(scale + group * kRows + lane), t = load(shift + group * kRows + lane);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                const VecU q = codes<B>(tile, (first + i) / 2, i & 1, lane);
                y[i % 4] += (to_float(q) * s + t) * splat(x[first + i]);
            }
        }
        store(sum + lane, load(sum + lane) + ((y[0] + y[1]) + (y[2] + y[3])));
    }
}

// code[g][row] = column first + Step * g of a tile of statistics, as fp32.
template <int B, int Step>
void decode_statistics(const uint32_t* tile, int first, float* code) {
    for (int lane = 0; lane < kRows; lane += kLanes) {
#pragma GCC unroll 32
        for (int g = 0; g < kColumns / Step; ++g) {
            const VecU q = Step == 2 ? codes<B>(tile, g, first, lane) : codes<B>(tile, g / 2, g & 1, lane);
            store(code + g * kRows + lane, to_float(q));
        }
    }
}

using DecodeTile = void (*)(const uint32_t*, const float*, const float*, int, float*);
using DotTile = void (*)(const uint32_t*, const float*, const float*, int, const float*, float*);
using DecodeStatistics = void (*)(const uint32_t*, int, float*);

inline DecodeTile decode_tile_of(int bits) {
    constexpr DecodeTile kTable[8] = {decode_tile<1>, decode_tile<2>, decode_tile<3>, decode_tile<4>,
                                      decode_tile<5>, decode_tile<6>, decode_tile<7>, decode_tile<8>};
    return kTable[bits - 1];
}

inline DotTile dot_tile_of(int bits) {
    constexpr DotTile kTable[8] = {dot_tile<1>, dot_tile<2>, dot_tile<3>, dot_tile<4>,
                                   dot_tile<5>, dot_tile<6>, dot_tile<7>, dot_tile<8>};
    return kTable[bits - 1];
}

// SpQR: every other column is a scale code, the ones between are zero codes. Affine: every column is a zero point.
template <int Step>
inline DecodeStatistics decode_statistics_of(int bits) {
    constexpr DecodeStatistics kTable[8] = {decode_statistics<1, Step>, decode_statistics<2, Step>,
                                            decode_statistics<3, Step>, decode_statistics<4, Step>,
                                            decode_statistics<5, Step>, decode_statistics<6, Step>,
                                            decode_statistics<7, Step>, decode_statistics<8, Step>};
    return kTable[bits - 1];
}

// Scale and zero point of an affine panel, both [group][row].
inline void load_affine(const Matrix& m, const Panel& panel, DecodeStatistics decode_codes, float* scale,
                        float* zero) {
    const auto to_f32 = m.scale_bf16 ? from_bf16 : from_f16;
    const float middle = float(1 << (m.bits - 1));
    if (m.group == kPerChannel) {
        for (int r = 0; r < kRows; ++r) {
            const uint32_t word = panel.statistics[r];
            scale[r] = to_f32(uint16_t(word));
            zero[r] = m.symmetric ? middle : float(word >> 16);
        }
        return;
    }
    if (!m.symmetric) decode_codes(panel.statistics + (panel.groups + 1) / 2 * kRows, 0, zero);
    for (int g = 0; g < panel.groups; ++g) {
#if defined(__aarch64__)
        for (int lane = 0; lane < kRows; lane += kLanes) {
            const uint32x4_t words = vld1q_u32(panel.statistics + g / 2 * kRows + lane);
            const uint16x4_t half = g & 1 ? vshrn_n_u32(words, 16) : vmovn_u32(words);
            const float32x4_t s = m.scale_bf16 ? (float32x4_t)vshll_n_u16(half, 16) : vcvt_f32_f16((float16x4_t)half);
            vst1q_f32(scale + g * kRows + lane, s);
            if (m.symmetric) vst1q_f32(zero + g * kRows + lane, vdupq_n_f32(middle));
        }
#else
        for (int r = 0; r < kRows; ++r) {
            const uint32_t word = panel.statistics[g / 2 * kRows + r];
            scale[g * kRows + r] = to_f32(uint16_t(g & 1 ? word >> 16 : word));
            if (m.symmetric) zero[g * kRows + r] = middle;
        }
#endif
    }
}

// A panel's statistics as fp32: weight = scale * code + shift, both [group][row].
struct Statistics {
    alignas(64) float scale[kMaxGroups * kRows];
    alignas(64) float shift[kMaxGroups * kRows];

    // Also zeroes the groups after the last one that share its tile: their columns are padding.
    void decode(const Matrix& m, const Panel& panel, DecodeStatistics decode_codes) {
        if (m.format == Format::spqr) {
            decode_spqr(m, panel, decode_codes);
        } else {
            decode_affine(m, panel, decode_codes);
        }
        const int padding = (panel.groups + 3) / 4 * 4 - panel.groups;
        memset(scale + panel.groups * kRows, 0, padding * kRows * sizeof(float));
        memset(shift + panel.groups * kRows, 0, padding * kRows * sizeof(float));
    }

    void decode_spqr(const Matrix& m, const Panel& panel, DecodeStatistics decode_codes) {
        decode_codes(panel.statistics, 0, scale);
        decode_codes(panel.statistics, 1, shift);
        const uint16_t* second =
            reinterpret_cast<const uint16_t*>(panel.statistics + code_vectors(m, panel.groups) * kRows);
        for (int g = 0; g < panel.groups; ++g) {
            const uint16_t* four = second + 4 * (g / m.groups_per_second);
            const float ss = from_f16(four[0]), sz = from_f16(four[1]), zs = from_f16(four[2]), zz = from_f16(four[3]);
            for (int lane = g * kRows; lane < (g + 1) * kRows; lane += kLanes) {
                const VecF s = (load(scale + lane) - sz) * ss, z = (load(shift + lane) - zz) * zs;
                store(scale + lane, s);
                store(shift + lane, -s * z);
            }
        }
    }

    void decode_affine(const Matrix& m, const Panel& panel, DecodeStatistics decode_codes) {
        load_affine(m, panel, decode_codes, scale, shift);
        for (int i = 0; i < panel.groups * kRows; ++i) shift[i] *= -scale[i];
    }
};

}  // namespace
}  // namespace hf_spqr
