#if defined(__x86_64__)
#include <immintrin.h>

#include "job.hpp"

namespace avx512 {
#include "avx512.hpp"
#include "kernels.hpp"
}  // namespace avx512

Run avx512_kernels() { return avx512::run; }
RunPlanes avx512_planes() { return avx512::run_planes; }
#endif
