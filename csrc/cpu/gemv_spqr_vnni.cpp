// SpQR, one token: codes and both levels of statistics go straight from the stream into registers.
#include "cpu/outliers_avx512.h"
#include "cpu/planes.h"
#include "cpu/prefetch.h"
#include "cpu/statistics_avx512.h"
#include "cpu/store_avx512.h"
#include "cpu/unpack_vbmi.h"
#include "cpu/vnni.h"

namespace hf_spqr {
namespace {

constexpr int kGroups = 16;      // of a panel
constexpr int kMaxStatBits = 4;  // a vpermps looks up sixteen values

// A panel's statistics for one row block: the codes, and per group (ss, ss sz, zs X, zs X zz), X being the sum of the
// group's activations. The numbers stay in memory: broadcasting from there costs no vector operation.
struct PanelStatistics {
    const uint32_t* codes[4];
    alignas(64) uint32_t spare[kRows];  // three bits: group 15, which lies in the spare bits of the others
    alignas(64) float four[kGroups][4];

    void load(const Matrix& m, const uint32_t* p, int groups, const float* quads) {
        for (int i = 0; i < 4; ++i) codes[i] = p + i * kRows;
        if (m.stat_bits == 3) {
            load_spare(p, spare);
            codes[3] = spare;
        }
        const __m128i* second = reinterpret_cast<const __m128i*>(p + code_vectors(m, groups) * kRows);
        // What lies behind a shorter last panel is read, and not used.
        const __m512i twice = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3);
        for (int g = 0; g < kGroups; g += 4) {
            __m512 v;
            if (m.groups_per_second == 1) {
                v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second) + g / 4));
            } else {
                const __m512 two = _mm512_castps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128(second + g / 4)));
                v = _mm512_castsi512_ps(_mm512_permutexvar_epi64(twice, _mm512_castps_si512(two)));
            }
            v = _mm512_mul_ps(v, _mm512_loadu_ps(quads + 4 * g));
            _mm512_store_ps(four[g], _mm512_mask_mul_ps(v, 0xaaaa, v, _mm512_moveldup_ps(v)));
        }
    }

    // y + scale * (xs dot - zero X) for group g, where dot is the integer sum of the group's codes and activations.
    __attribute__((always_inline)) __m512 apply(const StatisticsPlaces& places, int g, __m512i dot, float xs,
                                                __m512 y) const {
        const float* n = four[g];
        const __m512i c = _mm512_loadu_si512(codes[places.vector[g]]);
        const __m512i s = _mm512_srlv_epi32(c, _mm512_set1_epi32(places.scale_shift[g]));
        const __m512i z = _mm512_srlv_epi32(c, _mm512_set1_epi32(places.zero_shift[g]));
        __m512 f = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(xs), _mm512_set1_ps(n[3]));
        f = _mm512_fnmadd_ps(_mm512_permutexvar_ps(z, places.value), _mm512_set1_ps(n[2]), f);
        const __m512 scale =
            _mm512_fmsub_ps(_mm512_permutexvar_ps(s, places.value), _mm512_set1_ps(n[0]), _mm512_set1_ps(n[1]));
        return _mm512_fmadd_ps(scale, f, y);
    }
};

// R row blocks at once. PerTile groups share a tile (4, 2), or a group covers `tiles` tiles (PerTile 1).
template <int B, int PerTile, int R>
void row_blocks(const LinearArgs& a, const StatisticsPlaces& places, int64_t block) {
    const Matrix& m = a.weight;
    const Planes planes(m, 1, a.planes);
    const int tiles = PerTile == 1 ? m.group / kColumns : 1;
    const Unpack<B> unpack;
    PanelStatistics statistics[R];
    __m512 y[R];
    for (int r = 0; r < R; ++r) y[r] = _mm512_setzero_ps();
    int64_t first_group = 0;
    OutlierSums outliers(m, block, R, a.x);
    const int64_t ahead = pass_bytes(m, R);
    for (PanelWalk walk(m, block); walk.next(); first_group += kGroups) {
        const Panel& panel = walk.panel;
        outliers.panel();
        const int64_t lines = (panel.tiles - panel.statistics) / kRows;
        for (int r = 0; r < R; ++r) {
            prefetch_lines(reinterpret_cast<const char*>(panel.statistics + r * m.words) + ahead, lines);
            statistics[r].load(m, panel.statistics + r * m.words, panel.groups, planes.quad(first_group));
        }
        int group = 0;
        for (int64_t tile = 0; tile < panel.count; tile += tiles, group += PerTile) {
            const int64_t here = panel.count - tile < tiles ? panel.count - tile : tiles;
            const PlaneTile* x = planes.tile(panel.first_tile + tile);
            const BlockNumbers* numbers = planes.block(first_group + group);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const uint32_t* codes = panel.tiles + r * m.words + tile * B * kRows;
                prefetch_lines(reinterpret_cast<const char*>(codes) + ahead, here * B);
                __m512i w[8];
                if constexpr (PerTile > 1) {
                    unpack(codes, w);
#pragma GCC unroll 4
                    for (int i = 0; i < PerTile; ++i) {
                        constexpr int kCount = 8 / PerTile;
                        const __m512i sum = dot<kCount>(w + i * kCount, x->hi + i * kCount, x->lo + i * kCount);
                        y[r] = statistics[r].apply(places, group + i, sum, numbers[i].scale, y[r]);
                    }
                } else {
                    TileSums sums;
                    for (int64_t t = 0; t < here; ++t) {
                        unpack(codes + t * B * kRows, w);
                        sums.add(w, x[t].hi, x[t].lo);
                    }
                    y[r] = statistics[r].apply(places, group, sums.total(), numbers->scale, y[r]);
                }
            }
        }
    }
    outliers.rest();
    for (int r = 0; r < R; ++r) store_block(a, 0, block + r, _mm512_add_ps(y[r], outliers.of(r)));
}

template <int B, int PerTile>
void all_row_blocks(const LinearArgs& a, int64_t first, int64_t last) {
    const StatisticsPlaces places(a.weight.stat_bits);
    constexpr int kInFlight = 4;
    int64_t block = first;
    for (; block + kInFlight <= last; block += kInFlight) row_blocks<B, PerTile, kInFlight>(a, places, block);
    for (; block < last; ++block) row_blocks<B, PerTile, 1>(a, places, block);
}

template <int B>
void by_group(const LinearArgs& a, int64_t first, int64_t last) {
    if (a.weight.group == 8) {
        all_row_blocks<B, 4>(a, first, last);
    } else if (a.weight.group == 16) {
        all_row_blocks<B, 2>(a, first, last);
    } else {
        all_row_blocks<B, 1>(a, first, last);
    }
}

}  // namespace

bool has_gemv_spqr_vnni(const Matrix& m) {
    return m.format == Format::spqr && m.bits <= 4 && m.stat_bits <= kMaxStatBits && m.group != kPerChannel;
}

void gemv_spqr_vnni(const LinearArgs& a, int64_t first, int64_t last) {
    switch (a.weight.bits) {
        case 2:
            return by_group<2>(a, first, last);
        case 3:
            return by_group<3>(a, first, last);
        default:
            return by_group<4>(a, first, last);
    }
}

}  // namespace hf_spqr
