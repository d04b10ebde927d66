#include <immintrin.h>
#include "cpu/planes.h"
#include "cpu/unpack_half.h"
#include "cpu/vnni.h"

namespace hf_spqr {
namespace {

// How the columns of a tile are kept: byte i of a plane is column `column[i]`, whose activations are multiplied by
// `factor` first.
struct TileOrder {
    alignas(64) float factor[kColumns];
    alignas(32) uint8_t column[kColumns];

    explicit TileOrder(int bits) {
        const HalfOrder& order = half_order(bits);
        for (int i = 0; i < kColumns; ++i) {
            factor[i] = order.is_doubled(i) ? 0.5f : 1.f;
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
void split(__m512 x, __m512 inverse, int8_t* hi, int8_t* lo) {
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
    const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(v, 24), 24);
    const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(v, low), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(hi), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lo), _mm512_cvtepi32_epi8(low));
}

struct BlockNumbers {
    float scale, sum;  // sum: of the activations
};

// Of columns [first, last).
BlockNumbers numbers_of(const float* x, int64_t first, int64_t last) {
    __m512 largest = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
    for (int64_t k = first; k < last; k += 16) {
        const __mmask16 mask = last - k < 16 ? __mmask16((1u << (last - k)) - 1) : __mmask16(0xffff);
        const __m512 v = _mm512_maskz_loadu_ps(mask, x + k);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
        sum = _mm512_add_ps(sum, v);  // also carries NaN and infinity on
    }
    const float top = _mm512_reduce_max_ps(largest);
    return {top > 1e-30f ? top / 32512.f : 0.f, _mm512_reduce_add_ps(sum)};
}

// One token of `planes`. x: zero padded to whole tiles.
void split_token(const Matrix& m, const TileOrder& order, const float* x, const Planes& planes, int token) {
    const int block = plane_block(m);
    const int64_t end = ceil_div(m.columns, kColumns) * kColumns;
    for (int64_t b = 0; b < planes.blocks; ++b) {
        const int64_t first = b * block, last = first + block < end ? first + block : end;
        const BlockNumbers n = numbers_of(x, first, last);
        _mm_storeu_ps(planes.quad(b, token), _mm_setr_ps(n.scale, 1.f, n.scale > 0 ? n.sum / n.scale : n.sum, 1.f));
    }
    for (int64_t tile = 0; tile < planes.tiles; ++tile) {
        PlaneTile& out_tile = *planes.tile(tile, token);
        for (int half = 0; half < 2; ++half) {
            const int64_t first = tile * kColumns + 16 * half;
            const float scale = planes.quad(first / block, token)[0];
            const __m512 factor = _mm512_load_ps(order.factor + 16 * half);
            const __m512 inverse = _mm512_maskz_div_ps(scale > 0 ? 0xffff : 0, factor, _mm512_set1_ps(scale));
            const __m512 v = first < end ? _mm512_loadu_ps(x + first) : _mm512_setzero_ps();
            split(v, inverse, reinterpret_cast<int8_t*>(out_tile.hi) + 16 * half,
                  reinterpret_cast<int8_t*>(out_tile.lo) + 16 * half);
        }
        order.apply(out_tile.hi);
        order.apply(out_tile.lo);
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
