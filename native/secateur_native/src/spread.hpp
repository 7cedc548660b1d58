// A bitmask panel whose rows are spread several at a time: two of bfloat16, four of int8. Their masks and their numbers
// follow each other in memory, so that one load and one instruction bring them to their places.
//
// A lane of 32 bits then holds two or four neighbours of one row. They become floats by a shift (bfloat16) or a shift and
// a conversion (int8), one neighbour of every lane at a time, and meet the inputs in that order.

// For each lane the input of its `which`-th number, where a row takes 16 / held lanes.
static inline __m512 in_lanes(__m512 in, int held, int which) {
  int at[16];
  for (int lane = 0; lane < 16; ++lane) at[lane] = held * (lane % (16 / held)) + which;
  return _mm512_permutexvar_ps(_mm512_loadu_si512(at), in);
}

// How many steps can be spread: all whose widest load stays within the numbers and the slack of 16 behind the last one.
static inline bool room_for_a_step(const Job& job, const void* values, int64_t size) {
  const char* first = static_cast<const char*>(job.parts[0]);
  return static_cast<const char*>(values) + 128 * size <= first + offset(job.parts[2], (job.rows + 7) / 8) * size;
}

template <>
void bitmask_panel<Bf16>(const Job& job, int64_t panel, const float* x, float* y) {
  const int64_t steps = (job.columns + 15) / 16;
  const Bf16* values = static_cast<const Bf16*>(job.parts[0]) + offset(job.parts[2], panel);
  const uint8_t* masks = static_cast<const uint8_t*>(job.parts[1]) + panel * steps * 16;
  __m512 low[4], high[4];
  for (int pair = 0; pair < 4; ++pair) low[pair] = high[pair] = _mm512_setzero_ps();
  int64_t step = 0;
  for (; step < steps && room_for_a_step(job, values, sizeof(Bf16)); ++step, masks += 16) {
    const __m512 in = _mm512_loadu_ps(x + 16 * step);
    const __m512 even = in_lanes(in, 2, 0), odd = in_lanes(in, 2, 1);
    uint32_t bits[4];
    std::memcpy(bits, masks, 16);
    ahead(values);
    ahead(values + 32);
    ahead(values + 64);
    if (step % 4 == 0) ahead(masks);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      const __m512i words = _mm512_mask_expand_epi16(cleared(), bits[pair], in_register(_mm512_loadu_si512(values)));
      values += __builtin_popcount(bits[pair]);
      low[pair] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), even, low[pair]);
      const __m512i upper = _mm512_and_si512(words, _mm512_set1_epi32(-0x10000));
      high[pair] = _mm512_fmadd_ps(_mm512_castsi512_ps(upper), odd, high[pair]);
    }
  }
  for (int pair = 0; pair < 4; ++pair) {
    const __m512 sum = _mm512_add_ps(low[pair], high[pair]);
    y[2 * pair] = _mm512_mask_reduce_add_ps(0x00ff, sum);
    y[2 * pair + 1] = _mm512_mask_reduce_add_ps(0xff00, sum);
  }
  bitmask_steps(values, masks, x, step, steps, y);
}

template <>
void bitmask_panel<int8_t>(const Job& job, int64_t panel, const float* x, float* y) {
  const int64_t steps = (job.columns + 15) / 16;
  const int8_t* values = static_cast<const int8_t*>(job.parts[0]) + offset(job.parts[2], panel);
  const uint8_t* masks = static_cast<const uint8_t*>(job.parts[1]) + panel * steps * 16;
  __m512 sums[2][4];
  for (auto& four : sums)
    for (auto& sum : four) sum = _mm512_setzero_ps();
  int64_t step = 0;
  for (; step < steps && room_for_a_step(job, values, sizeof(int8_t)); ++step, masks += 16) {
    const __m512 in = _mm512_loadu_ps(x + 16 * step);
    const __m512 lanes[4] = {in_lanes(in, 4, 0), in_lanes(in, 4, 1), in_lanes(in, 4, 2), in_lanes(in, 4, 3)};
    uint64_t bits[2];
    std::memcpy(bits, masks, 16);
    ahead(values);
    ahead(values + 64);
    if (step % 4 == 0) ahead(masks);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i words = _mm512_mask_expand_epi8(cleared(), bits[half], in_register(_mm512_loadu_si512(values)));
      values += __builtin_popcountll(bits[half]);
#pragma GCC unroll 4
      for (int which = 0; which < 4; ++which) {
        const __m512i wide = _mm512_srai_epi32(_mm512_slli_epi32(words, 24 - 8 * which), 24);
        sums[half][which] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(wide), lanes[which], sums[half][which]);
      }
    }
  }
  for (int half = 0; half < 2; ++half) {
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[half][0], sums[half][1]), _mm512_add_ps(sums[half][2], sums[half][3]));
    for (int row = 0; row < 4; ++row) y[4 * half + row] = _mm512_mask_reduce_add_ps(0xf << 4 * row, sum);
  }
  bitmask_steps(values, masks, x, step, steps, y);
}
