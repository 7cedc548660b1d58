// Sixteen floats and sixteen whole numbers in AVX-512 F, BW, CD, DQ, VL: what every processor with AVX-512 has had since
// 2017. Included inside a namespace of each instruction set that builds on them.
// A vector that was loaded, and stays in a register: compilers fold a load into the instruction that spreads it, and in
// that form Zen 4 takes many times as long.
template <class V>
static inline V in_register(V loaded) {
  __asm__("" : "+v"(loaded));
  return loaded;
}

// Zeros in a register of their own, for the instructions that spread: Zen 4 lets these wait for what stood in the register
// of their result, zero-masked or not, so that one result after the other in one register costs twice the time.
static inline __m512i cleared() { return in_register(_mm512_setzero_si512()); }

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
  // A whole vector is loaded, and spread over the places of its bits.
  template <class T>
  static F16 expand(unsigned bits, const T* from) {
    const __m512 nothing = _mm512_castsi512_ps(cleared());
    return {_mm512_mask_expand_ps(nothing, static_cast<__mmask16>(bits), in_register(load(from).v))};
  }
  // One of the numbers that every word of a vector holds.
  static F16 part(const float* from, int) { return load(from); }
  static F16 part(const Bf16* from, int which) {
    const __m512i words = _mm512_loadu_si512(from);
    return {_mm512_castsi512_ps(which ? _mm512_and_si512(words, _mm512_set1_epi32(-0x10000)) : _mm512_slli_epi32(words, 16))};
  }
  static F16 part(const int8_t* from, int which) {
    const __m512i words = _mm512_loadu_si512(from);
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 24 - 8 * which), 24))};
  }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
};

static inline F16 fma(F16 a, F16 b, F16 sum) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
// Of two numbers of which one is NaN the second is taken: NaN stays NaN.
static inline F16 not_negative(F16 a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }
static inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline I16 operator+(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline float total(F16 a) { return _mm512_reduce_add_ps(a.v); }
template <int BITS>
static inline I16 shifted(I16 a) {
  return {_mm512_srli_epi32(a.v, BITS)};
}
static inline F16 gather(const float* from, I16 at) { return {_mm512_i32gather_ps(at.v, from, 4)}; }
// Permutations look at the four or five lowest bits of a place only, so what stands above need not be cleared.
static inline F16 pick16(const float* from, I16 at) { return {_mm512_permutexvar_ps(at.v, _mm512_loadu_ps(from))}; }
static inline F16 pick32(const float* from, I16 at) {
  return {_mm512_permutex2var_ps(_mm512_loadu_ps(from), at.v, _mm512_loadu_ps(from + 16))};
}
