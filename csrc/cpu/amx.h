// The parts of the AMX kernels. Each lies in a file of its own.
#pragma once
#include "cpu/kernels.h"

namespace hf_spqr {

constexpr int kFewestAmx = 16;  // tokens that fill a tile

// 16 to kPromptTokens bf16 tokens. Where rounds_weights (halves.h) weights are rounded to bf16, together with their
// outliers; else scales must be for 32 columns or more, and there must be no outliers.
bool has_prompt_amx(const Matrix&, int64_t tokens);
int64_t tokens_bytes_amx(const Matrix&, int64_t tokens);
void prepare_prompt_amx(const PrepareArgs&, int64_t first, int64_t last);
void prompt_amx(const LinearArgs&, int64_t first, int64_t last);

// Many tokens of integers.
bool has_integer_amx(const Matrix&, int64_t tokens);
int64_t prepared_bytes_amx(const Matrix&, int64_t tokens);
void prepare_integer_amx(const IntegerArgs&, int64_t first, int64_t last);
void integer_linear_amx(const IntegerArgs&, int64_t first, int64_t last);

}  // namespace hf_spqr
