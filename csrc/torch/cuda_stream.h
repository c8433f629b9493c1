// The stream on which a CUDA op runs. The symbol that tells it is weak: one library loads into CPU
// builds of torch too, where it is null.
#pragma once

#include "csrc/torch/common.h"

#if defined(FASTGPT_CUDA)
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fastgpt::binding {

// Makes the tensor's device current while it lives, and holds torch's current stream of it.
class CudaStream {
 public:
  explicit CudaStream(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "fastgpt: this build of torch does not tell its current CUDA stream");
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* get() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace fastgpt::binding
#endif
