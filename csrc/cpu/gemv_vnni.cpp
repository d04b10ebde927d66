// A few tokens, any format: codes go from the stream through registers, statistics through a small buffer per panel.
#include "cpu/few_tokens.h"
#include "cpu/statistics_avx512.h"
#include "cpu/vnni.h"

namespace hf_spqr {
namespace {

struct StoredStatistics : PanelScales {
    void load(const Matrix& m, const uint32_t* p, int groups, const float*) { PanelScales::load(m, p, groups); }

    __attribute__((always_inline)) void get(int g, const float* numbers, __m512& s, __m512& shift) const {
        s = _mm512_mul_ps(_mm512_load_ps(scale + g * kRows), _mm512_set1_ps(numbers[0]));
        shift = _mm512_mul_ps(_mm512_load_ps(zero + g * kRows), _mm512_set1_ps(-numbers[2]));
    }
};

}  // namespace

bool has_gemv_vnni(const Matrix& m) {
    return has_half_order(m);
}

void gemv_vnni(const LinearArgs& a, int64_t first, int64_t last) {
    switch (a.weight.bits) {
        case 2:
            return few_tokens<StoredStatistics, 2>(a, first, last);
        case 3:
            return few_tokens<StoredStatistics, 3>(a, first, last);
        case 4:
            return few_tokens<StoredStatistics, 4>(a, first, last);
        default:
            return few_tokens<StoredStatistics, 8>(a, first, last);
    }
}

}  // namespace hf_spqr
