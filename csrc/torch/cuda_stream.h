// Where an op runs: on the CPU, or on a CUDA stream. What tells the stream is looked up in the
// process: one library loads into CPU builds of torch too, which do not have it. Compiled for the
// emulator of the tests, the CUDA kernels take the CPU's tensors, as ops of
// torch.ops.fastgpt_emulated.
#pragma once

#if defined(FASTGPT_CUDA)
#include <dlfcn.h>
#endif

#include <utility>

#include "csrc/torch/common.h"

namespace fastgpt::binding {

#if defined(FASTGPT_CUDA)
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** ret_stream);

// Python loads torch's libraries for itself alone: a weak symbol of this one would stay null.
inline CurrentStream current_stream() {
  static const CurrentStream function = []() -> CurrentStream {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    return reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  return function;
}

// Makes the tensor's device current while it lives, and holds torch's current stream of it.
class CudaStream {
 public:
  explicit CudaStream(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(current_stream() != nullptr,
                    "fastgpt: this build of torch does not tell its current CUDA stream");
    STABLE_TORCH_ERROR_CODE_CHECK(current_stream()(t.get_device_index(), &stream_));
  }
  void* get() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

// Whether run_on_device_of takes the CUDA kernels for x.
inline bool runs_cuda_kernels(const Tensor& x) {
#if defined(FASTGPT_EMULATED)
  static_cast<void>(x);
  return true;
#else
  return !x.is_cpu();
#endif
}

// cpu() or cuda(stream), whichever has the kernels for x; a library without the kernels of one does
// not refer to them.
template <typename Cpu, typename Cuda>
void run_on_device_of(const Tensor& x, const Cpu& cpu, const Cuda& cuda) {
#if defined(FASTGPT_EMULATED)
  static_cast<void>(x);
  static_cast<void>(cpu);
  cuda(nullptr);
#else
  if (x.is_cpu()) return cpu();
#if defined(FASTGPT_CUDA)
  const CudaStream stream(x);
  cuda(stream.get());
#else
  static_cast<void>(cuda);
#endif
#endif
}

#if defined(FASTGPT_EMULATED)
// A raw op whose kernels may touch the tensors that it views, and no others.
template <auto function>
struct Emulated;
template <typename R, typename... Args, R (*function)(Args...)>
struct Emulated<function> {
  static R call(Args... args) {
    const emulator::Memory memory;
    return function(std::move(args)...);
  }
};
#endif

}  // namespace fastgpt::binding

// Registers the raw ops of a file that has kernels for both devices: implement(m) calls
// m.impl(name, FASTGPT_BOX(function)) for each.
#if defined(FASTGPT_EMULATED)
#define FASTGPT_BOX(function) TORCH_BOX(&fastgpt::binding::Emulated<&function>::call)
#define FASTGPT_IMPLEMENT(implement)                    \
  STABLE_TORCH_LIBRARY_IMPL(fastgpt_emulated, CPU, m) { \
    implement(m);                                       \
  }
#elif defined(FASTGPT_CUDA)
#define FASTGPT_BOX(function) TORCH_BOX(&function)
#define FASTGPT_IMPLEMENT(implement)            \
  STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {  \
    implement(m);                               \
  }                                             \
  STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) { \
    implement(m);                               \
  }
#else
#define FASTGPT_BOX(function) TORCH_BOX(&function)
#define FASTGPT_IMPLEMENT(implement)           \
  STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) { \
    implement(m);                              \
  }
#endif
