// Which tile of rows x tokens for many tokens.
#pragma once
#include "cuda/int8_many.cuh"
#include "cuda/launch.cuh"

namespace hf_spqr {

// The largest tile is taken that makes about as many blocks as there are multiprocessors.
struct Tiles {
    int rows, tokens;
    DeviceLimits device;

    bool enough(int tile_rows, int tile_tokens) const {
        const int64_t blocks = int64_t(ceil_div(rows, tile_rows)) * ceil_div(tokens, tile_tokens);
        return blocks >= device.multiprocessors - device.multiprocessors / 16;
    }
};

template <class Codes, int MT, int NT, int WM, int WN, int BLOCKS_PER_SM>
int launch_int8_many(const Int8Args& a, void* stream) {
    using Shape = Int8ManyShape<MT, NT, WM, WN>;
    const Grid grid{ceil_div(a.weight.rows, Shape::kBlockRows), ceil_div(a.tokens, Shape::kTokens)};
    return launch<int8_many_kernel<Codes, MT, NT, WM, WN, BLOCKS_PER_SM>>(grid, Shape::kThreads, Shape::kShared,
                                                                          stream, a);
}

// LARGEST: whether registers are enough for tiles of 128 x 256, which those of 7 bits, in planes, are not.
template <class Codes, bool LARGEST>
int launch_int8_many(const Int8Args& a, const Tiles& tiles, void* stream) {
    if constexpr (LARGEST) {
        const bool full = ceil_div(a.tokens, 256) * 256 <= a.tokens + a.tokens / 4;
        if (full && tiles.enough(128, 256)) return launch_int8_many<Codes, 4, 8, 2, 4, 1>(a, stream);
    }
    if (tiles.enough(128, 128)) return launch_int8_many<Codes, 4, 8, 2, 2, 2>(a, stream);
    return launch_int8_many<Codes, 2, 4, 2, 2, 4>(a, stream);  // 64 x 64
}

}  // namespace hf_spqr
