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

// A convolution as sums over shifted planes: y[image][output][pixel] = sum of values[i] x[image][table[columns[i]] + pixel].
struct Planes {
  const float* values;
  const int32_t* columns;
  const int64_t *starts, *table;
  const float* bias;  // per output, or null
  const float* x;
  float* y;
  int64_t images, x_image, outputs, y_image, y_output, pixels;
  int relu;  // whether negative sums become 0
};

using Run = void (*)(const Job&, int64_t first, int64_t last, float* scratch);

using RunPlanes = void (*)(const Planes&, int64_t image, int64_t block, int64_t first, int64_t end);

Run scalar_kernels();
RunPlanes scalar_planes();
#if defined(__x86_64__)
Run avx2_kernels();
RunPlanes avx2_planes();
Run avx512_kernels();
RunPlanes avx512_planes();
Run avx512vbmi2_kernels();
RunPlanes avx512vbmi2_planes();
#endif
