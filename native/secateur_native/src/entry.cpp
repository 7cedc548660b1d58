// The C interface: what the processor can, and one product. Threads are OpenMP's, which PyTorch uses too.
#include <omp.h>

#include <cstdlib>

#include "job.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
constexpr int64_t ROOM = 64;  // floats: one cache line times four, and what a kernel may read behind the last column

enum { SCALAR = 0, AVX2 = 1, AVX512 = 2, AVX512VBMI2 = 3 };

Run kernels(int isa) {
#if defined(__x86_64__)
  if (isa == AVX512VBMI2) return avx512vbmi2_kernels();
  if (isa == AVX512) return avx512_kernels();
  if (isa == AVX2) return avx2_kernels();
#endif
  return scalar_kernels();
}

RunPlanes planes_of(int isa) {
#if defined(__x86_64__)
  if (isa == AVX512VBMI2) return avx512vbmi2_planes();
  if (isa == AVX512) return avx512_planes();
  if (isa == AVX2) return avx2_planes();
#endif
  return scalar_planes();
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

float plain(float value) { return value; }
float plain(Bf16 value) { return to_float(value); }
float plain(int8_t value) { return value; }

int64_t start(const Job& job, int part, int64_t panel) { return static_cast<const int64_t*>(job.parts[part])[panel]; }

template <class T>
void unpack_dense(const Job& job, int64_t panel, int64_t rows, float* to) {
  const int64_t columns = job.columns, steps = (columns + 15) / 16;
  const T* values = static_cast<const T*>(job.parts[0]) + panel * steps * 128;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t i = 0; i < 16 && 16 * step + i < columns; ++i)
        to[row * columns + 16 * step + i] = plain(values[128 * step + 16 * row + i]);
}

template <class T>
void unpack_bitmask(const Job& job, int64_t panel, int64_t rows, float* to) {
  const int64_t columns = job.columns, steps = (columns + 15) / 16;
  const T* values = static_cast<const T*>(job.parts[0]) + start(job, 2, panel);
  const uint8_t* masks = static_cast<const uint8_t*>(job.parts[1]) + panel * steps * 16;
  for (int64_t i = 0; i < 8 * steps; ++i) {
    float* mine = to + (i % 8) * columns + 16 * (i / 8);
    // Rows and columns of padding have no bits, so nothing is written there.
    for (unsigned bits = masks[2 * i] | masks[2 * i + 1] << 8; bits; bits &= bits - 1)
      mine[__builtin_ctz(bits)] = plain(*values++);
  }
  (void)rows;
}

template <class T>
void unpack_block(const Job& job, int64_t panel, int64_t rows, float* to) {
  const T* values = static_cast<const T*>(job.parts[0]);
  const int32_t* at = static_cast<const int32_t*>(job.parts[1]);
  for (int64_t i = start(job, 2, panel); i < start(job, 2, panel + 1); ++i)
    for (int64_t row = 0; row < rows; ++row) to[row * job.columns + at[i]] = plain(values[16 * i + row]);
}

// What only fills is zero, and its column may be another number's: it is never written.
template <class T>
void unpack_delta(const Job& job, int64_t panel, int64_t, float* to) {
  const T* values = static_cast<const T*>(job.parts[0]);
  const uint8_t* deltas = static_cast<const uint8_t*>(job.parts[1]);
  int64_t column[16] = {};
  for (int64_t i = 16 * start(job, 2, panel); i < 16 * start(job, 2, panel + 1); ++i) {
    const int row = i % 16;
    column[row] += deltas[i];
    if (const float found = plain(values[i]); found != 0) to[row * job.columns + column[row]] = found;
  }
}

// A word of four bytes per lane holds 1, 2 or 4 values, and another 8 places of four bits or 4 of eight.
template <class T, int BITS>
void unpack_slide(const Job& job, int64_t panel, int64_t, float* to) {
  constexpr int HELD = 4 / sizeof(T), SEVERAL = 32 / BITS;
  const T* values = static_cast<const T*>(job.parts[0]);
  const uint32_t* places = static_cast<const uint32_t*>(job.parts[1]);
  const int32_t* windows = static_cast<const int32_t*>(job.parts[2]);
  for (int64_t i = 8 * start(job, 3, panel); i < 8 * start(job, 3, panel + 1); ++i)
    for (int row = 0; row < 16; ++row) {
      const float found = plain(values[HELD * (16 * (i / HELD) + row) + i % HELD]);
      const int place = places[16 * (i / SEVERAL) + row] >> BITS * (i % SEVERAL) & ((1 << BITS) - 1);
      if (found != 0) to[row * job.columns + windows[i] + place] = found;
    }
}

// One panel as floats, row after row.
template <class T>
void unpack_panel(const Job& job, int64_t panel, float* to) {
  const int64_t height = job.format <= BITMASK ? 8 : 16;
  const int64_t rows = job.rows - panel * height < height ? job.rows - panel * height : height;
  std::memset(to, 0, sizeof(float) * rows * job.columns);
  if (job.format == DENSE) unpack_dense<T>(job, panel, rows, to);
  else if (job.format == BITMASK) unpack_bitmask<T>(job, panel, rows, to);
  else if (job.format == BLOCK) unpack_block<T>(job, panel, rows, to);
  else if (job.format == DELTA) unpack_delta<T>(job, panel, rows, to);
  else if (job.format == SLIDE16) unpack_slide<T, 4>(job, panel, rows, to);
  else unpack_slide<T, 8>(job, panel, rows, to);
  if (job.scale)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < job.columns; ++i) to[row * job.columns + i] *= job.scale[panel * height + row];
}
}  // namespace

// Changes whenever the arguments or the layouts do.
EXPORT int secateur_version() { return 3; }

// The best instruction set that this processor and its operating system know.
EXPORT int secateur_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("popcnt"))
    return __builtin_cpu_supports("avx512vbmi2") ? AVX512VBMI2 : AVX512;
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
  const int64_t own = (batch > 1 ? 8 * width : 0) + 16 * batch + ROOM;
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

// The whole matrix as floats, for products with so many inputs that unpacking it once costs less.
EXPORT void secateur_unpack(int format, int dtype, const void* const* parts, int64_t rows, int64_t columns,
                            const float* scale, float* to, int threads) {
  const int64_t height = format <= BITMASK ? 8 : 16, panels = (rows + height - 1) / height;
  const Job job{format, dtype, rows, columns, 0, 0, parts, scale, nullptr, nullptr, nullptr, FLOAT32};
#pragma omp parallel for num_threads(threads < 1 ? 1 : threads) if (threads > 1)
  for (int64_t panel = 0; panel < panels; ++panel) {
    float* mine = to + panel * height * columns;
    if (dtype == FLOAT32) unpack_panel<float>(job, panel, mine);
    else if (dtype == BFLOAT16) unpack_panel<Bf16>(job, panel, mine);
    else unpack_panel<int8_t>(job, panel, mine);
  }
}

// A convolution whose inputs lie in planes (see Planes); every part of the work writes numbers of its own.
EXPORT void secateur_convolution(int isa, const float* values, const int32_t* columns, const int64_t* starts,
                                 const int64_t* table, const float* bias, const float* x, float* y, int64_t images,
                                 int64_t x_image, int64_t outputs, int64_t y_image, int64_t y_output, int64_t pixels,
                                 int relu, int threads) {
  const Planes job{values, columns, starts, table, bias, x, y, images, x_image, outputs, y_image, y_output, pixels, relu};
  const RunPlanes run = planes_of(isa);
  // Overlapping vectors belong to one block only if no other thread has it: a last block of a few pixels joins the one
  // before it through the same outputs, which one thread works off.
  const int64_t blocks = (pixels + 127) / 128, shares = (outputs + 31) / 32;
#pragma omp parallel for num_threads(threads < 1 ? 1 : threads) if (threads > 1)
  for (int64_t part = 0; part < images * shares; ++part) {
    const int64_t image = part / shares, first = part % shares * 32, end = first + 32 < outputs ? first + 32 : outputs;
    for (int64_t block = 0; block < blocks; ++block) run(job, image, block, first, end);
  }
}
