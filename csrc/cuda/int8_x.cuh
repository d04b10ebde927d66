// Codes of x and words of the weights on their way to the int8 tensor cores, for few tokens.
//
// mma.m16n8k32: lane 4 g + t holds A rows g and g + 8 and B column g, of each k 4t to 4t + 3 and 16 + 4t to 16 + 4t
// + 3. As in fragment.cuh, A row g is row 2g of the row block and A row g + 8 is row 2g + 1, and each thread t of a
// quad takes k from a tile of its own: four tiles, a set of 128 columns, in four mma of 8 columns of each tile.
#pragma once
#include "cuda/int8_codes.cuh"
#include "cuda/kernels.h"

namespace hf_spqr {

constexpr int kSetColumns = kTilesPerSet * kColumns;
// A token's step in shared memory; 16 bytes more than it holds, so that reading collides in no bank.
constexpr int kStepBytes = kStepColumns + 16;
constexpr uint32_t kOneBytes = 0x01010101u;

// Fetches x for the warps that share it, step by step: each warp every WIDTH-th pair of tokens, a lane 16 columns.
template <int TOKENS, int WIDTH>
class CodeFetcher {
  public:
    HF_DEVICE CodeFetcher(const Int8Args& a, int64_t first_token, int tokens, int which, int lane, uint32_t to) {
        const int token = 2 * which + (lane >> 4), chunk = lane & 15;
        from_ = dev::keep(a.x + (first_token + token) * a.x_stride + 16 * chunk);
        more_ = 2 * WIDTH * a.x_stride;
        columns_ = int(a.x_stride) - 16 * chunk;
        tokens_ = tokens - token;
        to_ = to + token * kStepBytes + 16 * chunk;
    }

    HF_DEVICE void fetch(uint32_t buffer, int step) const {
        fetch_token<0>(from_ + step * kStepColumns, to_ + buffer, step * kStepColumns < columns_ ? 16 : 0);
    }

  private:
    template <int I>
    HF_DEVICE void fetch_token(const int8_t* from, uint32_t to, int bytes) const {
        constexpr int token = 2 * WIDTH * I;
        if constexpr (token < TOKENS) {
            dev::copy_async<token * kStepBytes>(to, from, bytes, token < tokens_);
            fetch_token<I + 1>(from + more_, to, bytes);
        }
    }

    const int8_t* from_;
    int64_t more_;
    int columns_, tokens_;
    uint32_t to_;
};

// Words of rows 2g and 2g + 1 of the lane's tile of a set; zeros past the last tile.
template <int BITS>
class SetWords {
  public:
    HF_DEVICE SetWords(const Matrix& m, int64_t row_block, int lane) : m_(m), t_(lane & 3) {
        stream_ = row_block_words(m, row_block);
        from_ = dev::keep(stream_ + t_ * (BITS * kRows) + 2 * (lane >> 2));
    }

    HF_DEVICE const uint32_t* stream() const { return stream_; }

    HF_DEVICE void fetch(uint2 (&words)[BITS], int set) const {
        const int tile = set * kTilesPerSet;
        const bool there = tile + t_ < m_.panels.tiles;
        const uint32_t* at = from_ + (there ? tile_offset(m_, tile) : 0);
#pragma unroll
        for (int v = 0; v < BITS; ++v) {
            words[v] = make_uint2(0, 0);
            if (there) words[v] = dev::load_stream(reinterpret_cast<const uint2*>(at + v * kRows));
        }
    }

  private:
    const Matrix& m_;
    int t_;
    const uint32_t* stream_;
    const uint32_t* from_;
};

// A operands of the four mma of a set.
template <int BITS>
HF_DEVICE void set_operands(uint32_t (&a)[4][4], const uint2 (&words)[BITS]) {
    uint32_t w[BITS], u[4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int v = 0; v < BITS; ++v) w[v] = r ? words[v].y : words[v].x;
        sixteen_codes<BITS, 0>(u, w);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i / 2][r + 2 * (i % 2)] = u[i];
        sixteen_codes<BITS, 1>(u, w);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[2 + i / 2][r + 2 * (i % 2)] = u[i];
    }
}

}  // namespace hf_spqr
