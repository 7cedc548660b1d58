// What all instruction sets share. Included inside a namespace of each: everything is static or a template.

// Two kilobytes ahead: a processor's own prefetching stops at every page.
static inline void ahead(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + 2048); }

static inline int64_t offset(const void* offsets, int64_t panel) { return static_cast<const int64_t*>(offsets)[panel]; }

// Scale, bias and the dtype of the output; rows behind the last one are padding.
static void finish(const Job& job, int64_t first, int height, const float* y) {
  for (int64_t b = 0; b < job.batch; ++b)
    for (int row = 0; row < height && first + row < job.rows; ++row) {
      const int64_t r = first + row;
      float sum = y[b * height + row];
      if (job.scale) sum *= job.scale[r];
      if (job.bias) sum += job.bias[r];
      const int64_t at = b * job.rows + r;
      if (job.y_dtype == FLOAT32) static_cast<float*>(job.y)[at] = sum;
      else static_cast<Bf16*>(job.y)[at] = to_bf16(sum);
    }
}
