// The CPU kernels' threads are torch's own, so that torch.set_num_threads rules them.
#include "csrc/cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace fastgpt {

void run_parallel(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, body, context));
}

int max_threads() {
  return static_cast<int>(torch::stable::get_num_threads());
}

}  // namespace fastgpt
