#include "cpu/integer_madd.h"

namespace hf_spqr {
extern const IntegerKernels kBaseIntegers = integer_kernels_of<Pairs>();
}
