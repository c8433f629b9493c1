// What the instrumented kernels call at every load and store (-fsanitize=thread, whose own library
// is not linked) and where a check of -fsanitize=alignment,bounds fails.
#include <cstdio>
#include <cstdlib>

#include "tests/emulator/block.h"

namespace fastgpt::emulator {

namespace {

// As the compiler lays them out.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeMismatch {
  SourceLocation location;
  const void* type;
  unsigned char log_alignment, kind;
};

struct OutOfBounds {
  SourceLocation location;
};

[[noreturn]] void report(const SourceLocation& location, const std::string& what, const void* pc) {
  if (current != nullptr) fail(thread_name(*current) + ": " + what + " at %", {pc});
  std::fprintf(stderr, "emulator: on the host: %s at %s:%u\n", what.c_str(), location.file,
               location.line);
  std::abort();
}

}  // namespace
}  // namespace fastgpt::emulator

using fastgpt::emulator::touch;

extern "C" {

#define FASTGPT_HOOKS(bytes)                          \
  void __tsan_read##bytes(void* address) {            \
    touch(address, bytes, false, FASTGPT_PC);         \
  }                                                   \
  void __tsan_write##bytes(void* address) {           \
    touch(address, bytes, true, FASTGPT_PC);          \
  }                                                   \
  void __tsan_unaligned_read##bytes(void* address) {  \
    touch(address, bytes, false, FASTGPT_PC);         \
  }                                                   \
  void __tsan_unaligned_write##bytes(void* address) { \
    touch(address, bytes, true, FASTGPT_PC);          \
  }
FASTGPT_HOOKS(1)
FASTGPT_HOOKS(2)
FASTGPT_HOOKS(4)
FASTGPT_HOOKS(8)
FASTGPT_HOOKS(16)

void __tsan_read_range(void* address, size_t bytes) {
  touch(address, bytes, false, FASTGPT_PC);
}
void __tsan_write_range(void* address, size_t bytes) {
  touch(address, bytes, true, FASTGPT_PC);
}
void __tsan_init() {}
char __tsan_atomic8_load(const volatile char* address, int) {  // of the guard of a static variable
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t address) {
  const auto& mismatch = *static_cast<fastgpt::emulator::TypeMismatch*>(data);
  char text[96];
  std::snprintf(text, sizeof text, "misaligned access: address %#zx is no multiple of %u",
                static_cast<size_t>(address), 1u << mismatch.log_alignment);
  fastgpt::emulator::report(mismatch.location, text, FASTGPT_PC);
}
void __ubsan_handle_out_of_bounds(void* data, uintptr_t index) {
  const auto& access = *static_cast<fastgpt::emulator::OutOfBounds*>(data);
  fastgpt::emulator::report(
      access.location,
      "index " + std::to_string(static_cast<long>(index)) + " out of bounds of an array",
      FASTGPT_PC);
}

}  // extern "C"
