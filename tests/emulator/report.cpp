// Source positions for reports, by addr2line.
#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>

#include "tests/emulator/block.h"

namespace fastgpt::emulator {

namespace {

// A path of the repository without what leads to it.
std::string from_root(const char* path) {
  static const std::string here = __FILE__, name = "tests/emulator/report.cpp";
  const std::string root = here.substr(0, here.size() - name.size());
  return std::strncmp(path, root.c_str(), root.size()) == 0 ? path + root.size() : path;
}

}  // namespace

std::string source_of(const void* pc) {
  Dl_info object;
  link_map* map = nullptr;
  if (dladdr1(pc, &object, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) == 0) return "?";
  // A return address: the call is the instruction before it.
  const unsigned long offset = reinterpret_cast<uintptr_t>(pc) - 1 - map->l_addr;
  char unknown[32];
  std::snprintf(unknown, sizeof unknown, "+0x%lx", offset);
  const std::string command =
      std::string("addr2line -i -e '") + object.dli_fname + "' " + unknown + " 2>/dev/null";
  FILE* lines = popen(command.c_str(), "r");
  if (lines == nullptr) return unknown;
  std::string found;
  char line[512];
  while (std::fgets(line, sizeof line, lines) != nullptr) {
    line[std::strcspn(line, " \n")] = '\0';  // also without "(discriminator 3)"
    // The intrinsics themselves say nothing.
    if (std::strstr(line, "emulator/device.h") != nullptr || line[0] == '?') continue;
    found += (found.empty() ? "" : " < ") + from_root(line);
  }
  pclose(lines);
  return found.empty() ? unknown : found;
}

}  // namespace fastgpt::emulator
