// The weights of a tile rounded to bf16, by tables: a row has no more than 2^bits weights in a group of columns, so
// these are computed and rounded once, and looked up byte by byte. Internal linkage (see vec.h).
#pragma once
#include "cpu/codes_bf16.h"

namespace hf_spqr {
namespace {

constexpr int kQuads = kColumns / 4;  // of a tile: four neighbouring columns

// Two vectors have the four columns of 16 rows. Two words are a row's, a pair of columns each:
// vector 0 has rows 0, 1, 4, 5, 8, 9, 12 and 13, vector 1 the rows after these.
constexpr int kSides = 2;
inline int quad_side(int row) {
    return row / 2 % 2;
}
inline int quad_word(int row, int pair) {
    return row / 4 * 4 + row % 2 * 2 + pair;
}

// Sums by row of products with such vectors and the same four columns of x.
inline __m512 sum_pairs(__m512 side0, __m512 side1) {
    return _mm512_add_ps(_mm512_shuffle_ps(side0, side1, 0x88), _mm512_shuffle_ps(side0, side1, 0xdd));
}

// The weights of 16 rows in a group: byte 16 * code + row of the tables.
template <int B>
struct GroupTable {
    static constexpr int kVectors = 1 << (B - 2);
    __m512i low[kVectors], high[kVectors];

    __attribute__((always_inline)) void set(__m512 scale, __m512 zero) {
        alignas(64) static constexpr Bytes kEven(0), kOdd(1);
        const __m512i even = _mm512_load_si512(kEven.index), odd = _mm512_load_si512(kOdd.index);
        // By sums rather than products, for which vdpbf16ps has no use.
        const __m512 two = _mm512_add_ps(scale, scale), four = _mm512_add_ps(two, two);
        __m512 w[4];
        w[0] = _mm512_fnmadd_ps(zero, scale, _mm512_setzero_ps());
        w[1] = _mm512_add_ps(w[0], scale);
        w[2] = _mm512_add_ps(w[0], two);
        w[3] = _mm512_add_ps(w[1], two);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
            const __m512i a = (__m512i)_mm512_cvtne2ps_pbh(w[1], w[0]), b = (__m512i)_mm512_cvtne2ps_pbh(w[3], w[2]);
            low[i] = _mm512_permutex2var_epi8(a, even, b);
            high[i] = _mm512_permutex2var_epi8(a, odd, b);
            for (int j = 0; j < 4; ++j) w[j] = _mm512_add_ps(w[j], four);
        }
    }

    __attribute__((always_inline)) static __m512i look_up(const __m512i* table, __m512i index) {
        if constexpr (B == 2) {
            return _mm512_permutexvar_epi8(index, table[0]);
        } else if constexpr (B == 3) {
            return _mm512_permutex2var_epi8(table[0], index, table[1]);
        } else {
            const __m512i upper = _mm512_permutex2var_epi8(table[2], index, table[3]);
            const __mmask64 is_upper = _mm512_movepi8_mask(index);
            return _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(table[0], index, table[1]), is_upper, upper);
        }
    }

  private:
    struct Bytes {  // every second one
        uint8_t index[64] = {};
        constexpr explicit Bytes(int first) {
            for (int i = 0; i < 64; ++i) index[i] = uint8_t(2 * i + first);
        }
    };
};

// Looks up quads of columns of a tile.
template <int B>
struct TileWeights {
    static constexpr int kPerHalf = 16 / B;
    __m512i vector[B == 3 ? 4 : B];
    __m512i row, code_bits;

    TileWeights() {
        row = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                 _mm512_set1_epi32(0x01010101));
        code_bits = _mm512_set1_epi8(char(0xf0));
    }

    __attribute__((always_inline)) void load(const uint32_t* tile) {
#pragma GCC unroll 4
        for (int i = 0; i < B; ++i) vector[i] = _mm512_loadu_si512(tile + i * kRows);
        if constexpr (B == 3) vector[3] = spare_bits(vector);
    }

    template <int Quad>
    __attribute__((always_inline)) void get(const GroupTable<B>& table, __m512i* side) const {
        const __m512i index = _mm512_ternarylogic_epi64(code_bits, fields<Quad>(), row, 0xca);
        const __m512i low = table.look_up(table.low, index), high = table.look_up(table.high, index);
        side[0] = _mm512_unpacklo_epi8(low, high);
        side[1] = _mm512_unpackhi_epi8(low, high);
    }

  private:
    static constexpr int vector_of(int pair) { return B == 3 ? kVector3[pair] : pair / kPerHalf; }
    static constexpr int shift_of(int pair) { return B == 3 ? kShift3[pair] : B * (pair % kPerHalf); }

    // Which bits of two rows go to a byte each: those from four below a code on.
    static constexpr uint64_t places(int quad) {
        uint64_t all = 0;
        for (int i = 0; i < 8; ++i) {
            const int pair = 2 * quad + i % 4 / 2;
            all |= uint64_t((i / 4 * 32 + i % 2 * 16 + shift_of(pair) - 4) & 63) << 8 * i;
        }
        return all;
    }

    // The codes of a quad in the upper halves of bytes.
    template <int Quad>
    __attribute__((always_inline)) __m512i fields() const {
        constexpr int kFirst = vector_of(2 * Quad), kSecond = vector_of(2 * Quad + 1);
        const __m512i from = _mm512_set1_epi64(int64_t(places(Quad)));
        const __m512i first = _mm512_multishift_epi64_epi8(from, vector[kFirst]);
        if constexpr (kFirst == kSecond) return first;
        const __mmask64 second_pair = 0xccccccccccccccccu;
        return _mm512_mask_multishift_epi64_epi8(first, second_pair, from, vector[kSecond]);
    }
};

}  // namespace
}  // namespace hf_spqr
