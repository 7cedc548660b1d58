// Sixteen floats without any instruction set: every machine, and the reference of the others.
#include "job.hpp"

namespace scalar {
struct I16 {
  int32_t v[16];
  static I16 zero() { return I16{}; }
  static I16 load(const int32_t* from) {
    I16 found;
    std::memcpy(found.v, from, sizeof found.v);
    return found;
  }
  static I16 load(const uint8_t* from) {
    I16 found;
    for (int i = 0; i < 16; ++i) found.v[i] = from[i];
    return found;
  }
};

static inline float number(float value) { return value; }
static inline float number(Bf16 value) { return to_float(value); }
static inline float number(int8_t value) { return value; }

struct F16 {
  float v[16];
  using Window = const float*;
  static F16 zero() { return F16{}; }
  static F16 all(float value) {
    F16 found;
    for (auto& each : found.v) each = value;
    return found;
  }
  template <class T>
  static F16 load(const T* from) {
    F16 found;
    for (int i = 0; i < 16; ++i) found.v[i] = number(from[i]);
    return found;
  }
  template <class T>
  static F16 expand(unsigned bits, const T* from) {
    F16 found;
    for (int i = 0; i < 16; ++i) found.v[i] = (bits >> i) & 1 ? number(*from++) : 0.0f;
    return found;
  }
  static Window window(const float* from) { return from; }
  void store(float* to) const { std::memcpy(to, v, sizeof v); }
};

static inline F16 fma(const F16& a, const F16& b, F16 sum) {
  for (int i = 0; i < 16; ++i) sum.v[i] += a.v[i] * b.v[i];
  return sum;
}
static inline F16 operator+(F16 a, const F16& b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
static inline I16 operator+(I16 a, const I16& b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
static inline float total(const F16& a) {
  float sum = 0;
  for (float each : a.v) sum += each;
  return sum;
}
static inline I16 leading_zeros(const I16& a) {
  I16 found;
  for (int i = 0; i < 16; ++i) found.v[i] = a.v[i] ? __builtin_clz(static_cast<uint32_t>(a.v[i])) : 0;
  return found;
}
static inline I16 without_first(I16 a, const I16& first) {
  for (int i = 0; i < 16; ++i) a.v[i] &= static_cast<int32_t>(0x7fffffffu >> first.v[i]);
  return a;
}
static inline F16 gather(const float* from, const I16& at) {
  F16 found;
  for (int i = 0; i < 16; ++i) found.v[i] = from[at.v[i]];
  return found;
}
static inline F16 pick(F16::Window from, const I16& at) { return gather(from, at); }

#include "kernels.hpp"
}  // namespace scalar

Run scalar_kernels() { return scalar::run; }
