// Finds accesses to shared memory that no barrier orders.
//
// As on the hardware, only barriers (of a block, a group of warps, a warp) order what threads do in shared memory;
// shuffles and mma do not. An asynchronous copy writes at any time from its start until its thread has waited for it,
// and is there for others after a barrier after that.
//
// All threads of a warp take part in each of its barriers, so the number of barriers that a thread has passed is a
// clock; `known_[a][b]` is how far warp b's clock had come at the last barrier, of both or through others, that warp a
// has passed.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace hf_spqr {
namespace emu {

class Races {
  public:
    void begin(int shared_bytes, int threads) {
        warps_ = (threads + 31) / 32;
        words_.assign(size_t(shared_bytes + 3) / 4, {});
        reads_.assign(words_.size() * size_t(warps_), 0);
        known_.assign(size_t(warps_ * warps_), 0);
    }

    // A thread of the warp comes to a barrier, which will be the clock-th that it has passed.
    void arrive(int warp, uint32_t clock) { known(warp, warp) = clock; }
    // All warps of a barrier (a bit each) have come: each knows what any of them knew.
    void join(uint32_t warps) {
        for (int of = 0; of < warps_; ++of) {
            uint32_t most = 0;
            for (int w = 0; w < warps_; ++w) {
                if (warps >> w & 1 && known(w, of) > most) most = known(w, of);
            }
            for (int w = 0; w < warps_; ++w) {
                if (warps >> w & 1 && w != of) known(w, of) = most;
            }
        }
    }

    void read(uint32_t at, uint32_t bytes, int thread, uint32_t clock) {
        for (uint32_t i = at / 4; i < (at + bytes + 3) / 4; ++i) {
            after_write(i, thread, clock, "reads");
            uint32_t& seen = reads_[i * size_t(warps_) + size_t(thread / 32)];
            const bool other = seen / 64 == clock && seen % 64 != 0 && seen % 64 != uint32_t(thread % 32 + 1);
            seen = clock * 64 + (other ? kSeveral : uint32_t(thread % 32 + 1));
        }
    }

    void write(uint32_t at, uint32_t bytes, int thread, uint32_t clock) {
        for (uint32_t i = at / 4; i < (at + bytes + 3) / 4; ++i) {
            after_write(i, thread, clock, "writes");
            for (int w = 0; w < warps_; ++w) {
                uint32_t& seen = reads_[i * size_t(warps_) + size_t(w)];
                if (seen == 0) continue;
                const bool alone = seen % 64 == uint32_t(thread % 32 + 1) && w == thread / 32;
                if (!alone && !before(w, seen / 64, thread, clock)) report(i, thread, "writes", "read", 32 * w);
                seen = 0;
            }
            words_[i] = {clock, int16_t(thread + 1), 0};
        }
    }

    void begin_copy(uint32_t at, uint32_t bytes, int thread, uint32_t clock) {
        write(at, bytes, thread, clock);
        for (uint32_t i = at / 4; i < (at + bytes) / 4; ++i) words_[i].copying = 1;
    }
    void end_copy(uint32_t at, uint32_t bytes, int thread, uint32_t clock) {
        for (uint32_t i = at / 4; i < (at + bytes) / 4; ++i) words_[i] = {clock, int16_t(thread + 1), 0};
    }

  private:
    struct Word {
        uint32_t clock = 0;
        int16_t writer = 0;  // + 1
        int16_t copying = 0;
    };
    static constexpr uint32_t kSeveral = 33;

    uint32_t& known(int warp, int of) { return known_[size_t(warp * warps_ + of)]; }

    // Whether what a thread of `warp` did at its clock `then` comes before what `thread` does now.
    bool before(int warp, uint32_t then, int thread, uint32_t clock) {
        return warp == thread / 32 ? then < clock : then < known(thread / 32, warp);
    }

    void after_write(uint32_t i, int thread, uint32_t clock, const char* does) {
        const Word& word = words_[i];
        if (word.copying) report(i, thread, does, "still being copied", word.writer - 1);
        if (word.writer == 0 || word.writer == thread + 1) return;
        if (!before((word.writer - 1) / 32, word.clock, thread, clock)) {
            report(i, thread, does, "written", word.writer - 1);
        }
    }

    [[noreturn]] static void report(uint32_t word, int thread, const char* does, const char* done, int other) {
        fprintf(stderr,
                "race: thread %d (warp %d) %s shared memory at byte %u, %s by thread %d (warp %d): no barrier\n",
                thread, thread / 32, does, 4 * word, done, other, other / 32);
        abort();
    }

    int warps_ = 0;
    std::vector<Word> words_;
    std::vector<uint32_t> reads_;  // [word][warp]: clock * 64 + lane + 1, or + kSeveral, of the last to read
    std::vector<uint32_t> known_;  // [warp][warp]
};

}  // namespace emu
}  // namespace hf_spqr
