// The engine of integer_linear.h for VNNI: codes of weights as bytes against codes of activations as signed bytes.
#include "cpu/integer_linear.h"
#include "cpu/unpack_vbmi.h"

namespace hf_spqr {
namespace {

struct Bytes {
    using Element = int8_t;
    static constexpr int kTileBytes = 512, kSteps = 8, kBlocks = 4, kTogether = 6;

    template <int B, int R>
    static void unpack_bits(const uint32_t* codes, int tiles, char* w) {
        static const Unpack<B> kUnpack;
        for (; tiles > 0; --tiles, codes += B * kRows, w += 8 * R * 64) {
            __m512i v[8];
            kUnpack(codes, v);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) _mm512_store_si512(w + i * R * 64, v[i]);
        }
    }

    template <int R>
    static void unpack(int bits, const uint32_t* codes, int tiles, char* w) {
        constexpr void (*kTable[8])(const uint32_t*, int, char*) = {
            unpack_bits<1, R>, unpack_bits<2, R>, unpack_bits<3, R>, unpack_bits<4, R>,
            unpack_bits<5, R>, unpack_bits<6, R>, unpack_bits<7, R>, unpack_bits<8, R>};
        kTable[bits - 1](codes, tiles, w);
    }

    template <int R, int T>
    static void accumulate(const char* w, int steps, const int8_t* x, int64_t x_stride, int32_t* sum) {
        __m512i s[T][R];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) s[t][r] = _mm512_load_si512(sum + (t * R + r) * kRows);
        }
        for (int i = 0; i < steps; ++i, w += R * 64, x += 4) {
            __m512i v[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) v[r] = _mm512_load_si512(w + r * 64);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                int32_t four;
                memcpy(&four, x + t * x_stride, sizeof four);
                const __m512i broadcast = _mm512_set1_epi32(four);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) s[t][r] = _mm512_dpbusd_epi32(s[t][r], v[r], broadcast);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) _mm512_store_si512(sum + (t * R + r) * kRows, s[t][r]);
        }
    }
};

}  // namespace

extern const IntegerKernels kVnniIntegers = integer_kernels_of<Bytes>();

}  // namespace hf_spqr
