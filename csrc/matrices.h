// Matrices of fp32 or bf16 values that are computed with in fp32.
#pragma once

#include <stdexcept>

#include "common.h"

inline Lanes load_wide(const float* from) { return load<Lanes>(from); }

inline Lanes load_wide(const bf16* from) {
  return bits_as<Lanes>(__builtin_convertvector(load<ShortLanes>(from), BitLanes) << 16);
}

inline void store_narrow(float* to, Lanes x) { store(to, x); }

inline void store_narrow(bf16* to, Lanes x) {
  store(to, __builtin_convertvector(rounded_to_bf16(x) >> 16, ShortLanes));
}

// Calls f with a value of the type of the matrices, which is fp32 or bf16.
template <class F>
void with_matrix_type(int32_t dtype, F f) {
  if (dtype == kFloat32) f(float{});
  if (dtype == kBFloat16) f(bf16{});
  if (dtype != kFloat32 && dtype != kBFloat16)
    throw std::invalid_argument("matrices must be fp32 or bf16");
}
