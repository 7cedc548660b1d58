// The C interface: what the processor can, and one product. Threads are OpenMP's, which PyTorch uses too.
#include <omp.h>

#include <cstdlib>

#include "job.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
constexpr int64_t ROOM = 64;  // floats: one cache line times four, and what a kernel may read behind the last column

enum { SCALAR = 0, AVX2 = 1, AVX512 = 2 };

Run kernels(int isa) {
#if defined(__x86_64__)
  if (isa == AVX512) return avx512_kernels();
  if (isa == AVX2) return avx2_kernels();
#endif
  return scalar_kernels();
}

float* room(int64_t floats) {
  return static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(sizeof(float) * ((floats + ROOM - 1) / ROOM) * ROOM)));
}

void widen(const void* from, int dtype, int64_t columns, int64_t width, float* to) {
  if (dtype == FLOAT32) std::memcpy(to, from, sizeof(float) * columns);
  else
    for (int64_t i = 0; i < columns; ++i) to[i] = to_float(static_cast<const Bf16*>(from)[i]);
  std::memset(to + columns, 0, sizeof(float) * (width - columns));
}

// How much work lies in front of a panel: its offset where the format has one, else its number.
int64_t work(const Job& job, int64_t panel) {
  static const int where[] = {-1, 2, 3, 2, 2, 3};
  const int part = where[job.format];
  return part < 0 ? panel : static_cast<const int64_t*>(job.parts[part])[panel] + panel;
}

// The first panel of a thread, so that all have about the same work.
int64_t border(const Job& job, int64_t panels, int thread, int threads) {
  const int64_t wanted = work(job, panels) / threads * thread;
  if (thread == threads) return panels;
  int64_t low = 0, high = panels;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (work(job, middle) < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}
}  // namespace

// Changes whenever the arguments or the layouts do.
EXPORT int secateur_version() { return 1; }

// The best instruction set that this processor and its operating system know.
EXPORT int secateur_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("popcnt"))
    return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt")) return AVX2;
#endif
  return SCALAR;
}

// y = x W^T * scale + bias. Returns 0, or 1 if there is no memory for the inputs as floats.
EXPORT int secateur_linear(int isa, int format, int dtype, const void* const* parts, int64_t rows, int64_t columns,
                           const float* scale, const float* bias, const void* x, int x_dtype, int64_t batch, void* y,
                           int threads) {
  const int height = format <= BITMASK ? 8 : 16;
  const int64_t panels = (rows + height - 1) / height;
  const int64_t width = (columns + ROOM - 1) / ROOM * ROOM;
  if (threads > panels) threads = static_cast<int>(panels);
  if (threads < 1) threads = 1;
  const int64_t own = 8 * width + 16 * batch + ROOM;
  const int64_t each = (own + ROOM - 1) / ROOM * ROOM;
  float* floats = room(batch * width + threads * each);
  if (!floats) return 1;
  const int64_t size = columns * (x_dtype == FLOAT32 ? 4 : 2);
  for (int64_t b = 0; b < batch; ++b)
    widen(static_cast<const char*>(x) + b * size, x_dtype, columns, width, floats + b * width);
  const Job job{format, dtype, rows, columns, batch, width, parts, scale, bias, floats, y, x_dtype};
  const Run run = kernels(isa);
  float* scratch = floats + batch * width;
  if (threads == 1) run(job, 0, panels, scratch);
  else {
#pragma omp parallel num_threads(threads)
    {
      // OpenMP may give fewer threads than were asked for.
      const int have = omp_get_num_threads(), me = omp_get_thread_num();
      run(job, border(job, panels, me, have), border(job, panels, me + 1, have), scratch + me * each);
    }
  }
  std::free(floats);
  return 0;
}
