// AVX-512 F, BW, CD, DQ, VL: what every processor with AVX-512 has had since 2017.
#if defined(__x86_64__)
#include <immintrin.h>

#include "job.hpp"

namespace avx512 {
struct I16 {
  __m512i v;
  static I16 zero() { return {_mm512_setzero_si512()}; }
  static I16 load(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
  static I16 load(const uint8_t* from) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
};

struct F16 {
  __m512 v;
  struct Window {
    __m512 low, high;
  };
  static F16 zero() { return {_mm512_setzero_ps()}; }
  static F16 all(float value) { return {_mm512_set1_ps(value)}; }
  static F16 load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static F16 load(const Bf16* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static F16 load(const int8_t* from) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
  }
  // A whole vector is loaded and spread in registers: loads that expand are far slower on some processors.
  template <class T>
  static F16 expand(unsigned bits, const T* from) {
    return {_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), load(from).v)};
  }
  static Window window(const float* from) { return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}; }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
};

static inline F16 fma(F16 a, F16 b, F16 sum) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
static inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline I16 operator+(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline float total(F16 a) { return _mm512_reduce_add_ps(a.v); }
static inline I16 leading_zeros(I16 a) { return {_mm512_lzcnt_epi32(a.v)}; }
static inline I16 without_first(I16 a, I16 first) {
  return {_mm512_and_si512(a.v, _mm512_srlv_epi32(_mm512_set1_epi32(0x7fffffff), first.v))};
}
static inline F16 gather(const float* from, I16 at) { return {_mm512_i32gather_ps(at.v, from, 4)}; }
// Only the five lowest bits count: 32, "nothing left", reads column 0 for a weight that is 0.
static inline F16 pick(F16::Window from, I16 at) { return {_mm512_permutex2var_ps(from.low, at.v, from.high)}; }

#include "kernels.hpp"
}  // namespace avx512

Run avx512_kernels() { return avx512::run; }
#endif
