// A panel's statistics as fp32 scale and zero point per group and row. Internal linkage (see vec.h).
#pragma once
#include "cpu/panels.h"
#include "cpu/three_bits.h"
#include "cpu/unpack_vbmi.h"

namespace hf_spqr {
namespace {

// Where the codes of each group of an SpQR panel lie in the tile of statistics, for codes of at most four bits.
struct StatisticsPlaces {
    static constexpr int kGroups = 16;  // of a panel
    int vector[kGroups] = {};
    int32_t scale_shift[kGroups] = {}, zero_shift[kGroups] = {};
    alignas(64) float value[16] = {};  // of a field's low four bits

    constexpr explicit StatisticsPlaces(int stat_bits) {
        const int per_half = 16 / stat_bits;
        for (int g = 0; g < kGroups; ++g) {
            vector[g] = stat_bits == 3 ? kVector3[g] : g / per_half;
            scale_shift[g] = stat_bits == 3 ? kShift3[g] : stat_bits * (g % per_half);
            zero_shift[g] = scale_shift[g] + 16;
        }
        for (int i = 0; i < 16; ++i) value[i] = float(i & ((1 << stat_bits) - 1));
    }
};

// The vector of a 3-bit tile that is not stored: pair 15, gathered from the spare bits of the other three.
inline void load_spare(const uint32_t* tile, uint32_t* spare) {
    const __m512i bit0 = _mm512_set1_epi16(1), bit1 = _mm512_set1_epi16(2), bit2 = _mm512_set1_epi16(4);
    const __m512i a = _mm512_loadu_si512(tile), b = _mm512_loadu_si512(tile + kRows),
                  c = _mm512_loadu_si512(tile + 2 * kRows);
    const __m512i s = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(a, 15), bit0),
                                      _mm512_and_si512(_mm512_srli_epi16(b, 14), bit1));
    _mm512_store_si512(spare, _mm512_or_si512(s, _mm512_and_si512(_mm512_srli_epi16(c, 13), bit2)));
}

struct PanelScales {
    alignas(64) float scale[kMaxGroups * kRows];  // [group][row]
    alignas(64) float zero[kMaxGroups * kRows];

    // Also zeroes the groups after the last one that share its tile: their columns are padding.
    void load(const Matrix& m, const uint32_t* p, int groups) {
        for (int g = groups; g % 4 != 0; ++g) {
            _mm512_store_ps(scale + g * kRows, _mm512_setzero_ps());
            _mm512_store_ps(zero + g * kRows, _mm512_setzero_ps());
        }
        if (m.format == Format::spqr) {
            load_spqr(m, p, groups);
        } else if (m.group == kPerChannel) {
            load_channel(m, p);
        } else {
            load_affine(m, p, groups);
        }
    }

    static void unpack_codes(int bits, const uint32_t* tile, __m512i* w) {
        switch (bits) {
            case 1:
                return Unpack<1>()(tile, w);
            case 2:
                return Unpack<2>()(tile, w);
            case 3:
                return Unpack<3>()(tile, w);
            case 4:
                return Unpack<4>()(tile, w);
            case 5:
                return Unpack<5>()(tile, w);
            case 6:
                return Unpack<6>()(tile, w);
            case 7:
                return Unpack<7>()(tile, w);
            default:
                return Unpack<8>()(tile, w);
        }
    }

    // Byte `byte` of each word, as fp32.
    static __m512 code(__m512i w, int byte) {
        w = _mm512_and_si512(_mm512_srlv_epi32(w, _mm512_set1_epi32(8 * byte)), _mm512_set1_epi32(0xff));
        return _mm512_cvtepi32_ps(w);
    }

    // Codes of at most four bits: their values come from a table, whatever lies above them in a word.
    void load_spqr_narrow(const Matrix& m, const uint32_t* p, int groups) {
        static constexpr StatisticsPlaces kPlaces[] = {StatisticsPlaces(2), StatisticsPlaces(3), StatisticsPlaces(4)};
        const StatisticsPlaces& places = kPlaces[m.stat_bits - 2];
        const __m512 value = _mm512_load_ps(places.value);
        alignas(64) uint32_t spare[kRows];
        const uint32_t* codes[4] = {p, p + kRows, p + 2 * kRows, p + 3 * kRows};
        if (m.stat_bits == 3) {
            load_spare(p, spare);
            codes[3] = spare;
        }
        const uint16_t* second = reinterpret_cast<const uint16_t*>(p + code_vectors(m, groups) * kRows);
        for (int g = 0; g < groups; ++g) {
            const void* quad = second + 4 * (g / m.groups_per_second);
            alignas(16) float four[4];
            _mm_store_ps(four, _mm_cvtph_ps(_mm_loadl_epi64(static_cast<const __m128i*>(quad))));
            const __m512 ss = _mm512_set1_ps(four[0]), zs = _mm512_set1_ps(four[2]);
            const __m512i c = _mm512_loadu_si512(codes[places.vector[g]]);
            const __m512i s = _mm512_srlv_epi32(c, _mm512_set1_epi32(places.scale_shift[g]));
            const __m512i z = _mm512_srlv_epi32(c, _mm512_set1_epi32(places.zero_shift[g]));
            const __m512 sq = _mm512_sub_ps(_mm512_permutexvar_ps(s, value), _mm512_set1_ps(four[1]));
            const __m512 zq = _mm512_sub_ps(_mm512_permutexvar_ps(z, value), _mm512_set1_ps(four[3]));
            _mm512_store_ps(scale + g * kRows, _mm512_mul_ps(sq, ss));
            _mm512_store_ps(zero + g * kRows, _mm512_mul_ps(zq, zs));
        }
    }

    void load_spqr(const Matrix& m, const uint32_t* p, int groups) {
        if (m.stat_bits <= 4) return load_spqr_narrow(m, p, groups);
        __m512i w[8];
        unpack_codes(m.stat_bits, p, w);
        const uint16_t* second = reinterpret_cast<const uint16_t*>(p + code_vectors(m, groups) * kRows);
        for (int g = 0; g < groups; ++g) {  // columns 2g and 2g + 1 of the tile
            alignas(16) float four[4];
            const void* quad = second + 4 * (g / m.groups_per_second);
            _mm_store_ps(four, _mm_cvtph_ps(_mm_loadl_epi64(static_cast<const __m128i*>(quad))));
            const __m512 s = _mm512_sub_ps(code(w[g / 2], g % 2 * 2), _mm512_set1_ps(four[1]));
            const __m512 z = _mm512_sub_ps(code(w[g / 2], g % 2 * 2 + 1), _mm512_set1_ps(four[3]));
            _mm512_store_ps(scale + g * kRows, _mm512_mul_ps(s, _mm512_set1_ps(four[0])));
            _mm512_store_ps(zero + g * kRows, _mm512_mul_ps(z, _mm512_set1_ps(four[2])));
        }
    }

    // The 16-bit scale in the low or the high half of each word.
    static __m512 half(__m512i w, bool high, bool bf16) {
        if (bf16) {
            return _mm512_castsi512_ps(high ? _mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000)))
                                            : _mm512_slli_epi32(w, 16));
        }
        return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(high ? _mm512_srli_epi32(w, 16) : w));
    }

    void load_channel(const Matrix& m, const uint32_t* p) {
        const __m512i w = _mm512_loadu_si512(p);
        _mm512_store_ps(scale, half(w, false, m.scale_bf16));
        _mm512_store_ps(zero, m.symmetric ? _mm512_set1_ps(float(1 << (m.bits - 1)))
                                          : _mm512_cvtepi32_ps(_mm512_srli_epi32(w, 16)));
    }

    void load_affine(const Matrix& m, const uint32_t* p, int groups) {
        for (int g = 0; g < groups; ++g) {
            const __m512i w = _mm512_loadu_si512(p + g / 2 * kRows);
            _mm512_store_ps(scale + g * kRows, half(w, g & 1, m.scale_bf16));
        }
        if (m.symmetric) {
            const __m512 middle = _mm512_set1_ps(float(1 << (m.bits - 1)));
            for (int g = 0; g < groups; ++g) _mm512_store_ps(zero + g * kRows, middle);
            return;
        }
        __m512i w[8];
        unpack_codes(m.bits, p + (groups + 1) / 2 * kRows, w);
        for (int g = 0; g < groups; ++g) _mm512_store_ps(zero + g * kRows, code(w[g / 4], g % 4));
    }
};

}  // namespace
}  // namespace hf_spqr
