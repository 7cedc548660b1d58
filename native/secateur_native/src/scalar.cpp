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
  // One of the numbers that every word of a vector holds.
  template <class T>
  static F16 part(const T* from, int which) {
    F16 found;
    for (int i = 0; i < 16; ++i) found.v[i] = number(from[i * (4 / sizeof(T)) + which]);
    return found;
  }
  void store(float* to) const { std::memcpy(to, v, sizeof v); }
};

static inline F16 fma(const F16& a, const F16& b, F16 sum) {
  for (int i = 0; i < 16; ++i) sum.v[i] += a.v[i] * b.v[i];
  return sum;
}
// NaN stays NaN.
static inline F16 not_negative(F16 a) {
  for (auto& each : a.v) each = each < 0 ? 0 : each;
  return a;
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
template <int BITS>
static inline I16 shifted(I16 a) {
  for (auto& each : a.v) each = static_cast<int32_t>(static_cast<uint32_t>(each) >> BITS);
  return a;
}
static inline F16 gather(const float* from, const I16& at) {
  F16 found;
  for (int i = 0; i < 16; ++i) found.v[i] = from[at.v[i]];
  return found;
}
static inline F16 pick16(const float* from, I16 at) {
  for (auto& each : at.v) each &= 15;
  return gather(from, at);
}
static inline F16 pick32(const float* from, I16 at) {
  for (auto& each : at.v) each &= 31;
  return gather(from, at);
}

#include "kernels.hpp"
}  // namespace scalar

Run scalar_kernels() { return scalar::run; }
RunPlanes scalar_planes() { return scalar::run_planes; }
