// Several bf16 tokens: a tile's codes become bf16 once, exactly, and vdpbf16ps multiplies them by all tokens. Scales
// and zero points are applied in fp32 to the sums of each group, so nothing of the weights is rounded.
#include <immintrin.h>
#include "cpu/bf16.h"
#include "cpu/codes_bf16.h"
#include "cpu/halves.h"
#include "cpu/multiply_bf16.h"
#include "cpu/outliers_bf16.h"
#include "cpu/prefetch.h"
#include "cpu/statistics_avx512.h"
#include "cpu/store_avx512.h"

namespace hf_spqr {
namespace {

// R row blocks. A tile is `kPairs / Pairs` blocks of columns, or (Pairs = kPairs) a block is several tiles.
template <int B, int Pairs, int R>
void row_blocks(const LinearArgs& a, int64_t row_block) {
    const Matrix& m = a.weight;
    const Halves halves(m, a.tokens, a.planes);
    const CodesBf16<B> to_codes;
    const int block_tiles = Pairs == kPairs ? plane_block(m) / kColumns : 1;
    alignas(64) float y[kPromptTokens][R][kRows];
    memset(y, 0, a.tokens * sizeof y[0]);
    Unpacked<R> codes;
    PanelScales statistics[R];
    int64_t block = 0;  // of columns
    OutlierPrefetch outliers(m, row_block, R);
    const int64_t ahead = pass_bytes(m, R);
    for (PanelWalk walk(m, row_block); walk.next();) {
        const Panel& panel = walk.panel;
        outliers.panel();
        for (int r = 0; r < R; ++r) statistics[r].load(m, panel.statistics + r * m.words, panel.groups);
        for (int64_t tile = 0; tile < panel.count; tile += halves.stretch) {
            const int here = int(panel.count - tile < halves.stretch ? panel.count - tile : halves.stretch);
            for (int r = 0; r < R; ++r) {
                const uint32_t* packed = panel.tiles + r * m.words + tile * B * kRows;
                prefetch_lines(reinterpret_cast<const char*>(packed) + ahead, here * B);
                for (int i = 0; i < here; ++i) {
                    to_codes(packed + i * B * kRows, reinterpret_cast<char*>(codes.pair[i * kPairs][r]),
                             sizeof codes.pair[0]);
                }
            }
            const int whole = here / block_tiles;
            Part<R> part;
            part.codes = codes.pair;
            part.blocks = Pairs == kPairs ? whole : here * (kPairs / Pairs);
            part.tiles = block_tiles;
            part.group_stride = m.group == kPerChannel ? 0 : kRows;
            const int group = m.group == kPerChannel ? 0 : int(tile * kColumns / m.group);
            for (int r = 0; r < R; ++r) {
                part.scale[r] = statistics[r].scale + group * kRows;
                part.zero[r] = statistics[r].zero + group * kRows;
            }
            part.tile = panel.first_tile + tile;
            part.block = block;
            if (part.blocks) multiply_all<R, Pairs>(part, halves, y);
            block += part.blocks;
            if (const int rest = here - whole * block_tiles) {  // of a block that the matrix ends in
                part.codes += whole * block_tiles * kPairs;
                part.tile += whole * block_tiles;
                part.block += part.blocks;
                for (int r = 0; r < R; ++r) {
                    part.scale[r] += part.blocks * part.group_stride;
                    part.zero[r] += part.blocks * part.group_stride;
                }
                part.blocks = 1;
                part.tiles = rest;
                multiply_all<R, Pairs>(part, halves, y);
                ++block;
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        add_outliers(m, row_block + r, halves, y[0][r], R * kRows);
        for (int t = 0; t < a.tokens; ++t) store_block(a, t, row_block + r, _mm512_load_ps(y[t][r]));
    }
}

template <int B, int Pairs>
void all_row_blocks(const LinearArgs& a, int64_t first, int64_t last) {
    int64_t block = first;
    constexpr int kAtOnce = Pairs == kPairs ? 4 : 2;  // as many as registers hold the sums of
    for (; block + kAtOnce <= last; block += kAtOnce) row_blocks<B, Pairs, kAtOnce>(a, block);
    for (; block < last; ++block) row_blocks<B, Pairs, 1>(a, block);
}

template <int B>
void by_group(const LinearArgs& a, int64_t first, int64_t last) {
    if (a.weight.group == 8) {
        all_row_blocks<B, 4>(a, first, last);
    } else if (a.weight.group == 16) {
        all_row_blocks<B, 8>(a, first, last);
    } else {
        all_row_blocks<B, 16>(a, first, last);
    }
}

}  // namespace

int64_t halves_bytes(const Matrix& m, int64_t tokens) {
    return Halves(m, tokens, nullptr).bytes();
}

void batch_bf16(const LinearArgs& a, int64_t first, int64_t last) {
    using Run = void (*)(const LinearArgs&, int64_t, int64_t);
    constexpr Run kRun[8] = {by_group<1>, by_group<2>, by_group<3>, by_group<4>,
                             by_group<5>, by_group<6>, by_group<7>, by_group<8>};
    kRun[a.weight.bits - 1](a, first, last);
}

}  // namespace hf_spqr
