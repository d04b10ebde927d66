// How x of a step of 256 columns lies in shared memory: a token's tiles one after the other, with 16 bytes of room
// after every second one. So neither writing a row nor reading a chunk of 8 columns from each of four neighbouring
// tiles of two tokens collides in the banks, and all of a lane's chunks lie at fixed distances.
#pragma once
#include "cuda/tile.cuh"

namespace hf_spqr {

// The byte of a column within its token; also beyond 256, as if all steps of one token lay one after the other.
HF_CONSTANT uint32_t x_place(uint32_t column) {
    return 2 * column + (column + 64) / 128 * 16;
}

constexpr int kTokenBytes = int(x_place(kStepColumns));
constexpr int kSetBytes = int(x_place(kStepColumns / 2));

}  // namespace hf_spqr
