// What a planted fault is held to.
#pragma once

#include "tests/emulator/cases.h"

namespace fastgpt::cases {

inline constexpr unsigned kSchedules = 12;

// Every order of threads must give a report that holds each of `parts`.
inline void expect_report(std::initializer_list<const char*> parts,
                          const std::function<void()>& run) {
  for (unsigned schedule = 0; schedule < kSchedules; ++schedule) {
    emulator::set_schedule(schedule);
    std::string report = "nothing";
    try {
      run();
    } catch (const std::runtime_error& error) {
      report = error.what();
    }
    for (const char* part : parts) {
      require(report.find(part) != std::string::npos, "schedule " + std::to_string(schedule) +
                                                          ": expected a report with \"" + part +
                                                          "\", got: " + report);
    }
  }
}

}  // namespace fastgpt::cases
