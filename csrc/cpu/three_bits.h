// The order of the fields of a 3-bit tile. Internal linkage: included by files with different flags.
#pragma once

namespace hf_spqr {
namespace {

// Vector and shift of column pair j. Pair 15 lies in the spare bit 15 of the half-words: here, in a fourth vector that
// holds nothing else.
constexpr int kVector3[16] = {0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3};
constexpr int kShift3[16] = {0, 3, 6, 9, 0, 3, 12, 12, 6, 9, 0, 3, 6, 9, 12, 0};

}  // namespace
}  // namespace hf_spqr
