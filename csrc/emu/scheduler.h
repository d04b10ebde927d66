// One block at a time, every CUDA thread a fiber.
//
// Barriers, shuffles and mma are meeting points; between them fibers run in a random order (from a seed), so that a
// missing barrier shows as a wrong result. Shared memory starts as garbage.
#pragma once
#include <ucontext.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>
#include "emu/races.h"

namespace hf_spqr {

struct Grid {
    int64_t x, y = 1;
};

namespace emu {

constexpr int kMaxShared = 99 * 1024;  // per block, on the architecture that has least
constexpr int kMaxGridY = 64;          // devices have 65,535; so few that tests reach them

struct DeviceLimits {
    int multiprocessors, shared_bytes;
    int generation = 8;
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
    uint32_t warps = 0;  // that have arrived at a barrier
};

struct Copy {
    uint32_t to;  // in shared memory
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
    uint32_t barriers = 0;                  // that it has passed
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
    Races races;
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

// A barrier, which also orders accesses to shared memory.
inline void synchronize(Meeting& m) {
    Fiber* me = block().current;
    Races& races = block().races;
    const int warp = me->thread / 32;
    races.arrive(warp, me->barriers + 1);
    m.warps |= 1u << warp;
    if (m.arrived + 1 == m.expected) {
        races.join(m.warps);
        m.warps = 0;
    }
    meet(m);
    ++me->barriers;
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
    for (const auto& group : me->copies) {
        if (group.empty()) continue;
        fprintf(stderr, "race: thread %d ends without having waited for its copies\n", me->thread);
        abort();
    }
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
        f.barriers = 0;
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
    if (shared_bytes > limits().shared_bytes || grid.y > kMaxGridY) return 1;
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
            b.races.begin(shared_bytes, threads);
            run_block(threads, random);
            free(shared);
        }
    }
    return 0;
}

}  // namespace emu

}  // namespace hf_spqr
