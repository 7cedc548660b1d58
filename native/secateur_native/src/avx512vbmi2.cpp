// AVX-512 with VBMI2, as from Ice Lake and Zen 4 on: one instruction spreads 32 words or 64 bytes over their places.
#if defined(__x86_64__)
#include <immintrin.h>

#include "job.hpp"

#define SPREADS_SMALL_NUMBERS
namespace avx512vbmi2 {
#include "avx512.hpp"
#include "kernels.hpp"
}  // namespace avx512vbmi2

Run avx512vbmi2_kernels() { return avx512vbmi2::run; }
RunPlanes avx512vbmi2_planes() { return avx512vbmi2::run_planes; }
#endif
