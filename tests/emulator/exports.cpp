// What the Python tests ask of the emulator in the op library (ctypes).
#include "tests/emulator/emulator.h"

#define FASTGPT_EXPORT extern "C" __attribute__((visibility("default")))

FASTGPT_EXPORT uint64_t fastgpt_emulator_take_bank_conflicts() {
  return fastgpt::emulator::take_bank_conflicts();
}

FASTGPT_EXPORT void fastgpt_emulator_set_compute_capability(int capability) {
  fastgpt::emulator::set_compute_capability(capability);
}
