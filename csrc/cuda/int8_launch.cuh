// Which integer kernel for which matrix and number of tokens.
#pragma once
#include "cuda/int8_channel.cuh"
#include "cuda/int8_groups.cuh"
#include "cuda/int8_many_groups.cuh"
#include "cuda/int8_many_launch.cuh"
#include "cuda/int8_slices.cuh"
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

constexpr int kSlicesShared = 96 * 1024;  // fits a block of every architecture
constexpr int kNarrowGroup = 32;          // below, terms in shared memory would be too many

// Columns split over warps where shared memory has room for what they hand over.
template <int NT, int WIDTH, int SLICES>
bool can_slice(const Int8Args& a) {
    const Panels& p = a.weight.panels;
    return a.weight.group >= kNarrowGroup && p.groups < (1 << 20) &&
           Int8SlicesShape<NT, WIDTH, SLICES>::shared(a.weight.group, p.groups) <= kSlicesShared;
}

template <int BITS, int NT, int WIDTH, int SLICES>
int launch_int8_slices(const Int8Args& a, void* stream) {
    using Shape = Int8SlicesShape<NT, WIDTH, SLICES>;
    const Grid grid{ceil_div(a.weight.rows, Shape::kBlockRows), ceil_div(a.tokens, Shape::kTokens)};
    return launch<int8_slices_kernel<BITS, NT, WIDTH, SLICES>>(
        grid, Shape::kThreads, Shape::shared(a.weight.group, a.weight.panels.groups), stream, a);
}

template <int BITS, int MT, int NT, int WM, int WN, int BLOCKS_PER_SM>
int launch_int8_many_groups(const Int8Args& a, void* stream) {
    using Shape = Int8ManyGroupsShape<MT, NT, WM, WN>;
    const Grid grid{ceil_div(a.weight.rows, Shape::kBlockRows), ceil_div(a.tokens, Shape::kTokens)};
    return launch<int8_many_groups_kernel<BITS, MT, NT, WM, WN, BLOCKS_PER_SM>>(grid, Shape::kThreads, Shape::kShared,
                                                                                stream, a);
}

template <int BITS>
int launch_int8_many_groups(const Int8Args& a, const Tiles& tiles, void* stream) {
    if (tiles.enough(128, 128)) return launch_int8_many_groups<BITS, 4, 4, 2, 4, 1>(a, stream);
    return launch_int8_many_groups<BITS, 2, 4, 2, 2, 2>(a, stream);  // 64 x 64
}

template <int BITS>
int launch_int8_groups(const Int8Args& a, void* stream) {
    if (a.tokens > 16 && can_slice<4, 4, 2>(a)) return launch_int8_slices<BITS, 4, 4, 2>(a, stream);
    if (a.tokens > 8 && can_slice<2, 2, 4>(a)) return launch_int8_slices<BITS, 2, 2, 4>(a, stream);
    if (a.tokens <= kFewIntegerTokens && can_slice<1, 1, 8>(a)) return launch_int8_slices<BITS, 1, 1, 8>(a, stream);
    if (a.tokens <= 8) return launch_int8_groups<BITS, 1, 2>(a, stream);
    return launch_int8_groups<BITS, 4, 4>(a, stream);
}

template <int BITS>
int launch_int8(const Int8Args& a, void* stream) {
    const bool channel = a.weight.group == kPerChannel;
    if (a.tokens > kFewIntegerTokens &&
        (channel ? a.weight.columns <= kInt32Columns : a.weight.group >= kNarrowGroup)) {
        Tiles tiles{a.weight.rows, a.tokens, {}};
        if (const int status = device_limits(tiles.device)) return status;
        return channel ? launch_int8_many<WholeBytes<BITS>, BITS != 7>(a, tiles, stream)
                       : launch_int8_many_groups<BITS>(a, tiles, stream);
    }
    if (!channel) return launch_int8_groups<BITS>(a, stream);
    if (a.tokens <= 8) return launch_int8_channel<BITS, 1, 1, 8>(a, stream);
    if (a.tokens <= 16) return launch_int8_channel<BITS, 2, 2, 4>(a, stream);
    return launch_int8_channel<BITS, 4, 4, 2>(a, stream);
}

}  // namespace hf_spqr
