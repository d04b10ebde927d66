// How x of a step of 256 columns lies in shared memory: per token 32 chunks of 8 columns, permuted so that neither
// writing a row nor reading four tiles collides in the banks. Chunk c of token b lies at chunk x_place(c, b) of its
// row.
#pragma once
#include "cuda/tile.cuh"

namespace hf_spqr {

constexpr int kTokenBytes = kStepColumns * 2;

HF_DEVICE int x_place(int chunk, int token) {
    return chunk ^ (chunk >> 3 & 1) ^ (token & 1) << 1;
}

}  // namespace hf_spqr
