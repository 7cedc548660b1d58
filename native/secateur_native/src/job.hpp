// One product: y = x W^T * scale + bias, W packed. Plain data, the same for every instruction set.
#pragma once
#include <cstdint>
#include <cstring>

enum { DENSE = 0, BITMASK = 1, SLIDE16 = 2, DELTA = 3, BLOCK = 4, SLIDE32 = 5 };
enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

struct Bf16 {
  uint16_t bits;
};

static inline float to_float(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

// To the nearest, ties to even; NaN stays NaN.
static inline Bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

struct Job {
  int format, dtype;
  int64_t rows, columns, batch, width;  // width: floats from one input to the next, a multiple of 64
  const void* const* parts;
  const float* scale;  // per row, or null
  const float* bias;   // per row, or null
  const float* x;
  void* y;
  int y_dtype;
};

using Run = void (*)(const Job&, int64_t first, int64_t last, float* scratch);

Run scalar_kernels();
#if defined(__x86_64__)
Run avx2_kernels();
Run avx512_kernels();
#endif
