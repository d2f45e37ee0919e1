// Memory for the kernels of one call, filled, so that what is not written shows.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

inline std::vector<std::unique_ptr<char[]>> kept;

inline void* scratch(int64_t size) {
  kept.push_back(std::make_unique<char[]>(static_cast<size_t>(size)));
  memset(kept.back().get(), 0x7d, static_cast<size_t>(size));
  return kept.back().get();
}

inline const char* done(const char* problem) {
  kept.clear();
  return problem;
}
