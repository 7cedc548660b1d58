// The product as an operator of PyTorch without Python in between: a call from Python costs as much as a small layer.
// PyTorch's stable interface alone is used, so one build serves PyTorch 2.10 and later. What is unusual goes to the
// operator `packed_linear`, which Python has registered and which takes everything.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {
using Linear = int (*)(int isa, int format, int dtype, const void* const* parts, int64_t rows, int64_t columns,
                       const float* scale, const float* bias, const void* x, int x_dtype, int64_t batch, void* y,
                       int threads);
struct Known {
  std::string name;
  int kernel;
};

// Written once by `secateur_connect`, before the first call.
Linear kernels = nullptr;
int best = 0;
int64_t many = 0;  // inputs at once from which a dense product is the better way
std::vector<Known> formats;

// The instruction set that the environment asks for, as far as this processor has it; -1 = no compiled code.
int level() {
  const char* asked = std::getenv("SECATEUR_ISA");
  if (!asked || !*asked) return best;
  static const char* const names[] = {"scalar", "avx2", "avx512", "avx512vbmi2"};
  for (int at = 0; at < 4; ++at)
    if (!std::strcmp(asked, names[at])) return at < best ? at : best;
  return -1;
}

int kernel_of(const std::string& format) {
  for (const Known& each : formats)
    if (each.name == format) return each.kernel;
  return -1;
}

// As the kernels number dtypes; -1 where they take none.
int number_of(ScalarType dtype) {
  if (dtype == ScalarType::Float) return 0;
  if (dtype == ScalarType::BFloat16) return 1;
  return dtype == ScalarType::Char ? 2 : -1;
}

bool plain(const std::optional<Tensor>& floats) {
  return !floats || (floats->scalar_type() == ScalarType::Float && floats->is_contiguous());
}

const float* data_of(const std::optional<Tensor>& floats) {
  return floats ? static_cast<const float*>(floats->data_ptr()) : nullptr;
}

Tensor anything(const Tensor& x, const std::vector<Tensor>& parts, const std::optional<Tensor>& scale,
                const std::optional<Tensor>& bias, const std::string& format, int64_t rows, int64_t columns) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(x), from(parts), from(scale), from(bias), from(format), from(rows), from(columns)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("secateur::packed_linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor packed_product(const Tensor x, const std::vector<Tensor> parts, const std::optional<Tensor> scale,
                      const std::optional<Tensor> bias, const std::string format, int64_t rows, int64_t columns) {
  const int isa = level(), kernel = kernel_of(format);
  const int weights = parts.empty() ? -1 : number_of(parts[0].scalar_type()), inputs = number_of(x.scalar_type());
  const int64_t dims = x.dim();
  bool usual = isa >= 0 && kernel >= 0 && weights >= 0 && (inputs == 0 || inputs == 1) && plain(scale) && plain(bias) &&
               dims > 0 && x.size(dims - 1) == columns && x.numel() > 0 && x.numel() < many * columns && x.is_contiguous() && parts.size() <= 8;
  const void* pointers[8] = {};
  for (size_t at = 0; usual && at < parts.size(); ++at) {
    usual = parts[at].is_contiguous();
    pointers[at] = parts[at].data_ptr();
  }
  if (!usual) return anything(x, parts, scale, bias, format, rows, columns);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = rows;
  Tensor y = torch::stable::new_empty(x, shape);
  const int failed = kernels(isa, kernel, weights, pointers, rows, columns, data_of(scale), data_of(bias), x.data_ptr(),
                             inputs, x.numel() / columns, y.data_ptr(), static_cast<int>(torch::stable::get_num_threads()));
  if (failed) return anything(x, parts, scale, bias, format, rows, columns);
  return y;
}
}  // namespace

// Where the kernels are, and the formats that they know: words separated by blanks, and their numbers.
extern "C" __attribute__((visibility("default"))) void secateur_connect(void* linear, int isa, int64_t most,
                                                                        const char* words, const int* numbers) {
  kernels = reinterpret_cast<Linear>(linear);
  best = isa;
  many = most;
  formats.clear();
  for (std::string all(words); !all.empty(); ++numbers) {
    const size_t end = std::min(all.find(' '), all.size());
    formats.push_back({all.substr(0, end), *numbers});
    all.erase(0, end + 1);
  }
}

STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, library) { library.impl("packed_product", TORCH_BOX(&packed_product)); }
