// From codes to tensor-core operands.
//
// mma.m16n8k16: lane 4 g + t holds A rows g and g + 8 and k 2t, 2t + 1, 2t + 8, 2t + 9. Rows and k may be permuted as
// long as both operands (and the result) agree. Here A row g is row 2g of the row block and A row g + 8 is row 2g + 1,
// so that both words of a lane lie side by side; and each thread t of a quad takes k from a tile of its own: four
// tiles, a set of 128 columns, in eight mma. A quarter is a quarter of a tile: 8 columns, 4 column pairs, 2 mma.
#pragma once
#include "cuda/x_place.cuh"

namespace hf_spqr {

// fp16 bits of 2^exponent, as both halves.
HF_CONSTANT uint32_t half2_power(int exponent) {
    return (exponent >= -14 ? uint32_t(exponent + 15) << 10 : 1u << (exponent + 24)) * 0x00010001u;
}

// fp16 bits of (1, 2^exponent).
HF_CONSTANT uint32_t one_and_power(int exponent) {
    return (half2_power(0) & 0x0000ffffu) | (half2_power(exponent) & 0xffff0000u);
}

// The statistics of a lane's two rows in one quarter, each in both halves: weight = field * scale + shift, where the
// scale is low for fields at kLow and high for those at kHigh.
struct Quarter {
    uint32_t low[2], high[2], shift[2];
};

// 8-bit codes: (q - z) is made exact before the scale rounds it, as a shift of -s z would be too coarse.
template <int BITS>
constexpr bool kSubtractFirst = BITS == 8;

template <int BITS, int PAIR, bool SUBTRACT = kSubtractFirst<BITS>>
HF_DEVICE uint32_t weight_pair(const uint32_t (&w)[BITS], const Quarter& s, int r) {
    constexpr int place = place_of<BITS>(PAIR);
    const uint32_t q = field<BITS, PAIR, place>(w);
    if constexpr (SUBTRACT) {  // with all codes as if they lay at kLow
        return dev::hmul2(dev::hfma2(q, half2_power(12 + Fields<BITS>::kLow - place), s.shift[r]), s.low[r]);
    } else {
        return dev::hfma2(q, place == Fields<BITS>::kLow ? s.low[r] : s.high[r], s.shift[r]);
    }
}

// Column pairs PAIR and PAIR + 1 of a lane's two rows: what an mma takes.
template <int BITS, int PAIR>
HF_DEVICE void weight_operand(uint32_t (&a)[4], const uint32_t (&w)[2][BITS], const Quarter& q) {
    a[0] = weight_pair<BITS, PAIR>(w[0], q, 0);
    a[1] = weight_pair<BITS, PAIR>(w[1], q, 1);
    a[2] = weight_pair<BITS, PAIR + 1>(w[0], q, 0);
    a[3] = weight_pair<BITS, PAIR + 1>(w[1], q, 1);
}

// The columns of x that quarter I of the lane's tile in set H multiplies, of token 8 J + g.
template <int I, int H, int J>
HF_DEVICE uint4 load_x(uint32_t x) {
    return dev::load_shared4<16 * I + kSetBytes * H + 8 * kTokenBytes * J>(x);
}

template <int NT, int I, int H, int J = 0>
HF_DEVICE void multiply_tokens(float (&acc)[NT][4], const uint32_t (&first)[4], const uint32_t (&second)[4],
                               uint32_t x) {
    const uint4 b = load_x<I, H, J>(x);
    dev::mma_f16(acc[J], first, b.x, b.y);
    dev::mma_f16(acc[J], second, b.z, b.w);
    if constexpr (J + 1 < NT) multiply_tokens<NT, I, H, J + 1>(acc, first, second, x);
}

// Quarter I of the lane's tile in set H. w[row] are the tile's words; x is where the lane's tile of set 0 begins in
// shared memory, for its token g.
template <int BITS, int NT, int I, int H>
HF_DEVICE void multiply_quarter(float (&acc)[NT][4], const uint32_t (&w)[2][BITS], const Quarter& q, uint32_t x) {
    uint32_t first[4], second[4];
    weight_operand<BITS, 4 * I>(first, w, q);
    weight_operand<BITS, 4 * I + 2>(second, w, q);
    multiply_tokens<NT, I, H>(acc, first, second, x);
}

}  // namespace hf_spqr
