// Sets whose scale and zero point are the same for all their 128 columns: the tensor cores take the codes as they are,
// as fp16 subnormals, and sum(s (q - z) x) = s (sum(q x) - z sum(x)) is put together in fp32. Weights are not rounded
// at all. The common factor of the subnormals, kFactor, is made up for when all is added up.
//
// Every second mma may have its codes at another place, and then keeps its own sums. The sums of x come from the same
// instruction, with a matrix of ones.
#pragma once
#include "cuda/fragment.cuh"

namespace hf_spqr {

// Places of the codes of column pairs 4 i, 4 i + 1 and of 4 i + 2, 4 i + 3: those that take fewest shifts.
template <int BITS>
struct IntegerFields {
    static constexpr int kFirst = BITS == 3 ? 3 : 0;
    static constexpr int kSecond = BITS == 3 ? 6 : BITS == 8 ? 0 : 4;
    static constexpr int kSums = kFirst == kSecond ? 1 : 2;
    static constexpr float kSecondFactor = 1.f / float(1 << (kSecond - kFirst));
    static constexpr float kFactor = float(1 << (24 - kFirst));
};

// Of one row block and set: [first, second] kind of column pairs (one and the same if they have one place), tokens,
// mma accumulator.
template <int BITS, int NT>
struct IntegerSums {
    float of[IntegerFields<BITS>::kSums][NT][4] = {};
};

template <int BITS, int PAIR, int PLACE>
HF_DEVICE void code_operand(uint32_t (&a)[4], const uint32_t (&w)[2][BITS]) {
    a[0] = field<BITS, PAIR, PLACE>(w[0]);
    a[1] = field<BITS, PAIR, PLACE>(w[1]);
    a[2] = field<BITS, PAIR + 1, PLACE>(w[0]);
    a[3] = field<BITS, PAIR + 1, PLACE>(w[1]);
}

// Quarter I of the lane's tiles in set H of R row blocks. words[row block], x as in multiply_quarter.
template <int BITS, int NT, int R, int I, int H, int J = 0>
HF_DEVICE void multiply_codes(IntegerSums<BITS, NT> (&sums)[R], float (&x_sums)[NT][4],
                              const uint32_t (&w)[R][2][BITS], const uint32_t (&ones)[4], uint32_t x) {
    using Fields = IntegerFields<BITS>;
    const uint4 b = load_x<I, H, J>(x);
    dev::mma_f16(x_sums[J], ones, b.x, b.y);
    dev::mma_f16(x_sums[J], ones, b.z, b.w);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        uint32_t a[4];
        code_operand<BITS, 4 * I, Fields::kFirst>(a, w[r]);
        dev::mma_f16(sums[r].of[0][J], a, b.x, b.y);
        code_operand<BITS, 4 * I + 2, Fields::kSecond>(a, w[r]);
        dev::mma_f16(sums[r].of[Fields::kSums - 1][J], a, b.z, b.w);
    }
    if constexpr (J + 1 < NT) multiply_codes<BITS, NT, R, I, H, J + 1>(sums, x_sums, w, ones, x);
}

// Quarter I of the lane's tile in set H of one row block; x[j] as in multiply_quarter, for the j-th eight tokens. Sums
// of x come from elsewhere.
template <int BITS, int NT, int I, int H>
HF_DEVICE void multiply_integers(IntegerSums<BITS, NT>& sums, const uint32_t (&w)[2][BITS], const uint32_t (&x)[NT]) {
    using Fields = IntegerFields<BITS>;
    uint32_t first[4], second[4];
    code_operand<BITS, 4 * I, Fields::kFirst>(first, w);
    code_operand<BITS, 4 * I + 2, Fields::kSecond>(second, w);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
        const uint4 b = load_x<I, H, 0>(x[j]);
        dev::mma_f16(sums.of[0][j], first, b.x, b.y);
        dev::mma_f16(sums.of[Fields::kSums - 1][j], second, b.z, b.w);
    }
}

// Scale and zero point of a lane's two rows in one set; the zero point divided by kFactor.
struct SetScales {
    float scale[2], zero[2];
};

template <int BITS, int NT>
HF_DEVICE void add_set(float (&total)[NT][4], const IntegerSums<BITS, NT>& sums, const float (&x_sums)[NT][4],
                       const SetScales& f) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            float y = sums.of[0][j][e];
            if constexpr (IntegerFields<BITS>::kSums > 1)
                y = dev::fma(sums.of[1][j][e], IntegerFields<BITS>::kSecondFactor, y);
            y = dev::fma(x_sums[j][e], -f.zero[e >> 1], y);
            total[j][e] = dev::fma(y, f.scale[e >> 1], total[j][e]);
        }
    }
}

}  // namespace hf_spqr
