// AVX2, FMA and POPCNT: x86 processors since 2013.
#if defined(__x86_64__)
#include <immintrin.h>

#include "job.hpp"

namespace avx2 {
// For every mask of eight columns: which of the loaded numbers each column takes.
struct Spread {
  alignas(32) uint8_t from[256][8];
  constexpr Spread() : from{} {
    for (int bits = 0; bits < 256; ++bits)
      for (int column = 0, next = 0; column < 8; ++column) from[bits][column] = (bits >> column) & 1 ? next++ : 0;
  }
};
// Made by the compiler: code that runs when the library is loaded must not need this instruction set.
static constexpr Spread spread;

struct I16 {
  __m256i a, b;
  static I16 zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I16 load(const int32_t* from) {
    const __m256i* at = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
  }
  static I16 load(const uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  }
};

static inline __m256 eight(const float* from) { return _mm256_loadu_ps(from); }
static inline __m256 eight(const Bf16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline __m256 eight(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
template <class T>
static inline __m256 eight_spread(unsigned bits, const T* from) {
  const __m128i which = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(spread.from[bits]));
  const __m256 values = _mm256_permutevar8x32_ps(eight(from), _mm256_cvtepu8_epi32(which));
  // Bit i of the mask becomes the sign of lane i, and the sign keeps the lane or clears it.
  const __m256i shift = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  const __m256i sign = _mm256_srai_epi32(_mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int>(bits)), shift), 31);
  return _mm256_and_ps(values, _mm256_castsi256_ps(sign));
}

struct F16 {
  __m256 a, b;
  static F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F16 all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  template <class T>
  static F16 load(const T* from) {
    return {eight(from), eight(from + 8)};
  }
  template <class T>
  static F16 expand(unsigned bits, const T* from) {
    const unsigned low = bits & 255;
    return {eight_spread(low, from), eight_spread(bits >> 8, from + __builtin_popcount(low))};
  }
  // One of the numbers that every word of a vector holds.
  static F16 part(const float* from, int) { return load(from); }
  static F16 part(const Bf16* from, int which) {
    const I16 words = I16::load(reinterpret_cast<const int32_t*>(from));
    return {half(words.a, which), half(words.b, which)};
  }
  static F16 part(const int8_t* from, int which) {
    const I16 words = I16::load(reinterpret_cast<const int32_t*>(from));
    return {quarter(words.a, which), quarter(words.b, which)};
  }
  static __m256 half(__m256i words, int which) {
    return _mm256_castsi256_ps(which ? _mm256_and_si256(words, _mm256_set1_epi32(-0x10000)) : _mm256_slli_epi32(words, 16));
  }
  static __m256 quarter(__m256i words, int which) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 24 - 8 * which), 24));
  }
  void store(float* to) const {
    _mm256_storeu_ps(to, a);
    _mm256_storeu_ps(to + 8, b);
  }
};

static inline F16 fma(F16 x, F16 y, F16 sum) { return {_mm256_fmadd_ps(x.a, y.a, sum.a), _mm256_fmadd_ps(x.b, y.b, sum.b)}; }
// Of two numbers of which one is NaN the second is taken: NaN stays NaN.
static inline F16 not_negative(F16 x) {
  return {_mm256_max_ps(_mm256_setzero_ps(), x.a), _mm256_max_ps(_mm256_setzero_ps(), x.b)};
}
static inline F16 operator+(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline I16 operator+(I16 x, I16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline float total(F16 x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
template <int BITS>
static inline I16 shifted(I16 x) {
  return {_mm256_srli_epi32(x.a, BITS), _mm256_srli_epi32(x.b, BITS)};
}
static inline F16 gather(const float* from, I16 at) {
  return {_mm256_i32gather_ps(from, at.a, 4), _mm256_i32gather_ps(from, at.b, 4)};
}
// A permutation looks at the three lowest bits; the fourth, made the sign, chooses between the halves of the window.
static inline __m256 pick16(__m256 low, __m256 high, __m256i at) {
  const __m256 which = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at), which);
}
static inline F16 pick16(const float* from, I16 at) {
  const __m256 low = _mm256_loadu_ps(from), high = _mm256_loadu_ps(from + 8);
  return {pick16(low, high, at.a), pick16(low, high, at.b)};
}
static inline F16 pick32(const float* from, I16 at) {
  const __m256i five = _mm256_set1_epi32(31);
  return gather(from, {_mm256_and_si256(at.a, five), _mm256_and_si256(at.b, five)});
}

#include "kernels.hpp"
}  // namespace avx2

Run avx2_kernels() { return avx2::run; }
RunPlanes avx2_planes() { return avx2::run_planes; }
#endif
