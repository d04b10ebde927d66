// Whether and how the kernel for few tokens runs here: by shapes and by what the device has.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/resident.cuh"

namespace hf_spqr {

// A way through, or 0 groups if there is none.
struct ResidentWay {
    int groups, shared_bytes;
};

template <class Stats, int BITS, int NT>
ResidentWay plan_resident(ResidentArgs& a, const DeviceLimits& device) {
    const int all = ceil_div(a.weight.columns, kStepColumns) * kStepColumns;
    const int most = device.shared_bytes / 2;  // columns that fit, whatever else there is
    const int row_blocks = ceil_div(a.weight.rows, kRows);
    for (int groups = row_blocks > device.multiprocessors ? most_groups(NT) : 1; groups > 0; --groups) {
        const auto bytes = [&](int columns) {
            a.plan.chunk_columns = columns;
            return ResidentMap(a.plan, a.weight.columns, a.tokens, groups, Ring<Stats, BITS>::kSlotBytes,
                               Stats::kSharedWords * 4, Stats::kInteger)
                .all;
        };
        if (all <= most && bytes(all) <= device.shared_bytes) return {groups, bytes(all)};
        if (NT > 1) continue;  // stretches would be short, and each has its sums
        int columns = (all <= most ? all - 1 : most) / kChunkStep * kChunkStep;
        while (columns > 0 && bytes(columns) > device.shared_bytes) columns -= kChunkStep;
        if (columns > 0) return {groups, bytes(columns)};
    }
    return {0, 0};
}

template <class Stats, int BITS, int NT>
int launch_resident(ResidentArgs a, void* stream) {
    DeviceLimits device{};
    if (const int status = device_limits(device)) return status;
    const ResidentWay way = plan_resident<Stats, BITS, NT>(a, device);
    if (way.groups == 0) return kNoKernel;
    a.plan.vectors = !a.perm && a.weight.columns % 8 == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
    const int row_blocks = ceil_div(a.weight.rows, kRows);
    const int blocks = row_blocks < device.multiprocessors ? row_blocks : device.multiprocessors;
    return launch<linear_resident_kernel<Stats, BITS, NT>, true>({blocks, 1}, way.groups * kGroupThreads,
                                                                 way.shared_bytes, stream, a);
}

template <class Stats, int BITS>
int launch_resident(const ResidentArgs& a, void* stream) {
    return a.tokens <= 8 ? launch_resident<Stats, BITS, 1>(a, stream) : launch_resident<Stats, BITS, 2>(a, stream);
}

}  // namespace hf_spqr
