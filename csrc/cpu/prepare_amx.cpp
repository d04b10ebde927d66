#include <immintrin.h>
#include "cpu/amx.h"
#include "cpu/tokens_amx.h"
#include "cpu/tokens_bf16.h"

namespace hf_spqr {
namespace {

// Minus the sum of a tile's columns is added to that of their block.
void subtract_sum(const TokenTiles& out, int64_t tile, int64_t token, __m512i columns) {
    if (out.blocks == 0) return;
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    const float sum = _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)columns, ones));
    float* at = out.minus_sum(tile / out.group_tiles) + token;
    *at = (tile % out.group_tiles ? *at : 0.f) - sum;
}

}  // namespace

int64_t tokens_bytes_amx(const Matrix& m, int64_t tokens) {
    return TokenTiles(m, tokens, nullptr).bytes();
}

void prepare_prompt_amx(const PrepareArgs& a, int64_t first, int64_t last) {
    static_assert(kPrepareTokens % kTokenTile == 0);
    const TokenTiles out(*a.weight, a.tokens, a.planes);
    const int64_t end = ceil_div(last, kTokenTile) * kTokenTile;
    for (int64_t token = first; token < end; ++token) {
        const uint16_t* x = static_cast<const uint16_t*>(a.x) + token * a.x_stride;
        char* to = out.token_block(token / kTokenTile) + token % kTokenTile * 64;
        for (int64_t tile = 0; tile < out.tiles; ++tile, to += kTileWords * 4) {
            const __m512i v = token < last ? load_columns(a, x, tile * kColumns) : _mm512_setzero_si512();
            _mm512_store_si512(to, v);
            subtract_sum(out, tile, token, v);
        }
    }
}

}  // namespace hf_spqr
