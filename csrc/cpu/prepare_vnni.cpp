#include <immintrin.h>
#include "cpu/kernels.h"
#include "cpu/planes.h"
#include "cpu/vnni.h"

namespace hf_spqr {
namespace {

// hi and lo of 16 columns.
void split(__m512 x, __m512 inverse, int8_t* hi, int8_t* lo) {
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
    const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(v, 24), 24);
    const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(v, low), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(hi), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lo), _mm512_cvtepi32_epi8(low));
}

}  // namespace

int64_t planes_bytes_vnni(const Matrix& m) {
    return Planes(m).bytes();
}

// x: fp32, zero padded to whole tiles.
void split_planes_vnni(const Matrix& m, const float* x, char* out) {
    const Planes planes(m);
    const int block = plane_block(m), step = block < 16 ? block : 16;
    const __mmask16 mask = __mmask16((1u << step) - 1);
    int8_t* hi = const_cast<int8_t*>(planes.hi(out));
    int8_t* lo = const_cast<int8_t*>(planes.lo(out));
    float* scale = const_cast<float*>(planes.scale(out));
    float* quads = const_cast<float*>(planes.quads(out));
    const int64_t end = ceil_div(m.columns, kColumns) * kColumns;
    for (int64_t b = 0; b < planes.blocks; ++b) {
        const int64_t first = b * block, last = first + block < end ? first + block : end;
        __m512 largest = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
        for (int64_t k = first; k < last; k += step) {
            const __m512 v = _mm512_maskz_loadu_ps(mask, x + k);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
            sum = _mm512_add_ps(sum, v);  // also carries NaN and infinity on
        }
        const float top = _mm512_reduce_max_ps(largest);
        const __m512 inverse = _mm512_set1_ps(top > 1e-30f ? 32512.f / top : 0.f);
        scale[b] = top > 1e-30f ? top / 32512.f : 0.f;
        _mm_storeu_ps(quads + 4 * b, _mm_setr_ps(1.f, 1.f, _mm512_reduce_add_ps(sum), 1.f));
        for (int64_t k = first; k < first + block && k < planes.columns; k += step) {
            const __m512 v = k < last ? _mm512_maskz_loadu_ps(mask, x + k) : _mm512_setzero_ps();
            if (step == 16) {
                split(v, inverse, hi + k, lo + k);
            } else {  // groups of 8: the upper half is written again by the next block
                alignas(16) int8_t h[16], l[16];
                split(v, inverse, h, l);
                _mm_storel_epi64(reinterpret_cast<__m128i*>(hi + k), _mm_load_si128(reinterpret_cast<__m128i*>(h)));
                _mm_storel_epi64(reinterpret_cast<__m128i*>(lo + k), _mm_load_si128(reinterpret_cast<__m128i*>(l)));
            }
        }
    }
}

}  // namespace hf_spqr
