// Many bf16 tokens: row blocks become AMX tiles of bf16, a stage of columns at a time, and are multiplied by all
// tokens.
#include <immintrin.h>
#include "cpu/amx.h"
#include "cpu/product_amx.h"
#include "cpu/store_avx512.h"
#include "cpu/tokens_amx.h"
#include "cpu/weights_amx.h"

namespace hf_spqr {
namespace {

using Sums = float[kPassBlocks][kRows];  // of a token

// y += scale * (sum + zero * minus_sum) for `tokens` tokens and `blocks` row blocks.
inline void add_scaled(const float (*sums)[2][kRows], const SumScales* const* scales, const float* minus_sum,
                       int tokens, int blocks, Sums* y, int block) {
    for (int r = 0; r < blocks; ++r) {
        const __m512 scale = _mm512_load_ps(scales[r]->scale), zero = _mm512_load_ps(scales[r]->zero);
        for (int t = 0; t < tokens; ++t) {
            const __m512 sum = _mm512_fmadd_ps(zero, _mm512_set1_ps(minus_sum[t]), _mm512_load_ps(sums[t][r]));
            float* at = y[t][block + r];
            _mm512_store_ps(at, _mm512_fmadd_ps(scale, sum, _mm512_load_ps(at)));
        }
    }
}

template <int B, bool Codes>
struct Pass {
    const LinearArgs& a;
    const TokenTiles& x;
    WeightStage<B, Codes> stage;
    alignas(64) Sums y[kPromptTokens];

    Pass(const LinearArgs& args, const TokenTiles& tokens, int64_t first, int64_t blocks)
        : a(args), x(tokens), stage(args.weight, first, blocks) {}

    static bool per_channel(const Matrix& m) { return m.group == kPerChannel; }

    void run() {
        const int64_t tokens = x.token_blocks * kTokenTile;
        const bool grouped = Codes && !per_channel(a.weight);
        if (grouped) memset(y, 0, tokens * sizeof y[0]);
        for (int64_t tile = 0; tile < x.tiles; tile += kStageTiles) {
            const int here = x.tiles - tile < kStageTiles ? int(x.tiles - tile) : kStageTiles;
            stage.unpack(here);
            for (int r = 0; r < stage.blocks; r += 2) {
                const int blocks = stage.blocks - r < 2 ? 1 : 2;
                for (int64_t t = 0; t < tokens; t += 2 * kTokenTile) {
                    const int here_tokens = tokens - t < 2 * kTokenTile ? kTokenTile : 2 * kTokenTile;
                    if (grouped) {
                        multiply_groups(tile, here, t, here_tokens, r, blocks);
                    } else {
                        multiply(tile, 0, here, t, here_tokens, r, blocks, y[t][r], sizeof y[0], tile > 0);
                    }
                }
            }
        }
        store();
    }

    // Sums of `tiles` products from tile `first` of the stage on, which begins at tile `at` of the matrix.
    void multiply(int64_t at, int first, int tiles, int64_t token, int tokens, int r, int blocks, float* sums,
                  int64_t stride, bool add) {
        const char* tokens_at = x.token_block(token / kTokenTile) + (at + first) * kAmxTile;
        const char* w = reinterpret_cast<const char*>(stage.weights[r][first]);
        const TileProduct p{tokens_at, x.block_bytes(),
                            w,         sizeof stage.weights[0],
                            64,        kAmxTile,
                            tiles,     reinterpret_cast<char*>(sums),
                            stride,    add};
        multiply_tiles<false>(p, tokens > kTokenTile, blocks == 2);
    }

    void multiply_groups(int64_t at, int count, int64_t token, int tokens, int r, int blocks) {
        alignas(64) float sums[2 * kTokenTile][2][kRows];
        const int step = tiles_of_sum(a.weight);
        for (int first = 0; first < count; first += step) {
            const int tiles = count - first < step ? count - first : step;
            multiply(at, first, tiles, token, tokens, r, blocks, sums[0][0], sizeof sums[0], false);
            const int sum = first / step;
            const SumScales* scales[2] = {&stage.scales[r][sum], &stage.scales[r + blocks - 1][sum]};
            add_scaled(sums, scales, x.minus_sum((at + first) / step) + token, tokens, blocks, y + token, r);
        }
    }

    void store() {
        for (int64_t t = 0; t < a.tokens; ++t) {
            for (int r = 0; r < stage.blocks; ++r) {
                __m512 sum = _mm512_load_ps(y[t][r]);
                if (Codes && per_channel(a.weight)) {
                    const PanelScales& s = stage.statistics[r];
                    sum = _mm512_fmadd_ps(_mm512_load_ps(s.zero), _mm512_set1_ps(x.minus_sum(0)[t]), sum);
                    sum = _mm512_mul_ps(_mm512_load_ps(s.scale), sum);
                }
                store_block(a, t, stage.first_block + r, sum);
            }
        }
    }
};

template <int B, bool Codes>
void all_row_blocks(const LinearArgs& a, int64_t first, int64_t last) {
    const Tiles tiles(16);
    const TokenTiles x(a.weight, a.tokens, a.planes);
    for (int64_t block = first; block < last; block += kPassBlocks) {
        Pass<B, Codes> pass(a, x, block, last - block < kPassBlocks ? last - block : kPassBlocks);
        pass.run();
    }
}

}  // namespace

bool has_prompt_amx(const Matrix& m, int64_t tokens) {
    return tokens >= kFewestAmx && (rounds_weights(m, tokens) || takes_codes(m, tokens));
}

void prompt_amx(const LinearArgs& a, int64_t first, int64_t last) {
    using Run = void (*)(const LinearArgs&, int64_t, int64_t);
    constexpr Run kCodes[8] = {all_row_blocks<1, true>, all_row_blocks<2, true>, all_row_blocks<3, true>,
                               all_row_blocks<4, true>, all_row_blocks<5, true>, all_row_blocks<6, true>,
                               all_row_blocks<7, true>, all_row_blocks<8, true>};
    constexpr Run kRounded[3] = {all_row_blocks<2, false>, all_row_blocks<3, false>, all_row_blocks<4, false>};
    (rounds_weights(a.weight, a.tokens) ? kRounded[a.weight.bits - 2] : kCodes[a.weight.bits - 1])(a, first, last);
}

}  // namespace hf_spqr
