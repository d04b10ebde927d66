// The C interface of kernels.h, apart from the linear kernels' own files.
#include "cuda/kernels.h"
#include <algorithm>
#include "cuda/activations.cuh"
#include "cuda/dequantize.cuh"
#include "cuda/int8_files.h"
#include "cuda/int8_wide.cuh"
#include "cuda/linear_launch.cuh"
#include "cuda/quantize.cuh"
#include "cuda/resident_plan.h"
#include "cuda/stats_affine_half.cuh"
#include "cuda/stats_spqr16.cuh"
#include "cuda/tiled_plan.h"

namespace hf_spqr {
namespace {

// In several launches where a grid does not have so many blocks, from 33.5 million columns on.
template <class Stats, int BITS>
int dequantize_bits(DequantizeArgs a, void* stream) {
    const int stretches = ceil_div(a.weight.panels.tiles, kDequantizeTiles);
    for (a.first_stretch = 0; a.first_stretch < stretches; a.first_stretch += kMaxGridY) {
        const Grid grid{ceil_div(a.part_rows, kRows), std::min(stretches - a.first_stretch, kMaxGridY)};
        const int status =
            launch<dequantize_kernel<Stats, BITS>>(grid, kDequantizeThreads, kDequantizeShared, stream, a);
        if (status) return status;
    }
    return 0;
}

template <class Stats, int FIRST = 1, int LAST = 8>
int dequantize_with(const DequantizeArgs& a, void* stream) {
    if constexpr (FIRST < LAST) {
        if (a.weight.bits != FIRST) return dequantize_with<Stats, FIRST + 1, LAST>(a, stream);
    }
    return dequantize_bits<Stats, FIRST>(a, stream);
}

// Whether stats_spqr16.cuh can read it: all vectors of codes also in the last panel.
bool has_usual_statistics(const Matrix& m) {
    return m.group == 16 && m.stat_bits == 3 && m.panels.last_code_words == m.panels.code_words;
}

// Shared memory of a block of the kernel for 17 to 128 tokens. That of statistics is the same for all widths of codes.
int tiled_block_bytes(const Matrix& m, int tokens) {
    if (m.format == Format::affine) {
        const bool wide = m.group == kPerChannel || m.group >= 32;  // nothing goes through shared memory
        return wide ? tiled_bytes<StatsAffineHalf<StatsAffine128<4>, 4>>(m, tokens)
                    : tiled_bytes<StatsAny<Format::affine, 4>>(m, tokens);
    }
    return has_usual_statistics(m) ? tiled_bytes<StatsSpqr16<3>>(m, tokens)
                                   : tiled_bytes<StatsAny<Format::spqr, 3>>(m, tokens);
}

bool is_served(const Matrix& m) {
    if (m.format == Format::affine) return m.bits == 2 || m.bits == 3 || m.bits == 4 || m.bits == 8;
    return m.bits >= 2 && m.bits <= 4 && m.columns <= 65536;  // beyond, outliers are wide
}

int int8_linear(const Int8Args& a, void* stream) {
    if (a.half_bytes) return int4_many(a, stream);
    if (a.weight.group == kPerChannel && a.weight.columns > kTermColumns) {
        const Grid grid{ceil_div(a.weight.rows, kRows), ceil_div(a.tokens, kWideTokens)};
        return launch<int8_wide_kernel>(grid, kRows * kWideTokens, 0, stream, a);
    }
    if (a.weight.bits < 5) return int8_few_bits(a, stream);
    return a.weight.bits < 8 ? int8_planes(a, stream) : int8_bytes(a, stream);
}

}  // namespace

extern "C" {

int hf_spqr_cuda_can_fuse(const Matrix* m, int tokens) {
    return tokens <= kLinearTokens && is_served(*m);
}

int hf_spqr_cuda_linear(const LinearArgs* a, void* stream) {
    const Matrix& m = a->weight;
    if (m.format == Format::spqr) {
        return has_usual_statistics(m) ? linear_spqr16(*a, stream) : linear_spqr_any(*a, stream);
    }
    if (m.group == kPerChannel) return linear_affine_channel(*a, stream);
    if (m.group == 128) return linear_affine128(*a, stream);
    if (m.group == 64) return linear_affine64(*a, stream);
    return m.group == 32 ? linear_affine32(*a, stream) : linear_affine_any(*a, stream);
}

int hf_spqr_cuda_tiled_parts(const Matrix* m, int tokens, int* parts) {
    *parts = 0;
    if (tokens > kTiledTokens || m->columns > kTiledColumns || !is_served(*m)) return 0;
    DeviceLimits device{};
    if (const int status = device_limits(device)) return status;
    *parts = tiled_parts(*m, tokens, device.multiprocessors, tiled_block_bytes(*m, tokens), device.shared_bytes);
    return 0;
}

int hf_spqr_cuda_linear_tiled(const TiledArgs* a, void* stream) {
    const Matrix& m = a->weight;
    if (m.format == Format::spqr) {
        return has_usual_statistics(m) ? tiled_spqr16(*a, stream) : tiled_spqr_any(*a, stream);
    }
    if (m.group == kPerChannel) return tiled_affine_channel(*a, stream);
    if (m.group == 128) return tiled_affine128(*a, stream);
    if (m.group == 64) return tiled_affine64(*a, stream);
    return m.group == 32 ? tiled_affine32(*a, stream) : tiled_affine_any(*a, stream);
}

int hf_spqr_cuda_linear_resident(const ResidentArgs* a, void* stream) {
    const Matrix& m = a->weight;
    if (a->tokens > kResidentTokens || !hf_spqr_cuda_can_fuse(&m, a->tokens)) return kNoKernel;
    if (m.format == Format::spqr) return has_usual_statistics(m) ? resident_spqr16(*a, stream) : kNoKernel;
    if (m.group == kPerChannel) return resident_affine_channel(*a, stream);
    if (m.group == 128) return resident_affine128(*a, stream);
    if (m.group == 64) return resident_affine64(*a, stream);
    return m.group == 32 ? resident_affine32(*a, stream) : kNoKernel;
}

int hf_spqr_cuda_prepare(const PrepareArgs* a, void* stream) {
    return launch<prepare_kernel>({a->tokens, 1}, kPrepareThreads, kPrepareThreads / 32 * 4, stream, *a);
}

int hf_spqr_cuda_transpose(const TransposeArgs* a, void* stream) {
    const int shared = kTransposeColumns * (kLinearTokens + 2) * 2;
    return launch<transpose_kernel>({ceil_div(a->columns, kTransposeColumns), 1}, kTransposeThreads, shared, stream,
                                    *a);
}

int hf_spqr_cuda_finish(const FinishArgs* a, void* stream) {
    const int stretches = ceil_div(a->part_rows, kFinishThreads);
    const Grid grid{a->tokens, stretches < kMaxGridY ? stretches : kMaxGridY};
    return launch<finish_kernel, true>(grid, kFinishThreads, 0, stream, *a);
}

int hf_spqr_cuda_dequantize(const DequantizeArgs* a, void* stream) {
    const Matrix& m = a->weight;
    if (m.format == Format::affine) return dequantize_with<DenseStats<Format::affine>>(*a, stream);
    if (m.group == 16 && m.stat_bits == 3 && m.bits <= 4) {
        return dequantize_with<DenseStatsSpqr16, 2, 4>(*a, stream);
    }
    return dequantize_with<DenseStats<Format::spqr>, 2>(*a, stream);
}

int hf_spqr_cuda_quantize(const QuantizeArgs* a, void* stream) {
    constexpr int shared = 2 * 32 * 4;  // two words of each warp
    const Grid grid{a->tokens, 1};
    const bool aligned = reinterpret_cast<uintptr_t>(a->x) % 16 == 0 && reinterpret_cast<uintptr_t>(a->code) % 8 == 0;
    if (!aligned || a->perm || a->columns % kQuantizeVector != 0) {
        return launch<quantize_kernel>(grid, kQuantizeThreads, shared, stream, *a);
    }
    if (a->tokens <= kFewIntegerTokens && a->columns > kQuantizeThreads * kQuantizeVector) {
        return launch<quantize_vectors_kernel<kQuantizeThreadsOfFew>>(grid, kQuantizeThreadsOfFew, shared, stream, *a);
    }
    return launch<quantize_vectors_kernel<kQuantizeThreads>>(grid, kQuantizeThreads, shared, stream, *a);
}

int hf_spqr_cuda_pad(const PadArgs* a, void* stream) {
    return launch<pad_kernel>({a->tokens, 1}, kPadThreads, 0, stream, *a);
}

int hf_spqr_cuda_takes_half_bytes(const Matrix* m, int tokens, int act_bits, bool* yes) {
    *yes = false;
    if (m->bits != 4 || act_bits > 4 || m->group != kPerChannel || m->columns > kInt32Columns) return 0;
    DeviceLimits device{};
    const int status = device_limits(device);
    *yes = tokens > kFewIntegerTokens && device.generation == 8;
    return status;
}

int hf_spqr_cuda_pack_half_bytes(const PadArgs* a, void* stream) {
    return pack_half_bytes(*a, stream);
}

int hf_spqr_cuda_int8_linear(const Int8Args* whole, void* stream) {
    constexpr int kMost = kMaxGridY * kWideTokens;  // the least that a grid of any of the kernels has
    Int8Args a = *whole;
    for (int first = 0; first < whole->tokens; first += kMost) {
        a.tokens = std::min(whole->tokens - first, kMost);
        if (const int status = int8_linear(a, stream)) return status;
        a.x += kMost * a.x_stride;
        a.scale += kMost;
        a.zero += kMost;
        a.y = static_cast<char*>(a.y) + int64_t(kMost) * a.weight.rows * (a.dtype == DType::f32 ? 4 : 2);
    }
    return 0;
}

int hf_spqr_cuda_multiprocessors(int* count) {
    DeviceLimits device{};
    const int status = device_limits(device);
    *count = device.multiprocessors;
    return status;
}

const char* hf_spqr_cuda_error(int status) {
#ifdef HF_SPQR_EMU
    return status ? "emulated launch failed" : "no error";
#else
    return cudaGetErrorString(static_cast<cudaError_t>(status));
#endif
}

int hf_spqr_cuda_old_driver(void) {
#ifdef HF_SPQR_EMU
    return 0;
#else
    int driver = 0;  // stays 0 without a driver, where nothing will be called either
    if (cudaDriverGetVersion(&driver) != cudaSuccess) return 0;
    return driver > 0 && driver / 1000 < CUDART_VERSION / 1000 ? driver : 0;
#endif
}

}  // extern "C"
}  // namespace hf_spqr
