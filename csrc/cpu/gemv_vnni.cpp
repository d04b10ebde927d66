// One token, any format: codes go from the stream through registers, statistics through a small buffer per panel.
#include "cpu/outliers_avx512.h"
#include "cpu/planes.h"
#include "cpu/prefetch.h"
#include "cpu/statistics_avx512.h"
#include "cpu/store_avx512.h"
#include "cpu/vnni.h"

namespace hf_spqr {
namespace {

// scale * (xs dot - zero X) of a block of activations, added to y.
inline __m512 apply(__m512i dot, const BlockNumbers& n, const float* scale, const float* zero, __m512 y) {
    __m512 f = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(n.scale));
    f = _mm512_fnmadd_ps(_mm512_load_ps(zero), _mm512_set1_ps(n.sum), f);
    return _mm512_fmadd_ps(_mm512_load_ps(scale), f, y);
}

// R row blocks at once. PerTile blocks of activations share a tile (4, 2), or one covers several tiles (1).
template <int B, int PerTile, int R>
void row_blocks(const LinearArgs& a, int64_t first_block) {
    const Matrix& m = a.weight;
    const Planes planes(m, 1, a.planes);
    const int tiles = PerTile == 1 ? plane_block(m) / kColumns : 1;
    const int groups_of_block = m.group == kPerChannel ? 0 : PerTile;  // a row's only group serves all its blocks
    const Unpack<B> unpack;
    PanelScales statistics[R];
    __m512 y[R];
    for (int r = 0; r < R; ++r) y[r] = _mm512_setzero_ps();
    int64_t block = 0;  // of activations
    OutlierSums outliers(m, first_block, R, a.x);
    const int64_t ahead = pass_bytes(m, R);
    for (PanelWalk walk(m, first_block); walk.next();) {
        const Panel& panel = walk.panel;
        outliers.panel();
        for (int r = 0; r < R; ++r) statistics[r].load(m, panel.statistics + r * m.words, panel.groups);
        int group = 0;
        for (int64_t tile = 0; tile < panel.count; tile += tiles, block += PerTile, group += groups_of_block) {
            const int64_t here = panel.count - tile < tiles ? panel.count - tile : tiles;
            const PlaneTile* x = planes.tile(panel.first_tile + tile);
            const BlockNumbers* n = planes.block(block);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const uint32_t* codes = panel.tiles + r * m.words + tile * B * kRows;
                const float *scale = statistics[r].scale + group * kRows, *zero = statistics[r].zero + group * kRows;
                prefetch_lines(reinterpret_cast<const char*>(codes) + ahead, here * B);
                __m512i w[8];
                if constexpr (PerTile > 1) {
                    unpack(codes, w);
#pragma GCC unroll 4
                    for (int i = 0; i < PerTile; ++i) {
                        constexpr int kCount = 8 / PerTile;
                        const __m512i sum = dot<kCount>(w + i * kCount, x->hi + i * kCount, x->lo + i * kCount);
                        y[r] = apply(sum, n[i], scale + i * kRows, zero + i * kRows, y[r]);
                    }
                } else {
                    TileSums sums;
                    for (int64_t t = 0; t < here; ++t) {
                        unpack(codes + t * B * kRows, w);
                        sums.add(w, x[t].hi, x[t].lo);
                    }
                    y[r] = apply(sums.total(), *n, scale, zero, y[r]);
                }
            }
        }
    }
    outliers.rest();
    for (int r = 0; r < R; ++r) {
        store_block(a, 0, first_block + r, _mm512_add_ps(y[r], outliers.of(r)));
    }
}

template <int B, int PerTile>
void all_row_blocks(const LinearArgs& a, int64_t first, int64_t last) {
    constexpr int kInFlight = 2;
    int64_t block = first;
    for (; block + kInFlight <= last; block += kInFlight) row_blocks<B, PerTile, kInFlight>(a, block);
    for (; block < last; ++block) row_blocks<B, PerTile, 1>(a, block);
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

bool has_gemv_vnni(const Matrix& m) {
    return m.bits == 2 || m.bits == 3 || m.bits == 4 || m.bits == 8;
}

void gemv_vnni(const LinearArgs& a, int64_t first, int64_t last) {
    switch (a.weight.bits) {
        case 2:
            return by_group<2>(a, first, last);
        case 3:
            return by_group<3>(a, first, last);
        case 4:
            return by_group<4>(a, first, last);
        default:
            return by_group<8>(a, first, last);
    }
}

}  // namespace hf_spqr
