// Operands of an mma from shared memory. Rows of 128 bytes in chunks of 16, chunk c of row r at chunk c ^ key(r), the
// key being r / 2 for weights and r for x, so that neither writing nor ldmatrix collides in the banks. A rows g and
// g + 8 of an mma are the rows 2g and 2g + 1 of a row block; columns are in order.
#pragma once
#include "cuda/tile.cuh"

namespace hf_spqr {

constexpr int kOperandBytes = 128;  // of a row in shared memory

// Where chunk `chunk` of a row lies in it.
HF_CONSTANT uint32_t chunk_place(int chunk, int key) {
    return uint32_t((chunk ^ key) << 4);
}

// Where a lane's operands lie.
class Operands {
  public:
    // Rows from `weights`, tokens from `x` on, both from a multiple of 16 rows.
    HF_DEVICE Operands(uint32_t weights, uint32_t x, int lane)
        : weights_(weights + (2 * (lane & 7) + (lane >> 3 & 1)) * kOperandBytes + chunk_place(lane >> 4, lane & 7)),
          x_(x + (8 * (lane >> 4) + (lane & 7)) * kOperandBytes + chunk_place(lane >> 3 & 1, lane & 7)) {}

    // Row block i of the warp, chunks 2 k and 2 k + 1.
    HF_DEVICE void weights(uint32_t (&a)[4], uint32_t buffer, int i, int k) const {
        dev::load_matrices(a, (weights_ ^ chunk_place(2 * k, 0)) + buffer + i * kRows * kOperandBytes);
    }
    // Token tiles 2 i and 2 i + 1: two words each.
    HF_DEVICE void x(uint32_t (&b)[4], uint32_t buffer, int i, int k) const {
        dev::load_matrices(b, (x_ ^ chunk_place(2 * k, 0)) + buffer + i * 16 * kOperandBytes);
    }

  private:
    uint32_t weights_, x_;  // of chunks 0 and 1; rows begin at multiples of 128
};

}  // namespace hf_spqr
