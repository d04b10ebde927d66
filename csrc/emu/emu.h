// Runs CUDA kernels on the host, for tests without a GPU: what device instructions do.
//
// Memory is plain host memory, so AddressSanitizer sees accesses outside of "global" and "shared" arrays; accesses to
// shared memory through the functions below are also checked for races (races.h). An asynchronous copy leaves garbage
// until waited for. Not covered: how the hardware rounds inside an mma.
#pragma once
#include <cmath>
#include "emu/scheduler.h"

#define HF_DEVICE inline
#define HF_EMU_CALL __attribute__((noinline)) inline  // what unrolled loops call hundreds of times: compiles faster
#define HF_CONSTANT constexpr
#define HF_KERNEL(threads, blocks) void

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) {
    return {x, y};
}
inline float2 make_float2(float x, float y) {
    return {x, y};
}

namespace hf_spqr {
namespace dev {

inline int thread() {
    return emu::block().current->thread;
}
inline int64_t block_x() {
    return emu::block().x;
}
inline int64_t block_y() {
    return emu::block().y;
}
HF_EMU_CALL void sync_block() {
    emu::synchronize(emu::block().all);
}
HF_EMU_CALL void sync_warp() {
    emu::synchronize(emu::block().warps[thread() / 32].meeting);
}
HF_EMU_CALL void sync_group(int group, int threads) {
    emu::Meeting& m = emu::block().groups[group];
    m.expected = threads;
    emu::synchronize(m);
}
inline void let_next_kernel_start() {}
inline void wait_for_kernel() {}
inline void prefetch(const void*) {}
inline int block_threads() {
    return emu::block().all.expected;
}
inline int grid_blocks() {
    return int(emu::block().grid_x);
}
inline unsigned char* shared_memory() {
    return emu::block().shared;
}

inline float half_to_float(uint16_t bits) {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return float(h);
}
inline uint16_t to_half(double value) {
    const _Float16 h = _Float16(value);
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
}
HF_EMU_CALL float low_float(uint32_t a) {
    return half_to_float(uint16_t(a));
}
HF_EMU_CALL float high_float(uint32_t a) {
    return half_to_float(uint16_t(a >> 16));
}
HF_EMU_CALL uint32_t to_half2(float low, float high) {
    return to_half(low) | uint32_t(to_half(high)) << 16;
}
HF_EMU_CALL uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
    return to_half(double(low_float(a)) * low_float(b) + low_float(c)) |
           uint32_t(to_half(double(high_float(a)) * high_float(b) + high_float(c))) << 16;
}
HF_EMU_CALL uint32_t hmul2(uint32_t a, uint32_t b) {
    return hfma2(a, b, 0x80008000u);
}
HF_EMU_CALL uint32_t hadd2(uint32_t a, uint32_t b) {
    return hfma2(a, 0x3c003c00u, b);
}
inline uint32_t low_twice(uint32_t a) {
    return (a & 0xffffu) * 0x00010001u;
}
inline uint32_t high_twice(uint32_t a) {
    return (a >> 16) * 0x00010001u;
}

inline float as_float(uint32_t a) {
    float f;
    memcpy(&f, &a, 4);
    return f;
}
inline uint32_t as_bits(float a) {
    uint32_t u;
    memcpy(&u, &a, 4);
    return u;
}
HF_EMU_CALL uint32_t to_bfloat2(float low, float high) {
    const auto one = [](float f) {
        const uint32_t u = as_bits(f);
        return f != f ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
    };
    return one(low) | one(high) << 16;
}
inline float mul(float a, float b) {
    return a * b;
}
inline float add(float a, float b) {
    return a + b;
}
inline float fma(float a, float b, float c) {
    return std::fma(a, b, c);
}

HF_EMU_CALL float shuffle_xor(float v, int mask) {
    return as_float(emu::show({as_bits(v)})[(thread() & 31) ^ mask][0]);
}
HF_EMU_CALL int shuffle_xor(int v, int mask) {
    return int(emu::show({uint32_t(v)})[(thread() & 31) ^ mask][0]);
}
HF_EMU_CALL int shuffle(int v, int from) {
    return int(emu::show({uint32_t(v)})[from][0]);
}
HF_EMU_CALL float shuffle(float v, int from) {
    return as_float(emu::show({as_bits(v)})[from][0]);
}
HF_EMU_CALL uint32_t ballot(bool yes) {
    const auto shown = emu::show({uint32_t(yes)});
    uint32_t lanes = 0;
    for (int lane = 0; lane < 32; ++lane) lanes |= shown[lane][0] << lane;
    return lanes;
}
inline int count_bits(uint32_t v) {
    return __builtin_popcount(v);
}
HF_EMU_CALL int count(bool yes) {
    return count_bits(ballot(yes));
}
HF_EMU_CALL uint32_t max_of_warp(uint32_t v) {
    const auto shown = emu::show({v});
    uint32_t most = 0;
    for (int lane = 0; lane < emu::block().warps[thread() / 32].meeting.expected; ++lane)
        most = std::max(most, shown[lane][0]);
    return most;
}

HF_EMU_CALL void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto shown = emu::show({a[0], a[1], a[2], a[3], b0, b1});
    const int g = (thread() & 31) >> 2, t = thread() & 3;
    for (int e = 0; e < 4; ++e) {
        const int row_half = e >> 1, column = 2 * t + (e & 1);
        double sum = c[e];
        for (int k = 0; k < 16; ++k) {
            const uint32_t left = shown[4 * g + (k % 8) / 2][row_half + 2 * (k / 8)];
            const uint32_t right = shown[4 * column + (k % 8) / 2][4 + k / 8];
            sum += k % 2 ? double(high_float(left)) * high_float(right) : double(low_float(left)) * low_float(right);
        }
        c[e] = float(sum);
    }
}

// Byte i of four in a word.
inline int unsigned_byte(uint32_t a, int i) {
    return int(a >> 8 * i & 255);
}
inline int signed_byte(uint32_t a, int i) {
    return int8_t(a >> 8 * i);
}
HF_EMU_CALL void mma_u8s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto shown = emu::show({a[0], a[1], a[2], a[3], b0, b1});
    const int g = (thread() & 31) >> 2, t = thread() & 3;
    for (int e = 0; e < 4; ++e) {
        const int row_half = e >> 1, column = 2 * t + (e & 1);
        uint32_t sum = uint32_t(c[e]);
        for (int k = 0; k < 32; ++k) {
            const uint32_t left = shown[4 * g + k % 16 / 4][row_half + 2 * (k / 16)];
            const uint32_t right = shown[4 * column + k % 16 / 4][4 + k / 16];
            sum += uint32_t(unsigned_byte(left, k % 4) * signed_byte(right, k % 4));
        }
        c[e] = int(sum);
    }
}
inline int unsigned_nibble(uint32_t a, int i) {
    return int(a >> 4 * i & 15);
}
inline int signed_nibble(uint32_t a, int i) {
    return (unsigned_nibble(a, i) ^ 8) - 8;
}
HF_EMU_CALL void mma_u4s4(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto shown = emu::show({a[0], a[1], a[2], a[3], b0, b1});
    const int g = (thread() & 31) >> 2, t = thread() & 3;
    for (int e = 0; e < 4; ++e) {
        const int row_half = e >> 1, column = 2 * t + (e & 1);
        uint32_t sum = uint32_t(c[e]);
        for (int k = 0; k < 64; ++k) {
            const uint32_t left = shown[4 * g + k % 32 / 8][row_half + 2 * (k / 32)];
            const uint32_t right = shown[4 * column + k % 32 / 8][4 + k / 32];
            sum += uint32_t(unsigned_nibble(left, k % 8) * signed_nibble(right, k % 8));
        }
        c[e] = int(sum);
    }
}
constexpr bool kInt4Cores = true;
inline int add_signed_bytes(uint32_t a, int c) {
    return c + signed_byte(a, 0) + signed_byte(a, 1) + signed_byte(a, 2) + signed_byte(a, 3);
}
inline int add_unsigned_bytes(uint32_t a, int c) {
    return c + unsigned_byte(a, 0) + unsigned_byte(a, 1) + unsigned_byte(a, 2) + unsigned_byte(a, 3);
}
template <uint32_t SELECT>
uint32_t select_bytes(uint32_t a, uint32_t b) {
    const uint64_t both = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= uint32_t(both >> 8 * (SELECT >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
HF_EMU_CALL uint32_t permute_bytes(uint32_t a, uint32_t selector) {
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= uint32_t(uint64_t(a) >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
inline float div(float a, float b) {
    return a / b;
}
inline float round_even(float a) {
    return std::nearbyintf(a);
}
inline float float_of(int a) {
    return float(a);
}

HF_EMU_CALL uint2 load_stream(const uint2* p) {
    return *p;
}
HF_EMU_CALL uint32_t load_stream(const uint32_t* p) {
    return *p;
}

inline int uniform(int v) {
    return v;
}
inline uint32_t keep(uint32_t v) {
    return v;
}
inline uint32_t pin(uint32_t v) {
    return v;
}
template <class T>
T* keep(T* p) {
    return p;
}
template <int TIMES, class T>
const T* at_stride(const T* p, int stride) {
    return p + int64_t(TIMES) * stride;
}
template <uint32_t MASK>
uint32_t mask_or(uint32_t a, uint32_t bits) {
    return (a & MASK) | bits;
}
inline uint32_t low_halves(uint32_t a, uint32_t b) {
    return (a & 0xffffu) | b << 16;
}
inline uint32_t high_halves(uint32_t a, uint32_t b) {
    return a >> 16 | (b & 0xffff0000u);
}

inline uint32_t shared_address() {
    return 0;
}
template <class T>
T& shared_at(uint32_t at) {
    return *reinterpret_cast<T*>(shared_memory() + at);
}
template <class T>
T read_shared(uint32_t at) {
    const emu::Fiber& me = *emu::block().current;
    emu::block().races.read(at, sizeof(T), me.thread, me.barriers);
    return shared_at<T>(at);
}
template <class T>
void write_shared(uint32_t at, T v) {
    const emu::Fiber& me = *emu::block().current;
    emu::block().races.write(at, sizeof(T), me.thread, me.barriers);
    shared_at<T>(at) = v;
}
template <int OFFSET>
uint32_t load_shared(uint32_t at) {
    return read_shared<uint32_t>(at + OFFSET);
}
template <int OFFSET>
uint32_t load_shared_half(uint32_t at) {
    return read_shared<uint16_t>(at + OFFSET);
}
template <int OFFSET>
uint2 load_shared2(uint32_t at) {
    return read_shared<uint2>(at + OFFSET);
}
template <int OFFSET>
uint4 load_shared4(uint32_t at) {
    return read_shared<uint4>(at + OFFSET);
}
inline void store_shared_half(uint32_t at, uint32_t v) {
    write_shared(at, uint16_t(v));
}
inline void store_shared(uint32_t at, uint32_t v) {
    write_shared(at, v);
}
inline void store_shared(uint32_t at, uint2 v) {
    write_shared(at, v);
}
inline void store_shared(uint32_t at, uint4 v) {
    write_shared(at, v);
}
HF_EMU_CALL void load_matrices(uint32_t (&m)[4], uint32_t at) {
    const auto shown = emu::show({at});
    const int r = (thread() & 31) >> 2, t = thread() & 3;
    for (int i = 0; i < 4; ++i) m[i] = read_shared<uint32_t>(shown[8 * i + r][0] + 4 * t);
}

HF_EMU_CALL void start_copy(uint32_t to, const void* global, bool valid) {
    emu::Fiber& me = *emu::block().current;
    emu::block().races.begin_copy(to, 16, me.thread, me.barriers);
    memset(shared_memory() + to, 0xCD, 16);
    me.copies.back().push_back({to, global, valid});
}
template <int OFFSET>
void copy_async(uint32_t to, const void* global, int bytes, bool wanted) {
    if (wanted) start_copy(to + OFFSET, global, bytes != 0);
}
template <int TO_OFFSET, int FROM_OFFSET>
void copy_stream(uint32_t to, const void* global, bool valid) {
    start_copy(to + TO_OFFSET, static_cast<const char*>(global) + FROM_OFFSET, valid);
}
inline void close_copies() {
    emu::block().current->copies.emplace_back();
}
HF_EMU_CALL void finish_copies(size_t but) {
    emu::Fiber& me = *emu::block().current;
    while (me.copies.size() > but) {
        for (const emu::Copy& c : me.copies.front()) {
            emu::block().races.end_copy(c.to, 16, me.thread, me.barriers);
            shared_at<uint4>(c.to) = c.valid ? *static_cast<const uint4*>(c.from) : uint4{};
        }
        me.copies.erase(me.copies.begin());
    }
}
template <int N>
void wait_for_copies_but() {
    finish_copies(N + 1);
}
inline void wait_for_copies() {
    finish_copies(0);
    close_copies();
}

}  // namespace dev
}  // namespace hf_spqr
