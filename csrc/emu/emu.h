// Runs CUDA kernels on the host, for tests without a GPU: one block at a time, every CUDA thread a fiber.
//
// Barriers, shuffles and mma are meeting points; between them fibers run in a random order (from a seed), so that a
// missing barrier shows as a wrong result. Memory is plain host memory, so AddressSanitizer sees accesses outside of
// "global" and "shared" arrays. Shared memory starts as garbage; an asynchronous copy leaves garbage until waited for.
// Not covered: memory order between warps without a barrier, and how the hardware rounds inside an mma.
#pragma once
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

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

struct Grid {
    int64_t x, y = 1;
};

namespace emu {

constexpr int kMaxShared = 99 * 1024;  // per block, on the architecture that has least

struct DeviceLimits {
    int multiprocessors, shared_bytes;
};

inline DeviceLimits& limits() {
    static DeviceLimits l{3, kMaxShared};
    return l;
}
inline int device_limits(DeviceLimits& l) {
    l = limits();
    return 0;
}
constexpr size_t kStack = 256 * 1024;
constexpr int kWords = 8;  // that a lane can show to its warp at once

// A meeting point of some threads. Waiting threads wait for `round` to change.
struct Meeting {
    int expected = 0, arrived = 0;
    uint64_t round = 0;
};

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStack);
    int thread = 0;
    bool done = false;
    const Meeting* waits_for = nullptr;
    uint64_t round = 0;
    std::vector<std::vector<Copy>> copies;  // groups; the last one is not closed
};

struct Warp {
    Meeting meeting;
    uint32_t shown[2][32][kWords];
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Meeting all, groups[16];
    ucontext_t scheduler;
    Fiber* current = nullptr;
    unsigned char* shared = nullptr;
    int64_t x = 0, y = 0, grid_x = 0;
    std::function<void()> body;
};

inline Block& block() {
    static Block b;
    return b;
}

inline unsigned& seed() {
    static unsigned s = 1;
    return s;
}

inline void meet(Meeting& m) {
    Fiber* me = block().current;
    if (++m.arrived == m.expected) {
        m.arrived = 0;
        ++m.round;
        return;
    }
    me->waits_for = &m;
    me->round = m.round;
    swapcontext(&me->context, &block().scheduler);
}

// Shows n words to the warp and returns what all its lanes show.
template <int N>
const uint32_t (*show(const uint32_t (&words)[N])) [kWords] {
    static_assert(N <= kWords);
    const int thread = block().current->thread;
    Warp& warp = block().warps[thread / 32];
    auto& shown = warp.shown[warp.meeting.round & 1];
    memcpy(shown[thread % 32], words, sizeof words);
    meet(warp.meeting);
    return shown;
}

inline void fiber_main() {
    Fiber* me = block().current;
    block().body();
    me->done = true;
    swapcontext(&me->context, &block().scheduler);
}

inline void run_block(int threads, std::mt19937& random) {
    Block& b = block();
    b.all = {threads};
    for (Meeting& group : b.groups) group = {};
    b.warps.assign((threads + 31) / 32, {});
    for (int w = 0; w < int(b.warps.size()); ++w) b.warps[w].meeting.expected = std::min(32, threads - 32 * w);
    if (int(b.fibers.size()) < threads) b.fibers.resize(threads);
    std::vector<int> order;
    for (int t = 0; t < threads; ++t) {
        Fiber& f = b.fibers[t];
        f.thread = t;
        f.done = false;
        f.waits_for = nullptr;
        f.copies.assign(1, {});
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = &b.scheduler;
        makecontext(&f.context, fiber_main, 0);
        order.push_back(t);
    }
    for (int left = threads; left > 0;) {
        std::shuffle(order.begin(), order.end(), random);
        bool moved = false;
        for (int t : order) {
            Fiber& f = b.fibers[t];
            if (f.done || (f.waits_for && f.waits_for->round == f.round)) continue;
            f.waits_for = nullptr;
            b.current = &f;
            swapcontext(&b.scheduler, &f.context);
            left -= f.done;
            moved = true;
        }
        if (!moved) {
            fprintf(stderr, "deadlock: threads wait at a barrier that others never reach\n");
            abort();
        }
    }
}

template <auto KERNEL, bool OVERLAP = false, class Args>
int launch(Grid grid, int threads, int shared_bytes, void*, const Args& args) {
    if (shared_bytes > limits().shared_bytes || grid.y > 65535) return 1;
    Block& b = block();
    std::mt19937 random(seed());
    b.body = [args] { KERNEL(args); };
    b.grid_x = grid.x;
    for (b.y = 0; b.y < grid.y; ++b.y) {
        for (b.x = 0; b.x < grid.x; ++b.x) {
            void* shared = nullptr;
            if (posix_memalign(&shared, 1024, size_t(shared_bytes) + 1)) abort();
            memset(shared, 0xAB, size_t(shared_bytes));
            b.shared = static_cast<unsigned char*>(shared);
            run_block(threads, random);
            free(shared);
        }
    }
    return 0;
}

}  // namespace emu

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
    emu::meet(emu::block().all);
}
HF_EMU_CALL void sync_warp() {
    emu::meet(emu::block().warps[thread() / 32].meeting);
}
HF_EMU_CALL void sync_group(int group, int threads) {
    emu::Meeting& m = emu::block().groups[group];
    m.expected = threads;
    emu::meet(m);
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
template <int OFFSET>
uint32_t load_shared(uint32_t at) {
    return shared_at<uint32_t>(at + OFFSET);
}
template <int OFFSET>
uint32_t load_shared_half(uint32_t at) {
    return shared_at<uint16_t>(at + OFFSET);
}
template <int OFFSET>
uint2 load_shared2(uint32_t at) {
    return shared_at<uint2>(at + OFFSET);
}
template <int OFFSET>
uint4 load_shared4(uint32_t at) {
    return shared_at<uint4>(at + OFFSET);
}
inline void store_shared(uint32_t at, uint32_t v) {
    shared_at<uint32_t>(at) = v;
}
inline void store_shared(uint32_t at, uint2 v) {
    shared_at<uint2>(at) = v;
}

inline void store_shared(uint32_t at, uint4 v) {
    shared_at<uint4>(at) = v;
}
HF_EMU_CALL void load_matrices(uint32_t (&m)[4], uint32_t at) {
    const auto shown = emu::show({at});
    const int r = (thread() & 31) >> 2, t = thread() & 3;
    for (int i = 0; i < 4; ++i) m[i] = shared_at<uint32_t>(shown[8 * i + r][0] + 4 * t);
}

HF_EMU_CALL void start_copy(uint32_t to, const void* global, bool valid) {
    unsigned char* shared = shared_memory() + to;
    memset(shared, 0xCD, 16);
    emu::block().current->copies.back().push_back({shared, global, valid});
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
    auto& groups = emu::block().current->copies;
    while (groups.size() > but) {
        for (const emu::Copy& c : groups.front()) {
            uint4 v{};
            if (c.valid) v = *static_cast<const uint4*>(c.from);
            *static_cast<uint4*>(c.to) = v;
        }
        groups.erase(groups.begin());
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
