// The engine of integer_linear.h for ARM's integer dot product: signed bytes against signed bytes.
#include "cpu/code_bytes.h"
#include "cpu/integer_linear.h"

namespace hf_spqr {
namespace {

template <int B, int T>
void few_of(const uint32_t* codes, int tiles, const int8_t* x, int64_t x_stride, const int8_t* one, int32_t* sum,
            int32_t* weights) {
    constexpr int kTogether = T <= 2 ? 4 : 2;  // vectors of four rows
    for (int lane = 0; lane < kRows; lane += 4 * kTogether) {
        int32x4_t s[kTogether][T + 1];
        for (int l = 0; l < kTogether; ++l) {
            for (int t = 0; t < T; ++t) s[l][t] = vld1q_s32(sum + t * kRows + lane + 4 * l);
            s[l][T] = vld1q_s32(weights + lane + 4 * l);
        }
        const uint32_t* tile = codes;
        for (int column = 0; column < tiles * kColumns; column += kColumns, tile += B * kRows) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                int8x16_t v[T + 1];
                for (int t = 0; t < T; ++t) v[t] = vld1q_s8(x + t * x_stride + column + 16 * half);
                v[T] = vld1q_s8(one + column + 16 * half);
                add_products<B, kTogether, T + 1, false>(tile, lane, 4 * half, v, s);
            }
        }
        for (int l = 0; l < kTogether; ++l) {
            for (int t = 0; t < T; ++t) vst1q_s32(sum + t * kRows + lane + 4 * l, s[l][t]);
            vst1q_s32(weights + lane + 4 * l, s[l][T]);
        }
    }
}

struct Dots {
    using Element = int8_t;
    static constexpr bool kTokenTiles = false, kArranged = true;
    static constexpr int kTileBytes = 512, kSteps = kWords, kBlocks = 1, kTogether = 5, kFew = 4, kFewBlocks = 1;

    static constexpr int offset(int bits) { return code_offset(bits); }
    static int column(int bits, int i) { return column_at(bits, i); }

    template <int B, int R>
    static void unpack_bits(const uint32_t* codes, int tiles, char* w) {
        for (; tiles > 0; --tiles, codes += B * kRows) {
#pragma GCC unroll 8
            for (int word = 0; word < kWords; ++word, w += R * 64) {
#pragma GCC unroll 4
                for (int lane = 0; lane < kRows; lane += 4) {
                    vst1q_s8(reinterpret_cast<int8_t*>(w) + lane * 4, code_bytes<B>(codes, lane, word));
                }
            }
        }
    }

    template <int R, int T>
    static void accumulate(const char* w, int steps, const int8_t* x, int64_t x_stride, int32_t* sum, Ahead ahead) {
        static_assert(R == 1);
        const int8_t* v = reinterpret_cast<const int8_t*>(w);
        int32x4_t s[T][4];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int l = 0; l < 4; ++l) s[t][l] = vld1q_s32(sum + t * kRows + 4 * l);
        }
        int i = 0;
        for (; i + 4 <= steps; i += 4, v += 4 * 64, x += 16) {
            int8x16_t four[T];
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) four[t] = vld1q_s8(x + t * x_stride);
            step<T, 0>(v, four, s, ahead);
            step<T, 1>(v + 64, four, s, ahead);
            step<T, 2>(v + 128, four, s, ahead);
            step<T, 3>(v + 192, four, s, ahead);
        }
        for (; i < steps; ++i, v += 64, x += 4) {
            int8x16_t one[T];
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                int32_t word;
                memcpy(&word, x + t * x_stride, sizeof word);
                one[t] = vreinterpretq_s8_s32(vdupq_n_s32(word));
            }
            step<T, 0>(v, one, s, ahead);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int l = 0; l < 4; ++l) vst1q_s32(sum + t * kRows + 4 * l, s[t][l]);
        }
    }

    // Four columns, which lie in lane K of x.
    template <int T, int K>
    __attribute__((always_inline)) static void step(const int8_t* w, const int8x16_t* x, int32x4_t (*s)[4],
                                                    Ahead& ahead) {
        ahead.fetch();
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) {
            const int8x16_t v = vld1q_s8(w + 16 * l);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) s[t][l] = vdotq_laneq_s32(s[t][l], v, x[t], K);
        }
    }

    template <int B>
    static void few_bits(int tokens, const uint32_t* codes, int tiles, const int8_t* x, int64_t x_stride,
                         const int8_t* one, int32_t* sum, int32_t* weights) {
        constexpr decltype(&few_of<B, 1>) kTable[kFew] = {few_of<B, 1>, few_of<B, 2>, few_of<B, 3>, few_of<B, 4>};
        kTable[tokens - 1](codes, tiles, x, x_stride, one, sum, weights);
    }

    template <int R>
    static void few(int tokens, int bits, const uint32_t* codes, int64_t, int tiles, const int8_t* x, int64_t x_stride,
                    const int8_t* one, int32_t* sum, int32_t* weights) {
        static_assert(R == 1);
        constexpr decltype(&few_bits<8>) kTable[8] = {few_bits<1>, few_bits<2>, few_bits<3>, few_bits<4>,
                                                      few_bits<5>, few_bits<6>, few_bits<7>, few_bits<8>};
        kTable[bits - 1](tokens, codes, tiles, x, x_stride, one, sum, weights);
    }
};

bool takes(const Matrix& m) {
    return m.group == kPerChannel || m.group >= columns_together(m.bits);
}

int64_t prepared_bytes_dotprod(const Matrix& m, int64_t tokens) {
    return takes(m) ? prepared_bytes<Dots>(m, tokens) : kBaseIntegers.prepared_bytes(m, tokens);
}

void prepare_dotprod(const IntegerArgs& a, int64_t first, int64_t last) {
    takes(a.weight) ? prepare_integers<Dots>(a, first, last) : kBaseIntegers.prepare(a, first, last);
}

void linear_dotprod(const IntegerArgs& a, int64_t first, int64_t last) {
    takes(a.weight) ? integer_linear<Dots>(a, first, last) : kBaseIntegers.linear(a, first, last);
}

}  // namespace

extern const IntegerKernels kDotprodIntegers = {quantize, prepared_bytes_dotprod, prepare_dotprod, linear_dotprod};

}  // namespace hf_spqr
