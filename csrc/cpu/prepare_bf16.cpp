#include <immintrin.h>
#include <cstring>
#include "cpu/bf16.h"
#include "cpu/halves.h"
#include "cpu/tokens_bf16.h"
#include "cpu/transpose.h"

namespace hf_spqr {
namespace {

// Sums of each 8 columns of a tile, in every lane of a 128-bit part.
inline __m512 sums_of_eight(__m512i tile) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512 s = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)tile, ones);
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
    return _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
}

// Minus the sums of the blocks that begin in or go over `tile`.
inline void subtract_sums(const Halves& out, const Matrix& m, int64_t tile, int64_t token, __m512 eight) {
    alignas(64) float part[16];
    _mm512_store_ps(part, eight);
    const int block = plane_block(m);
    for (int i = 0; i < 4; ++i) {
        const int64_t column = tile * kColumns + 8 * i;
        float* sum = out.minus_sum(column / block) + token;
        *sum = (column % block ? *sum : 0.f) - part[4 * i];
    }
}

void prepare_token(const PrepareArgs& a, const Halves& out, int64_t token) {
    const uint16_t* x = static_cast<const uint16_t*>(a.x) + token * a.x_stride;
    const Shares& shares = out.shares;
    const int64_t begin = shares.begin(shares.of(token)), count = shares.begin(shares.of(token) + 1) - begin;
    for (int64_t tile = 0; tile < out.tiles; ++tile) {
        const __m512i v = load_columns(a, x, tile * kColumns);
        _mm512_storeu_si512(out.tile(tile, token, begin, count), v);
        if (out.blocks) subtract_sums(out, *a.weight, tile, token, sums_of_eight(v));
    }
}

// [column][token] of 16 tokens. What lies beside the tokens is zero.
void transpose_tokens(const PrepareArgs& a, const Halves& out, int64_t first) {
    const int64_t count = a.tokens - first < 16 ? a.tokens - first : 16;
    const Shares& shares = out.shares;
    int64_t begin[16], end[16];  // of each token's share
    for (int64_t t = 0; t < count; ++t) {
        const int64_t share = shares.of(first + t);
        begin[t] = shares.begin(share);
        end[t] = shares.begin(share + 1);
    }
    for (int64_t tile = 0; tile < out.tiles; ++tile) {
        alignas(64) uint32_t tokens[16][kPairs] = {}, pairs[kPairs][16];
        for (int64_t t = 0; t < count; ++t) {
            memcpy(tokens[t], out.tile(tile, first + t, begin[t], end[t] - begin[t]), sizeof tokens[0]);
        }
        transpose(tokens[0], reinterpret_cast<char*>(pairs), sizeof pairs[0]);
        for (int p = 0; p < kPairs; ++p) {
            const __m512i pair = _mm512_load_si512(pairs[p]);
            uint16_t* const even = out.column(tile * kColumns + 2 * p) + first;
            uint16_t* const odd = out.column(tile * kColumns + 2 * p + 1) + first;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), _mm512_cvtepi32_epi16(pair));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd), _mm512_cvtepi32_epi16(_mm512_srli_epi32(pair, 16)));
        }
    }
}

}  // namespace

void prepare_halves(const PrepareArgs& a, int64_t first, int64_t last) {
    const Halves out(*a.weight, a.tokens, a.planes);
    for (int64_t token = first; token < last; ++token) prepare_token(a, out, token);
    if (!out.padded_tokens) return;
    if (first == 0) memset(out.column(out.zero_column()), 0, out.padded_tokens * sizeof(uint16_t));
    for (int64_t token = first; token < last; token += 16) transpose_tokens(a, out, token);
}

}  // namespace hf_spqr
