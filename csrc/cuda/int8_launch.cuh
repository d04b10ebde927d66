// Which integer kernel for which matrix and number of tokens.
#pragma once
#include "cuda/int8_channel.cuh"
#include "cuda/int8_groups.cuh"
#include "cuda/int8_many.cuh"
#include "cuda/launch.cuh"

namespace hf_spqr {

template <int BITS, int NT, int WIDTH, int SLICES>
int launch_int8_channel(const Int8Args& a, void* stream) {
    using Shape = Int8ChannelShape<NT, WIDTH, SLICES>;
    const Grid grid{ceil_div(a.weight.rows, Shape::kBlockRows), ceil_div(a.tokens, Shape::kTokens)};
    return launch<int8_channel_kernel<BITS, NT, WIDTH, SLICES>>(grid, Shape::kThreads, Shape::kShared, stream, a);
}

template <int BITS, int NT, int WIDTH>
int launch_int8_groups(const Int8Args& a, void* stream) {
    using Shape = Int8GroupsShape<NT, WIDTH>;
    const Grid grid{ceil_div(a.weight.rows, WIDTH * kRows), ceil_div(a.tokens, Shape::kTokens)};
    return launch<int8_groups_kernel<BITS, NT, WIDTH>>(grid, Shape::kThreads, Shape::shared(a.weight.group), stream,
                                                       a);
}

template <int BITS>
int launch_int8_many(const Int8Args& a, void* stream) {
    using Shape = Int8ManyShape<4, 4, 2, 4>;
    const Grid grid{ceil_div(a.weight.rows, Shape::kBlockRows), ceil_div(a.tokens, Shape::kTokens)};
    return launch<int8_many_kernel<BITS, 4, 4, 2, 4>>(grid, Shape::kThreads, Shape::kShared, stream, a);
}

template <int BITS>
int launch_int8(const Int8Args& a, void* stream) {
    if (a.weight.group != kPerChannel) {
        if (a.tokens <= 8) return launch_int8_groups<BITS, 1, 2>(a, stream);
        if (a.tokens <= 16) return launch_int8_groups<BITS, 2, 2>(a, stream);
        return launch_int8_groups<BITS, 4, 4>(a, stream);
    }
    if (a.tokens <= 8) return launch_int8_channel<BITS, 1, 1, 8>(a, stream);
    if (a.tokens <= 16) return launch_int8_channel<BITS, 2, 2, 4>(a, stream);
    if (a.tokens <= kMaxFusedTokens) return launch_int8_channel<BITS, 4, 4, 2>(a, stream);
    return launch_int8_many<BITS>(a, stream);
}

}  // namespace hf_spqr
