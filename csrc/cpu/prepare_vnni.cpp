#include <immintrin.h>
#include "cpu/planes.h"
#include "cpu/prepare_blocks.h"
#include "cpu/unpack_half.h"
#include "cpu/vnni.h"

namespace hf_spqr {
namespace {

// How the columns of a tile are kept: byte i of a plane is column `column[i]`. Activations are multiplied by `factor`
// first, and by `back` to have what they stand for.
struct TileOrder {
    alignas(64) float factor[kColumns], back[kColumns];
    alignas(32) uint8_t column[kColumns];

    explicit TileOrder(int bits) {
        const HalfOrder& order = half_order(bits);
        for (int i = 0; i < kColumns; ++i) {
            factor[i] = order.is_doubled(i) ? 0.5f : 1.f;
            back[i] = 1.f / factor[i];
            column[i] = uint8_t(order.column(i));
        }
    }

    void apply(int32_t* plane) const {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane));
        const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(column));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(plane), _mm256_permutexvar_epi8(order, v));
    }
};

// The first or second 16 columns of a tile.
void split(__m512i v, int8_t* hi, int8_t* lo) {
    const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(v, 24), 24);
    const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(v, low), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(hi), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lo), _mm512_cvtepi32_epi8(low));
}

// One token of `planes`. x: zero padded to whole tiles. The sum of a block is that of its rounded activations, so that
// what rounding changes is multiplied by code - zero and not by the code alone.
void split_token(const Matrix& m, const TileOrder& order, const float* x, const Planes& planes, int token) {
    const int64_t block = plane_block(m), end = ceil_div(m.columns, kColumns) * kColumns;
    for (int64_t b = 0; b < planes.blocks; ++b) {
        const int64_t first = b * block, left = end > first ? end - first : 0;
        const float scale = block_scale<2>(x + first, int(left < block ? left : block));
        const __m512 inverse = _mm512_set1_ps(scale > 0.f ? 1.f / scale : 0.f);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = first; k < first + block && k < planes.tiles * kColumns; k += 16) {
            PlaneTile& tile = *planes.tile(k / kColumns, token);
            const int64_t half = k % kColumns;
            const __m512 factor = _mm512_load_ps(order.factor + half);
            const __m512 v = k < end ? _mm512_loadu_ps(x + k) : _mm512_setzero_ps();
            const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_mul_ps(inverse, factor)));
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), _mm512_load_ps(order.back + half), sum);
            split(code, reinterpret_cast<int8_t*>(tile.hi) + half, reinterpret_cast<int8_t*>(tile.lo) + half);
            if (half > 0) order.apply(tile.hi), order.apply(tile.lo);
        }
        _mm_storeu_ps(planes.quad(b, token), _mm_setr_ps(scale, 1.f, _mm512_reduce_add_ps(sum), 1.f));
    }
}

// out[column][slot] = x of that token, zero where there is none.
void put_beside(const float* x, int64_t stride, int tokens, int64_t columns, float* out) {
    const int slots = FewTokens::slots(tokens);
    for (int64_t k = 0; k < columns; k += 4) {
        __m128 v[4];
        for (int t = 0; t < 4; ++t) v[t] = t < tokens ? _mm_loadu_ps(x + t * stride + k) : _mm_setzero_ps();
        if (slots == 2) {
            _mm_storeu_ps(out + 2 * k, _mm_unpacklo_ps(v[0], v[1]));
            _mm_storeu_ps(out + 2 * k + 4, _mm_unpackhi_ps(v[0], v[1]));
        } else {
            _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
            for (int i = 0; i < 4; ++i) _mm_storeu_ps(out + 4 * (k + i), v[i]);
        }
    }
}

}  // namespace

int64_t few_bytes_vnni(const Matrix& m, int64_t tokens) {
    return FewTokens(m, tokens, nullptr).bytes();
}

void prepare_few_vnni(const Matrix& m, const float* x, int64_t stride, int64_t tokens, char* out) {
    const FewTokens few(m, tokens, out);
    const TileOrder order(m.bits);
    for (int share = 0; share < few.shares; ++share) {
        const Planes planes = few.planes(share);
        const float* of_share = x + few.begin(share) * stride;
        for (int t = 0; t < planes.tokens; ++t) split_token(m, order, of_share + t * stride, planes, t);
        if (m.outlier_row && planes.tokens > 1) {
            put_beside(of_share, stride, planes.tokens, few.padded_columns(), few.columns(share));
        }
    }
}

}  // namespace hf_spqr
