// SpQR, a few tokens: codes and both levels of statistics go straight from the stream into registers.
#include "cpu/few_tokens.h"
#include "cpu/statistics_avx512.h"
#include "cpu/vnni.h"

namespace hf_spqr {
namespace {

constexpr int kGroups = 16;  // of a panel

// A panel's statistics for one row block, of S-bit codes (at most 4: a vpermps looks up sixteen values). The codes
// stay where they are. Of each group there are, with the activations' scale and sum / scale multiplied in, the numbers
// (ss, ss sz, zs, zs zz): in memory, because broadcasting from there costs no vector operation.
template <int S>
struct PanelStatistics {
    static constexpr StatisticsPlaces kPlaces{S};
    const uint32_t* codes[4];
    alignas(64) uint32_t spare[kRows];  // three bits: group 15, which lies in the spare bits of the others
    alignas(64) float four[kGroups][4];

    void load(const Matrix& m, const uint32_t* p, int groups, const float* quads) {
        for (int i = 0; i < 4; ++i) codes[i] = p + i * kRows;
        if constexpr (S == 3) {
            load_spare(p, spare);
            codes[3] = spare;
        }
        const __m128i* second = reinterpret_cast<const __m128i*>(p + code_vectors(m, groups) * kRows);
        // What lies behind a shorter last panel is read, and not used.
        const __m512i twice = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3);
        const bool shared = m.groups_per_second != 1;
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; g += 4) {
            __m512 v;
            if (!shared) {
                v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second) + g / 4));
            } else {
                const __m512 two = _mm512_castps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128(second + g / 4)));
                v = _mm512_castsi512_ps(_mm512_permutexvar_epi64(twice, _mm512_castps_si512(two)));
            }
            v = _mm512_mul_ps(v, _mm512_loadu_ps(quads + 4 * g));
            _mm512_store_ps(four[g], _mm512_mask_mul_ps(v, 0xaaaa, v, _mm512_moveldup_ps(v)));
        }
    }

    __attribute__((always_inline)) void get(int g, const float*, __m512& scale, __m512& shift) const {
        const float* n = four[g];
        const __m512 value = _mm512_load_ps(kPlaces.value);
        const __m512i c = _mm512_loadu_si512(codes[kPlaces.vector[g]]);
        const __m512i s = _mm512_srlv_epi32(c, _mm512_set1_epi32(kPlaces.scale_shift[g]));
        const __m512i z = _mm512_srlv_epi32(c, _mm512_set1_epi32(kPlaces.zero_shift[g]));
        scale = _mm512_fmsub_ps(_mm512_permutexvar_ps(s, value), _mm512_set1_ps(n[0]), _mm512_set1_ps(n[1]));
        shift = _mm512_fnmadd_ps(_mm512_permutexvar_ps(z, value), _mm512_set1_ps(n[2]), _mm512_set1_ps(n[3]));
    }
};

template <int S>
void by_bits(const LinearArgs& a, int64_t first, int64_t last) {
    switch (a.weight.bits) {
        case 2:
            return few_tokens<PanelStatistics<S>, 2>(a, first, last);
        case 3:
            return few_tokens<PanelStatistics<S>, 3>(a, first, last);
        default:
            return few_tokens<PanelStatistics<S>, 4>(a, first, last);
    }
}

}  // namespace

bool has_gemv_spqr_vnni(const Matrix& m) {
    return m.format == Format::spqr && m.bits <= 4 && m.stat_bits <= 4 && m.group != kPerChannel && has_half_order(m);
}

void gemv_spqr_vnni(const LinearArgs& a, int64_t first, int64_t last) {
    switch (a.weight.stat_bits) {
        case 2:
            return by_bits<2>(a, first, last);
        case 3:
            return by_bits<3>(a, first, last);
        default:
            return by_bits<4>(a, first, last);
    }
}

}  // namespace hf_spqr
