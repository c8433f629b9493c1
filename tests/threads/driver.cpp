// fastgpt_cpu_driver [part of a case's name]: runs the cases, at the level of FASTGPT_CPU_ISA.
// fastgpt_cpu_driver --level: the level that it would use.
#include "tests/threads/driver.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>

#include "csrc/cpu/isa_level.h"

namespace fastgpt::driver {
namespace {

constexpr int kThreads = 4;

int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::u8:
      return 1;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::f32:
    case DType::i32:
      return 4;
    default:
      return 8;
  }
}

const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::bf16 ? "bf16" : "f16";
}

int64_t elements_of(const Shape& shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

// The first of n elements that differs or is NaN, n if none is; with what it holds.
template <typename Bits>
int64_t first_wrong(const unsigned char* a, const unsigned char* b, int64_t n, Bits infinity,
                    uint64_t (&holds)[2]) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  for (int64_t i = 0; i < n; ++i) {
    Bits x, y;
    std::memcpy(&x, a + i * sizeof x, sizeof x);
    std::memcpy(&y, b + i * sizeof y, sizeof y);
    if (x == y && (x & kMagnitude) <= infinity) continue;
    holds[0] = x;
    holds[1] = y;
    return i;
  }
  return n;
}

int64_t first_wrong(const Result& a, const Result& b, uint64_t (&holds)[2]) {
  const int64_t n = elements_of(a.shape);
  switch (a.dtype) {
    case DType::bf16:
      return first_wrong<uint16_t>(a.data, b.data, n, 0x7f80, holds);
    case DType::f16:
      return first_wrong<uint16_t>(a.data, b.data, n, 0x7c00, holds);
    case DType::f64:
      return first_wrong<uint64_t>(a.data, b.data, n, 0x7ff0000000000000, holds);
    default:
      return first_wrong<uint32_t>(a.data, b.data, n, 0x7f800000, holds);
  }
}

// "name[i, j]" of an element.
std::string element_name(const Result& r, int64_t i) {
  std::string index;
  for (size_t axis = r.shape.size(); axis-- > 0;) {
    index = std::to_string(i % r.shape[axis]) + (index.empty() ? "" : ", ") + index;
    i /= r.shape[axis];
  }
  return r.name + "[" + index + "]";
}

// What is wrong with the results of a case; empty if nothing is.
std::string difference(const std::vector<Result>& alone, const std::vector<Result>& together) {
  for (size_t n = 0; n < alone.size(); ++n) {
    uint64_t holds[2] = {};
    const int64_t i = first_wrong(alone[n], together[n], holds);
    if (i == elements_of(alone[n].shape)) continue;
    char text[80] = " is NaN";
    if (holds[0] != holds[1]) {
      std::snprintf(text, sizeof text, " has bits 0x%llx on 1 thread, 0x%llx on %d",
                    static_cast<unsigned long long>(holds[0]),
                    static_cast<unsigned long long>(holds[1]), kThreads);
    }
    return element_name(alone[n], i) + text;
  }
  return "";
}

std::string failure(const Case& c, DType dtype) {
  try {
    Run alone(dtype, 1), together(dtype, kThreads);
    set_threads(1);
    c.run(alone);
    set_threads(kThreads);
    c.run(together);
    if (threads_used() < kThreads) {
      return "no work for more than " + std::to_string(threads_used()) + " threads";
    }
    return difference(alone.results(), together.results());
  } catch (const std::exception& error) {
    return error.what();
  }
}

int run_all(const char* part) {
  int passed = 0, failed = 0;
  std::vector<Case> cases = attention_cases();
  for (Case& c : row_cases()) cases.push_back(std::move(c));
  for (Case& c : memory_cases()) cases.push_back(std::move(c));
  for (const Case& c : cases) {
    if (c.name.find(part) == std::string::npos) continue;
    std::string failures;
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      const std::string reason = failure(c, dtype);
      (reason.empty() ? passed : failed) += 1;
      if (!reason.empty()) failures += std::string("\n  ") + name_of(dtype) + ": " + reason;
    }
    std::printf("%s %s%s\n", failures.empty() ? "ok  " : "FAIL", c.name.c_str(), failures.c_str());
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace

uint64_t Run::random() {  // splitmix64
  uint64_t x = state_ += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

TensorRef Run::allocate(DType dtype, const Shape& shape) {
  TensorRef t;
  t.dtype = dtype;
  t.ndim = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int axis = t.ndim - 1; axis >= 0; --axis) {
    t.size[axis] = shape[axis];
    t.stride[axis] = stride;
    stride *= shape[axis];
  }
  memory_.emplace_back(new unsigned char[stride * bytes_of(dtype)]);
  t.data = memory_.back().get();
  return t;
}

TensorRef Run::input(const Shape& shape, DType dtype) {
  const TensorRef t = allocate(dtype, shape);
  unsigned char* to = static_cast<unsigned char*>(t.data);
  for (int64_t i = 0; i < elements_of(shape); ++i, to += bytes_of(dtype)) {
    const uint64_t r = random();
    const float magnitude = static_cast<float>((r >> 40) + 1) * 0x1p-23f;
    uint32_t wide;
    std::memcpy(&wide, &magnitude, 4);
    const uint32_t sign = r & 1;
    // Narrow values are cut off: any will do. Those below the normal range of float16 become 0.
    const uint32_t half = wide < (113u << 23) ? 0 : (wide >> 13) - (112u << 10);
    const uint32_t bits = dtype == DType::f32    ? wide | sign << 31
                          : dtype == DType::bf16 ? wide >> 16 | sign << 15
                                                 : half | sign << 15;
    // Copies of a size known to the compiler: each call of memcpy costs a sanitizer dearly.
    dtype == DType::f32 ? std::memcpy(to, &bits, 4) : std::memcpy(to, &bits, 2);
  }
  return t;
}

TensorRef Run::mask(const Shape& shape) {
  const TensorRef t = allocate(DType::u8, shape);
  unsigned char* to = static_cast<unsigned char*>(t.data);
  for (int64_t i = 0; i < elements_of(shape); ++i) to[i] = random() % 5 != 0;
  return t;
}

TensorRef Run::integers(DType dtype, const Shape& values) {
  const TensorRef t = allocate(dtype, {static_cast<int64_t>(values.size())});
  unsigned char* to = static_cast<unsigned char*>(t.data);
  for (size_t i = 0; i < values.size(); ++i) {
    std::memcpy(to + i * bytes_of(dtype), &values[i], bytes_of(dtype));
  }
  return t;
}

TensorRef Run::result(const char* name, const Shape& shape, DType dtype) {
  const TensorRef t = allocate(dtype, shape);
  std::memset(t.data, unwritten_, elements_of(shape) * bytes_of(dtype));
  results_.push_back({name, dtype, shape, static_cast<unsigned char*>(t.data)});
  return t;
}

TensorRef Run::updated(const char* name, const Shape& shape, DType dtype) {
  const TensorRef t = input(shape, dtype);
  results_.push_back({name, dtype, shape, static_cast<unsigned char*>(t.data)});
  return t;
}

void Run::accept(const ContentError& error) const {
  if (error.argument == nullptr) return;
  throw std::runtime_error(std::string(error.argument) + ": expected " + error.expected);
}

}  // namespace fastgpt::driver

int main(int argc, char** argv) {
  const char* level = fastgpt::isa_name(fastgpt::isa_level());
  if (argc > 1 && std::strcmp(argv[1], "--level") == 0) return std::puts(level) < 0;
  std::printf("kernels at level %s, 1 thread against %d\n", level, fastgpt::driver::kThreads);
  return fastgpt::driver::run_all(argc > 1 ? argv[1] : "");
}
