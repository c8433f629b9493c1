// What Python may say of the memory that the op library keeps, by ctypes.
#include <cstddef>

#include "csrc/cpu/pages.h"

extern "C" __attribute__((visibility("default"))) size_t fastgpt_release_memory() {
  return fastgpt::release_pages();
}
