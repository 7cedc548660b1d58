// The kernels, written once over a vector of sixteen floats. Every instruction set includes this file with its own
// `F16`, inside a namespace of its own and with flags of its own, so nothing here may have external linkage.
//
// A matrix lies in panels of 8 or 16 rows (see the formats of the Python package, which pack and check it). Inputs are
// floats, padded with zeros to a multiple of 64 per row; sums are floats.
#include "common.hpp"

// Panels of eight rows, 16 columns per step: the sums of all rows stay in registers.
template <class T>
static void dense_panel(const Job& job, int64_t panel, const float* x, float* y) {
  const int64_t steps = (job.columns + 15) / 16;
  const T* values = static_cast<const T*>(job.parts[0]) + panel * steps * 128;
  F16 sums[8];
  for (auto& sum : sums) sum = F16::zero();
  for (int64_t step = 0; step < steps; ++step, values += 128) {
    const F16 in = F16::load(x + 16 * step);
    ahead(values);
    for (int line = 64 / sizeof(T); line < 128; line += 64 / sizeof(T)) ahead(values + line);
#pragma GCC unroll 8
    for (int row = 0; row < 8; ++row) sums[row] = fma(F16::load(values + 16 * row), in, sums[row]);
  }
  for (int row = 0; row < 8; ++row) y[row] = total(sums[row]);
}

// Adds the steps from `step` on to the sums of a panel; numbers and masks are those of that step.
template <class T>
static void bitmask_steps(const T* values, const uint8_t* masks, const float* x, int64_t step, int64_t steps, float* y) {
  F16 sums[8];
  for (auto& sum : sums) sum = F16::zero();
  for (; step < steps; ++step, masks += 16) {
    const F16 in = F16::load(x + 16 * step);
    uint16_t bits[8];
    std::memcpy(bits, masks, 16);
    ahead(values);
    ahead(values + 64 / sizeof(T));
    if (step % 4 == 0) ahead(masks);
#pragma GCC unroll 8
    for (int row = 0; row < 8; ++row) {
      sums[row] = fma(F16::expand(bits[row], values), in, sums[row]);
      values += __builtin_popcount(bits[row]);
    }
  }
  for (int row = 0; row < 8; ++row) y[row] += total(sums[row]);
}

template <class T>
static void bitmask_panel(const Job& job, int64_t panel, const float* x, float* y) {
  const int64_t steps = (job.columns + 15) / 16;
  const T* values = static_cast<const T*>(job.parts[0]) + offset(job.parts[2], panel);
  for (int row = 0; row < 8; ++row) y[row] = 0;
  bitmask_steps(values, static_cast<const uint8_t*>(job.parts[1]) + panel * steps * 16, x, 0, steps, y);
}

#ifdef SPREADS_SMALL_NUMBERS
#include "spread.hpp"
#endif

// The rows of a panel as floats, for batches: what is unpacked once serves every input.
template <class T>
static void dense_unpack(const Job& job, int64_t panel, float* tile, int64_t width) {
  const int64_t steps = (job.columns + 15) / 16;
  const T* values = static_cast<const T*>(job.parts[0]) + panel * steps * 128;
  for (int64_t step = 0; step < steps; ++step)
    for (int row = 0; row < 8; ++row, values += 16) F16::load(values).store(tile + row * width + 16 * step);
}

template <class T>
static void bitmask_unpack(const Job& job, int64_t panel, float* tile, int64_t width) {
  const int64_t steps = (job.columns + 15) / 16;
  const T* values = static_cast<const T*>(job.parts[0]) + offset(job.parts[2], panel);
  const uint8_t* masks = static_cast<const uint8_t*>(job.parts[1]) + panel * steps * 16;
  for (int64_t step = 0; step < steps; ++step)
    for (int row = 0; row < 8; ++row, masks += 2) {
      uint16_t bits;
      std::memcpy(&bits, masks, 2);
      F16::expand(bits, values).store(tile + row * width + 16 * step);
      values += __builtin_popcount(bits);
    }
}

// Eight unpacked rows times one to three inputs.
template <int B>
static void tile_times(const float* tile, int64_t width, const float* x, float* y, int64_t y_stride) {
  for (int half = 0; half < 8; half += 4, tile += 4 * width) {
    F16 sums[4][B];
    for (auto& row : sums)
      for (auto& sum : row) sum = F16::zero();
    for (int64_t at = 0; at < width; at += 16) {
      F16 in[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) in[b] = F16::load(x + b * width + at);
#pragma GCC unroll 4
      for (int row = 0; row < 4; ++row) {
        const F16 weight = F16::load(tile + row * width + at);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) sums[row][b] = fma(weight, in[b], sums[row][b]);
      }
    }
    for (int row = 0; row < 4; ++row)
      for (int b = 0; b < B; ++b) y[b * y_stride + half + row] = total(sums[row][b]);
  }
}

// Sixteen rows are the lanes, and each takes its input from a window by its place in it. Eight steps lie together, so
// that a vector of words holds 1, 2 or 4 of them in values and 8 (half bytes) or 4 (bytes) in places.
template <class T, int B, bool WIDE>
static void slide_panel(const Job& job, int64_t panel, const float* x, int64_t width, float* y, int64_t y_stride) {
  const int64_t first = offset(job.parts[3], panel), last = offset(job.parts[3], panel + 1);
  const T* values = static_cast<const T*>(job.parts[0]) + 128 * first;
  const uint8_t* places = static_cast<const uint8_t*>(job.parts[1]) + (WIDE ? 128 : 64) * first;
  const int32_t* windows = static_cast<const int32_t*>(job.parts[2]) + 8 * first;
  constexpr int PER_WORD = 4 / sizeof(T);
  F16 sums[B][2];  // two each, so that one sum need not wait for the last
  for (auto& pair : sums) pair[0] = pair[1] = F16::zero();
  for (int64_t group = first; group < last; ++group, values += 128, places += WIDE ? 128 : 64, windows += 8) {
    I16 place = I16::load(reinterpret_cast<const int32_t*>(places));
    ahead(places);
    if (WIDE) ahead(places + 64);
    for (int line = 0; line < 128; line += 64 / sizeof(T)) ahead(values + line);
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step) {
      if (WIDE && step == 4) place = I16::load(reinterpret_cast<const int32_t*>(places + 64));
      const F16 weight = F16::part(values + 16 * PER_WORD * (step / PER_WORD), step % PER_WORD);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const float* in = x + b * width + windows[step];
        const F16 picked = WIDE ? pick32(in, place) : pick16(in, place);
        sums[b][step & 1] = fma(weight, picked, sums[b][step & 1]);
      }
      place = WIDE ? shifted<8>(place) : shifted<4>(place);
    }
  }
  for (int b = 0; b < B; ++b) (sums[b][0] + sums[b][1]).store(y + b * y_stride);
}

template <class T, int B>
static void delta_panel(const Job& job, int64_t panel, const float* x, int64_t width, float* y, int64_t y_stride) {
  const int64_t first = offset(job.parts[2], panel), last = offset(job.parts[2], panel + 1);
  const T* values = static_cast<const T*>(job.parts[0]) + 16 * first;
  const uint8_t* deltas = static_cast<const uint8_t*>(job.parts[1]) + 16 * first;
  F16 sums[B];
  for (auto& sum : sums) sum = F16::zero();
  I16 column = I16::zero();
  for (int64_t step = first; step < last; ++step, values += 16, deltas += 16) {
    column = column + I16::load(deltas);
    const F16 weight = F16::load(values);
    ahead(values);
    ahead(deltas);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sums[b] = fma(weight, gather(x + b * width, column), sums[b]);
  }
  for (int b = 0; b < B; ++b) sums[b].store(y + b * y_stride);
}

template <class T, int B>
static void block_panel(const Job& job, int64_t panel, const float* x, int64_t width, float* y, int64_t y_stride) {
  const int64_t first = offset(job.parts[2], panel), last = offset(job.parts[2], panel + 1);
  const T* values = static_cast<const T*>(job.parts[0]) + 16 * first;
  const int32_t* columns = static_cast<const int32_t*>(job.parts[1]);
  F16 sums[B][2];  // two each, so that one sum need not wait for the last
  for (auto& pair : sums) pair[0] = pair[1] = F16::zero();
  for (int64_t at = first; at < last; ++at, values += 16) {
    const F16 weight = F16::load(values);
    ahead(values);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sums[b][at & 1] = fma(weight, F16::all(x[b * width + columns[at]]), sums[b][at & 1]);
  }
  for (int b = 0; b < B; ++b) (sums[b][0] + sums[b][1]).store(y + b * y_stride);
}

// All inputs of the batch times one panel; y has a place for every row of the panel and input.
template <class T>
static void panel_rows8(const Job& job, int64_t panel, float* tile, float* y) {
  const bool masked = job.format == BITMASK;
  if (job.batch == 1) {
    if (masked) bitmask_panel<T>(job, panel, job.x, y);
    else dense_panel<T>(job, panel, job.x, y);
    return;
  }
  if (masked) bitmask_unpack<T>(job, panel, tile, job.width);
  else dense_unpack<T>(job, panel, tile, job.width);
  int64_t b = 0;
  for (; b + 3 <= job.batch; b += 3) tile_times<3>(tile, job.width, job.x + b * job.width, y + 8 * b, 8);
  for (; b < job.batch; ++b) tile_times<1>(tile, job.width, job.x + b * job.width, y + 8 * b, 8);
}

template <class T, int B>
static void panel_rows16_of(const Job& job, int64_t panel, int64_t b, float* y) {
  const float* x = job.x + b * job.width;
  if (job.format == SLIDE16) slide_panel<T, B, false>(job, panel, x, job.width, y + 16 * b, 16);
  else if (job.format == SLIDE32) slide_panel<T, B, true>(job, panel, x, job.width, y + 16 * b, 16);
  else if (job.format == DELTA) delta_panel<T, B>(job, panel, x, job.width, y + 16 * b, 16);
  else block_panel<T, B>(job, panel, x, job.width, y + 16 * b, 16);
}

template <class T>
static void panel_rows16(const Job& job, int64_t panel, float* y) {
  int64_t b = 0;
  for (; b + 4 <= job.batch; b += 4) panel_rows16_of<T, 4>(job, panel, b, y);
  for (; b < job.batch; ++b) panel_rows16_of<T, 1>(job, panel, b, y);
}

template <class T>
static void panels_of(const Job& job, int64_t first, int64_t last, float* scratch) {
  const int height = job.format <= BITMASK ? 8 : 16;
  float* tile = scratch;
  // A single input meets the weights as they are packed, so nothing is unpacked.
  float* y = job.batch > 1 ? scratch + 8 * job.width : scratch;
  // What lies behind the last column is read by the products, and unpacked only up to it.
  if (job.batch > 1 && height == 8) std::memset(tile, 0, sizeof(float) * 8 * job.width);
  for (int64_t panel = first; panel < last; ++panel) {
    if (height == 8) panel_rows8<T>(job, panel, tile, y);
    else panel_rows16<T>(job, panel, y);
    finish(job, panel * height, height, y);
  }
}

// One output over V vectors of pixels. The last vector may overlap the one before it, so that nothing behind the last
// pixel is read.
template <int V>
static void planes(const Planes& job, const float* x, float* y, int64_t output, int64_t last) {
  F16 sums[V];
  for (auto& sum : sums) sum = F16::all(job.bias ? job.bias[output] : 0.0f);
  for (int64_t i = job.starts[output]; i < job.starts[output + 1]; ++i) {
    const F16 weight = F16::all(job.values[i]);
    const float* in = x + job.table[job.columns[i]];
#pragma GCC unroll 8
    for (int v = 0; v + 1 < V; ++v) sums[v] = fma(weight, F16::load(in + 16 * v), sums[v]);
    sums[V - 1] = fma(weight, F16::load(in + last), sums[V - 1]);
  }
  if (job.relu)
    for (auto& sum : sums) sum = not_negative(sum);
  for (int v = 0; v + 1 < V; ++v) sums[v].store(y + 16 * v);
  sums[V - 1].store(y + last);
}

static void few_pixels(const Planes& job, const float* x, float* y, int64_t output) {
  for (int64_t pixel = 0; pixel < job.pixels; ++pixel) {
    float sum = job.bias ? job.bias[output] : 0.0f;
    for (int64_t i = job.starts[output]; i < job.starts[output + 1]; ++i)
      sum += job.values[i] * x[job.table[job.columns[i]] + pixel];
    y[pixel] = job.relu && sum < 0 ? 0 : sum;
  }
}

// Up to 128 pixels of one image, for the outputs from `first` to `end`: their planes stay in the caches for all outputs.
static void run_planes(const Planes& job, int64_t image, int64_t block, int64_t first, int64_t end) {
  const int64_t from = 128 * block, count = job.pixels - from < 128 ? job.pixels - from : 128;
  const int vectors = static_cast<int>((count + 15) / 16);
  // Blocks that are shorter than a vector reach back into the block before them, where there is one.
  const int64_t last = from + count >= 16 ? count - 16 : 0;
  const float* x = job.x + image * job.x_image + from;
  for (int64_t output = first; output < end; ++output) {
    float* y = job.y + image * job.y_image + output * job.y_output + from;
    if (job.pixels < 16) few_pixels(job, x, y, output);
    else if (vectors == 8) planes<8>(job, x, y, output, last);
    else if (vectors == 7) planes<7>(job, x, y, output, last);
    else if (vectors == 6) planes<6>(job, x, y, output, last);
    else if (vectors == 5) planes<5>(job, x, y, output, last);
    else if (vectors == 4) planes<4>(job, x, y, output, last);
    else if (vectors == 3) planes<3>(job, x, y, output, last);
    else if (vectors == 2) planes<2>(job, x, y, output, last);
    else planes<1>(job, x, y, output, last);
  }
}

static void run(const Job& job, int64_t first, int64_t last, float* scratch) {
  if (job.dtype == FLOAT32) panels_of<float>(job, first, last, scratch);
  else if (job.dtype == BFLOAT16) panels_of<Bf16>(job, first, last, scratch);
  else panels_of<int8_t>(job, first, last, scratch);
}
