// x in shared memory, as fp16 in stored order of columns, for resident.cuh.
//
// bf16 and fp32 are scaled per token by a power of two so that the largest |x| lands in [16, 32): nothing overflows,
// and what is 2^19 times smaller still has all its bits. Steps of 256 columns lie one
// after the other, in each its tokens, as x_place has them.
#pragma once
#include "cuda/resident_plan.h"
#include "cuda/store.cuh"

namespace hf_spqr {

class ResidentX {
  public:
    HF_DEVICE ResidentX(const ResidentArgs& a, uint32_t shared, const ResidentMap& map)
        : a_(a), at_(shared), sums_(shared + map.x_sums), integer_(map.rings > map.x_sums) {
        up_ = reinterpret_cast<float*>(dev::shared_memory() + map.scales);
    }

    // Of each token, unless x is fp16 already. All threads of the block, before anything is loaded.
    HF_DEVICE void find_scales() const {
        if (a_.dtype == DType::f16) return;
        uint32_t* of_warps = reinterpret_cast<uint32_t*>(up_ + 2 * kResidentTokens);  // [warp][token]
        const int warp = dev::thread() / 32, warps = dev::block_threads() / 32;
        for (int first = 0; first < a_.tokens; first += kAtOnce) {
            uint32_t most[kAtOnce] = {};
            find_largest(most, first);
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                const uint32_t of_warp = dev::max_of_warp(most[k]);
                if (dev::thread() % 32 == 0 && first + k < a_.tokens) {
                    of_warps[warp * kResidentTokens + first + k] = of_warp;
                }
            }
        }
        dev::sync_block();
        if (dev::thread() < a_.tokens) {
            uint32_t most = 0;
            for (int w = 0; w < warps; ++w) {
                const uint32_t of_warp = of_warps[w * kResidentTokens + dev::thread()];
                most = of_warp > most ? of_warp : most;
            }
            const uint32_t e = most >> 23, exponent = e < 5 ? 5 : e > 253 ? 253 : e;
            up_[dev::thread()] = dev::as_float((258 - exponent) << 23);
            up_[kResidentTokens + dev::thread()] = dev::as_float((exponent - 4) << 23);
        }
        dev::sync_block();
    }

    // Columns from `first` on, as many as fit. All threads of the block; AT_ONCE tokens' at a time are on their way.
    template <int AT_ONCE>
    HF_DEVICE void load(int first) {
        dev::sync_block();  // nobody reads the last ones any more
        const int chunks = a_.plan.chunk_columns / 8;
        for (int c = dev::thread(); c < chunks; c += dev::block_threads()) {
            for (int from = 0; from < a_.tokens; from += AT_ONCE) {
                uint4 v[AT_ONCE];
#pragma unroll
                for (int b = 0; b < AT_ONCE; ++b) {
                    v[b] = {};
                    if (from + b < a_.tokens) v[b] = read(from + b, first + 8 * c);
                }
#pragma unroll
                for (int b = 0; b < AT_ONCE; ++b) {
                    if (from + b < a_.tokens) put(c, from + b, v[b]);
                }
            }
        }
        dev::sync_block();
    }

    // Where the sums over a step lie, of tokens 2t and 2t + 1: over set 0 as two floats, then over set 1.
    HF_DEVICE uint32_t sums_at(int step, int t) const { return sums_ + step * bytes_of_step_sums() + 16 * t; }
    HF_DEVICE int bytes_of_step_sums() const { return ResidentMap::step_sums_bytes(a_.tokens); }

    // Where fp16 x of token 0 lies for column `column` of those that are here; token b's lies b * kTokenBytes further.
    template <int TOKENS>
    HF_DEVICE uint32_t column_at(uint32_t column) const {
        if constexpr (TOKENS == 1) return at_ + x_place(column);
        return at_ + (column >> 8) * uint32_t(a_.tokens * kTokenBytes) + x_place(column & 255);
    }
    // What turns a sum over tokens' x into one over what was given.
    HF_DEVICE float scale(int token) const { return a_.dtype == DType::f16 ? 1.f : up_[kResidentTokens + token]; }

  private:
    static constexpr int kAtOnce = 4;

    HF_DEVICE void put(int chunk, int token, uint4 v) const {
        const int step = chunk >> 5;
        dev::store_shared(at_ + (step * a_.tokens + token) * kTokenBytes + x_place(8 * (chunk & 31)), v);
        if (!integer_) return;
        const float low = dev::add(dev::add(dev::low_float(v.x), dev::low_float(v.y)),
                                   dev::add(dev::low_float(v.z), dev::low_float(v.w)));
        const float high = dev::add(dev::add(dev::high_float(v.x), dev::high_float(v.y)),
                                    dev::add(dev::high_float(v.z), dev::high_float(v.w)));
        float sum = dev::add(low, high);
#pragma unroll
        for (int mask = 1; mask < 16; mask *= 2) sum = dev::add(sum, dev::shuffle_xor(sum, mask));
        if ((chunk & 15) == 0) {
            const uint32_t place = 8 * (chunk >> 4 & 1) + 4 * (token & 1);
            dev::store_shared(sums_at(step, token >> 1) + place, dev::as_bits(sum));
        }
    }

    // Eight columns of a token, from `column` on, as they go into shared memory.
    HF_DEVICE uint4 read(int token, int column) const {
        const int64_t at = int64_t(token) * a_.weight.columns;
        if (a_.plan.vectors) {
            if (column >= a_.weight.columns) return {};
            if (a_.dtype == DType::f16) return words(at + column, 2);
            const float up = up_[token];
            uint32_t w[4];
            if (a_.dtype == DType::bf16) {
                const uint4 v = words(at + column, 2);
                const uint32_t from[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) w[i] = scaled(from[i] << 16, from[i] & 0xffff0000u, up);
            } else {
                const uint4 v = words(at + column, 4), u = words(at + column + 4, 4);
                w[0] = scaled(v.x, v.y, up);
                w[1] = scaled(v.z, v.w, up);
                w[2] = scaled(u.x, u.y, up);
                w[3] = scaled(u.z, u.w, up);
            }
            return {w[0], w[1], w[2], w[3]};
        }
        const float up = a_.dtype == DType::f16 ? 1.f : up_[token];
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int j = column + i;
            v[i] =
                j < a_.weight.columns ? dev::mul(read_as(a_.x, at + (a_.perm ? a_.perm[j] : j), a_.dtype), up) : 0.f;
        }
        return {dev::to_half2(v[0], v[1]), dev::to_half2(v[2], v[3]), dev::to_half2(v[4], v[5]),
                dev::to_half2(v[6], v[7])};
    }

    static HF_DEVICE uint32_t scaled(uint32_t first, uint32_t second, float up) {
        return dev::to_half2(dev::mul(dev::as_float(first), up), dev::mul(dev::as_float(second), up));
    }

    HF_DEVICE uint4 words(int64_t element, int size) const {
        return *reinterpret_cast<const uint4*>(static_cast<const char*>(a_.x) + element * size);
    }

    // The bits of the largest |x| of a thread's share of tokens `first` and following, of those that there are.
    HF_DEVICE void find_largest(uint32_t (&most)[kAtOnce], int first) const {
        const uint32_t kNoSign = 0x7fffffffu;
        const auto take = [&](int k, uint32_t bits) {
            most[k] = (bits & kNoSign) > most[k] ? bits & kNoSign : most[k];
        };
        if (a_.plan.vectors) {
            const int element = a_.dtype == DType::f32 ? 4 : 2, columns = 16 / element;
            for (int c = columns * dev::thread(); c < a_.weight.columns; c += columns * dev::block_threads()) {
                uint4 v[kAtOnce];
#pragma unroll
                for (int k = 0; k < kAtOnce; ++k) {
                    v[k] = {};
                    if (first + k < a_.tokens) v[k] = words(int64_t(first + k) * a_.weight.columns + c, element);
                }
#pragma unroll
                for (int k = 0; k < kAtOnce; ++k) {
                    const uint32_t from[4] = {v[k].x, v[k].y, v[k].z, v[k].w};
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        take(k, a_.dtype == DType::f32 ? from[i] : from[i] & 0xffff0000u);
                        if (a_.dtype == DType::bf16) take(k, from[i] << 16);
                    }
                }
            }
            return;
        }
        for (int c = dev::thread(); c < a_.weight.columns; c += dev::block_threads()) {
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                const int64_t at = int64_t(first + k) * a_.weight.columns + c;
                if (first + k < a_.tokens) take(k, dev::as_bits(read_as(a_.x, at, a_.dtype)));
            }
        }
    }

    const ResidentArgs& a_;
    uint32_t at_, sums_;
    bool integer_;
    float* up_;
};

}  // namespace hf_spqr
