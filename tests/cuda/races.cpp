// A block of four warps with one mistake of a kind, to see that the emulator finds it: races KIND. Kind 0 and 8 have
// none.
#include <cstdio>
#include <cstdlib>
#include "emu/emu.h"

using namespace hf_spqr;

namespace {

struct Args {
    int kind;
    const unsigned char* global;
};

uint32_t word_of(int thread) {
    return dev::shared_address() + 4 * uint32_t(thread);
}

void fetch(const Args& a) {
    dev::copy_stream<0, 0>(16 * uint32_t(dev::thread()), a.global + 16 * dev::thread(), true);
    dev::close_copies();
}

void kernel(const Args a) {
    const int thread = dev::thread(), warp = thread / 32, other = (thread + 32) % 128, neighbour = thread ^ 1;
    const uint32_t mine = word_of(thread);
    switch (a.kind) {
        case 0:  // a barrier between everything
            dev::store_shared(mine, 1u);
            dev::sync_block();
            dev::load_shared<0>(word_of(other));
            dev::sync_block();
            fetch(a);
            dev::wait_for_copies();
            dev::sync_block();
            dev::load_shared4<0>(4 * word_of(other));
            break;
        case 1:  // none
            dev::store_shared(mine, 1u);
            dev::load_shared<0>(word_of(other));
            break;
        case 2:  // of the warp only
            dev::store_shared(mine, 1u);
            dev::sync_warp();
            dev::load_shared<0>(word_of(neighbour));
            dev::load_shared<0>(word_of(other));
            break;
        case 3:  // written while others may still read
            dev::store_shared(mine, 1u);
            dev::sync_block();
            dev::load_shared<0>(word_of(other));
            dev::store_shared(mine, 2u);
            break;
        case 4:  // read before waited for
            fetch(a);
            dev::load_shared4<0>(4 * mine);
            break;
        case 5:  // waited for by its own thread only
            fetch(a);
            dev::wait_for_copies();
            dev::load_shared4<0>(4 * mine);
            dev::load_shared4<0>(4 * word_of(neighbour));
            break;
        case 6:  // of half of the block
            dev::store_shared(mine, 1u);
            dev::sync_group(1 + warp / 2, 64);
            dev::load_shared<0>(word_of(thread ^ 32));
            dev::load_shared<0>(word_of(thread ^ 64));
            break;
        case 7:  // a shuffle is none
            dev::store_shared(mine, 1u);
            dev::shuffle(thread, 0);
            dev::load_shared<0>(word_of(neighbour));
            break;
        case 8:  // through a warp that meets one after the other
            if (warp == 0) dev::store_shared(mine, 1u);
            if (warp < 2) dev::sync_group(1, 64);
            if (warp == 1 || warp == 2) dev::sync_group(2, 64);
            if (warp == 2) dev::load_shared<0>(word_of(thread - 64));
            break;
        case 10:  // nobody waits, and so who uses the memory later may lose what it writes
            fetch(a);
            break;
        default:  // copied to while others may still read
            dev::load_shared4<0>(4 * word_of(neighbour));
            fetch(a);
            dev::wait_for_copies();
            break;
    }
}

}  // namespace

int main(int, char** argv) {
    const std::vector<unsigned char> global(128 * 16 + 16);
    const auto at = (reinterpret_cast<uintptr_t>(global.data()) + 15) / 16 * 16;
    const Args args{atoi(argv[1]), reinterpret_cast<const unsigned char*>(at)};
    return emu::launch<kernel>({1}, 128, 128 * 16, nullptr, args);
}
